"""Listens to what other owners of requests are sent: one subscription an owner, however many readers.

It looks into a message only where a request that somebody reads is named in it.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pagebus.bus import messages, subjects
from pagebus.bus.messages import DecodeError, Message
from pagebus.bus.protocol import Bus, BusError, Msg, Subscription

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Tap:
    """One reader's interest."""

    owner: str
    request_ids: Sequence[bytes]
    on_message: Callable[[Message], None]


@dataclass(eq=False)
class _Listener:
    """What all readers of one owner share."""

    taps: list[Tap] = field(default_factory=list)
    subscription: Subscription | None = None


class OutTaps:
    """The taps of one process."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._listeners: dict[str, _Listener] = {}

    async def open(
        self, owner: str, request_ids: Sequence[str], on_message: Callable[[Message], None]
    ) -> Tap:
        """From now on `on_message` gets the messages to `owner` that name one of these requests. Where
        listening is not possible now, nothing comes: the log has it."""
        tap = Tap(owner, [request_id.encode() for request_id in request_ids], on_message)
        listener = self._listeners.get(owner)
        if listener is not None:
            listener.taps.append(tap)
            return tap
        listener = self._listeners[owner] = _Listener([tap])
        try:
            listener.subscription = await self._bus.subscribe(
                subjects.out(owner), lambda msg: _hand_out(listener, msg)
            )
        except BusError as error:
            _log.warning("cannot listen to %s: %s", owner, error)
        if not listener.taps:
            await self._close(listener)
        return tap

    async def close(self, tap: Tap) -> None:
        """Nothing more comes; the last reader of an owner ends the subscription."""
        listener = self._listeners.get(tap.owner)
        if listener is None or tap not in listener.taps:
            return
        listener.taps.remove(tap)
        if not listener.taps:
            del self._listeners[tap.owner]
            await self._close(listener)

    async def _close(self, listener: _Listener) -> None:
        if listener.subscription is not None:
            subscription, listener.subscription = listener.subscription, None
            await subscription.unsubscribe()


def names_one(data: bytes, request_ids: Sequence[bytes]) -> bool:
    """Whether one of these requests is named in a message's bytes."""
    return any(request_id in data for request_id in request_ids)


def _hand_out(listener: _Listener, msg: Msg) -> None:
    message: Message | None = None
    for tap in list(listener.taps):
        if not names_one(msg.data, tap.request_ids):
            continue
        if message is None:
            try:
                message = messages.decode(msg.data)
            except DecodeError:
                return
        tap.on_message(message)
