"""Sends one process's messages in order, at once where the bus takes them, else by a task. What cannot be
sent now is lost, as on a wire."""

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from pagebus.bus.protocol import Bus, BusError, NotConnectedError, PayloadTooLargeError
from pagebus.requester.events import RequestFailed

_log = logging.getLogger(__name__)


@dataclass
class Outgoing:
    """A message to publish, and who hears that it can never be sent."""

    subject: str
    data: bytes
    headers: dict[str, str] = field(default_factory=dict)
    on_refused: Callable[[RequestFailed], None] = lambda failure: None


class Outbox:
    """The messages of one process on their way out."""

    def __init__(self, bus: Bus, counters: Counter[str]) -> None:
        self._bus = bus
        self._counters = counters
        self._messages: deque[Outgoing] = deque()
        self._has_messages = asyncio.Event()
        self._sender: asyncio.Task[None] | None = None
        self._is_sending = False  # the task has a message that is not sent yet

    @property
    def is_open(self) -> bool:
        """Whether what is put in will be sent."""
        return self._sender is not None

    def open(self) -> None:
        """Begin to send."""
        self._sender = asyncio.create_task(self._send_all(), name="requester-sender")

    async def close(self) -> None:
        """Send what is left, and stop."""
        if self._sender is None:
            return
        self._sender.cancel()
        await asyncio.gather(self._sender, return_exceptions=True)
        while self._messages:
            await self._send(self._messages.popleft())

    def put(self, outgoing: Outgoing) -> None:
        """Send it after all that was put in before."""
        if self._sender is not None and not self._messages and not self._is_sending:
            try:
                is_sent = self._bus.publish_now(
                    outgoing.subject, outgoing.data, headers=outgoing.headers or None
                )
            except BusError as error:
                is_sent = isinstance(error, NotConnectedError)
                self._counters["unsent"] += is_sent  # lost: the timer or the reconnect asks again
            if is_sent:
                return
        # Whoever is told that a message cannot be sent is told later: it has not got its ticket yet.
        self._messages.append(outgoing)
        self._has_messages.set()

    async def _send_all(self) -> None:
        while True:
            await self._has_messages.wait()
            self._has_messages.clear()
            while self._messages:
                await self._send(self._messages.popleft())

    async def _send(self, outgoing: Outgoing) -> None:
        self._is_sending = True
        try:
            await self._bus.publish(outgoing.subject, outgoing.data, headers=outgoing.headers or None)
        except NotConnectedError:
            self._counters["unsent"] += 1  # lost: the timer or the reconnect asks again
        except PayloadTooLargeError as error:
            self._counters["refused"] += 1
            outgoing.on_refused(RequestFailed("prompt_too_large", str(error), is_client_fault=True))
        except BusError as error:
            _log.error("a message cannot be sent: %s", error)
            self._counters["refused"] += 1
            outgoing.on_refused(RequestFailed("internal_error", "the request cannot be sent"))
        finally:
            self._is_sending = False
