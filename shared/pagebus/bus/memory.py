"""A bus within one process, for tests and the seeded simulation: same promises as NATS, no network.

Several `MemoryBus` connections meet at one `MemoryBroker`. Delivery goes through the event loop, in order a
connection; a `Faults` policy may lose, double or delay single deliveries, and a connection may be cut. What
the broker keeps (buckets, logs) is `MemoryBroker.store`, which may be made unavailable, or wiped.
"""

import asyncio
import contextvars
import logging
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from pagebus.bus import guard
from pagebus.bus.memory_store import Bucket, MemoryKeyValue, MemoryLog, MemoryStore
from pagebus.bus.protocol import Handler, Msg, NoRespondersError, NotConnectedError, RequestTimeoutError

_log = logging.getLogger(__name__)

_NO_RESPONDERS: Mapping[str, str] = {"Status": "503"}


class Faults(Protocol):
    """Decides what happens to one delivery. Deterministic policies make a run replayable."""

    def delays_s(self, subject: str, sender: str, receiver: str) -> Sequence[float]:
        """One delay in seconds for each copy delivered: `(0.0,)` is healthy, `()` loses the message."""


class NoFaults:
    """Delivers everything once, at once."""

    def delays_s(self, subject: str, sender: str, receiver: str) -> Sequence[float]:
        """One copy, no delay."""
        return (0.0,)


@dataclass(eq=False)
class _MemorySubscription:
    """One subscription of one connection."""

    bus: "MemoryBus"
    subject: str
    handler: Handler
    queue: str
    is_active: bool = True

    async def unsubscribe(self) -> None:
        self.is_active = False
        self.bus.broker.remove(self)


class MemoryBroker:
    """Where memory connections meet. `faults` may be replaced at any time; `store` outlives connections."""

    def __init__(self, *, max_payload: int = 8 << 20, faults: Faults | None = None) -> None:
        self.max_payload = max_payload
        self.faults: Faults = faults or NoFaults()
        self.connections: list[MemoryBus] = []
        self.subscriptions: dict[_MemorySubscription, None] = {}  # in order of subscription
        self.store = MemoryStore()
        self.on_publish: Callable[[str, Msg], None] | None = None
        """Told of every message, with its sender's name, before anybody gets it."""
        self._exact: dict[str, dict[_MemorySubscription, None]] = {}  # by subject
        self._patterns: dict[_MemorySubscription, None] = {}  # those with `*` or `>`
        self._num_connections = 0
        self._turns: Counter[tuple[str, str]] = Counter()  # (pattern, queue): whose turn it is

    @property
    def buckets(self) -> dict[str, Bucket]:
        """The store's buckets."""
        return self.store.buckets

    def connect(self, name: str = "") -> "MemoryBus":
        """A new connection."""
        self._num_connections += 1
        bus = MemoryBus(self, name=name or f"connection-{self._num_connections}")
        bus.number = self._num_connections
        self.connections.append(bus)
        return bus

    def add(self, subscription: _MemorySubscription) -> None:
        """Messages go there from now on."""
        self.subscriptions[subscription] = None
        is_pattern = any(part in ("*", ">") for part in subscription.subject.split("."))
        same = self._patterns if is_pattern else self._exact.setdefault(subscription.subject, {})
        same[subscription] = None

    def remove(self, subscription: _MemorySubscription) -> None:
        """Nothing goes there any more."""
        self.subscriptions.pop(subscription, None)
        self._patterns.pop(subscription, None)
        if (same := self._exact.get(subscription.subject)) is not None:
            same.pop(subscription, None)
            if not same:
                del self._exact[subscription.subject]

    def receivers(self, subject: str) -> list[_MemorySubscription]:
        """Who gets a message on `subject` now: every plain subscription, one member of each queue group."""
        chosen: list[_MemorySubscription] = []
        groups: dict[tuple[str, str], list[_MemorySubscription]] = {}
        matching = [s for s in self._patterns if guard.matches(s.subject, subject)]
        for subscription in (*self._exact.get(subject, ()), *matching):
            if not subscription.bus.is_connected:
                continue
            if subscription.queue:
                groups.setdefault((subscription.subject, subscription.queue), []).append(subscription)
            else:
                chosen.append(subscription)
        for key, members in groups.items():
            chosen.append(members[self._turns[key] % len(members)])
            self._turns[key] += 1
        return chosen


class MemoryBus:
    """One connection to a `MemoryBroker` (its own one where none is given)."""

    def __init__(self, broker: MemoryBroker | None = None, *, name: str = "connection") -> None:
        self.broker = broker or MemoryBroker()
        self.name = name
        self.counters: Counter[str] = Counter()
        self._is_connected = True
        self._is_closed = False
        self._callbacks: list[Callable[[], Awaitable[None]]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._inbox: deque[tuple[_MemorySubscription, Msg]] = deque()
        self._is_draining = False
        self._num_requests = 0
        self.number = 0  # the broker's count of connections
        self._context = contextvars.copy_context()  # what arrives is handled as the connection's own
        if broker is None:
            self.broker.connections.append(self)

    @property
    def is_connected(self) -> bool:
        """Whether a publish would be sent now."""
        return self._is_connected and not self._is_closed

    @property
    def max_payload(self) -> int:
        """Largest payload including headers, in bytes."""
        return self.broker.max_payload

    async def publish(
        self, subject: str, data: bytes, *, reply: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        """Send once. Raises `NotConnectedError`, `PayloadTooLargeError`, `InvalidMessageError`."""
        self.publish_now(subject, data, reply=reply, headers=headers)

    def publish_now(
        self, subject: str, data: bytes, *, reply: str = "", headers: Mapping[str, str] | None = None
    ) -> bool:
        """The same: this bus is never behind."""
        guard.check_publish(subject)
        if reply:
            guard.check_publish(reply)
        guard.check_size(guard.headers_size(headers) + len(data), self.max_payload)
        self._require_connection()
        message = Msg(subject, bytes(data), reply, dict(headers) if headers else {})
        self.broker.store.keep(subject, message.data)
        if self.broker.on_publish is not None:
            self.broker.on_publish(self.name, message)
        receivers = self.broker.receivers(subject)
        for receiver in receivers:
            for delay_s in self.broker.faults.delays_s(subject, self.name, receiver.bus.name):
                receiver.bus._accept(receiver, message, delay_s)
        if reply and not receivers:
            answer = Msg(reply, b"", "", _NO_RESPONDERS)
            for receiver in self.broker.receivers(reply):
                if receiver.bus is self:
                    self._accept(receiver, answer, 0.0)
        return True

    async def request(self, subject: str, data: bytes, *, timeout_s: float) -> Msg:
        """Send and wait for one answer.

        Raises `NoRespondersError`, `RequestTimeoutError`, `NotConnectedError`.
        """
        self._num_requests += 1
        answer: asyncio.Future[Msg] = asyncio.get_running_loop().create_future()

        def take(message: Msg) -> None:
            if not answer.done():
                answer.set_result(message)

        inbox = f"_INBOX.{self.number}.{self._num_requests}"
        subscription = await self.subscribe(inbox, take)
        try:
            await self.publish(subject, data, reply=inbox)
            message = await asyncio.wait_for(answer, timeout_s)
        except TimeoutError:
            raise RequestTimeoutError(f"no answer on {subject} within {timeout_s} s") from None
        finally:
            await subscription.unsubscribe()
        if message.is_no_responders:
            raise NoRespondersError(f"nobody listens on {subject}")
        return message

    async def subscribe(self, subject: str, handler: Handler, *, queue: str = "") -> _MemorySubscription:
        """Deliver messages on `subject` (may hold `*`, `>`) to `handler`; each to one of a `queue` group."""
        guard.check_subscribe(subject)
        if self._is_closed:
            raise NotConnectedError(f"{self.name} is closed")
        subscription = _MemorySubscription(self, subject, handler, queue)
        self.broker.add(subscription)
        return subscription

    async def key_value(self, bucket: str, *, max_age_s: float | None = None) -> MemoryKeyValue:
        """The bucket, made if absent; its values go after `max_age_s` on the loop's clock."""
        self._require_store(bucket)
        self.broker.store.buckets.setdefault(bucket, Bucket(max_age_s))
        return MemoryKeyValue(self.broker.store, bucket, max_age_s, self._reach_store)

    async def message_log(
        self, name: str, subjects: Sequence[str], *, max_age_s: float, max_bytes: int
    ) -> MemoryLog:
        """The log `name` of `subjects` (may hold `*`, `>`), made if absent; it forgets the oldest first."""
        for subject in subjects:
            guard.check_subscribe(subject)
        self._require_store(name)
        log = MemoryLog(self.broker.store, name, subjects, max_age_s, max_bytes, self._reach_store)
        await log.log()
        return log

    def on_reconnect(self, callback: Callable[[], Awaitable[None]]) -> None:
        """Run `callback` after every reconnect: messages may have been lost."""
        self._callbacks.append(callback)

    def disconnect(self) -> None:
        """Cut this connection: what is under way to it is lost, publishing raises, until `reconnect`."""
        self._is_connected = False
        self._inbox.clear()

    def reconnect(self) -> None:
        """Heal the connection and run the callbacks of `on_reconnect`."""
        if self._is_connected or self._is_closed:
            return
        self._is_connected = True
        for callback in self._callbacks:
            task = asyncio.get_running_loop().create_task(self._run(callback), context=self._context)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Deliver what this connection sent, end its subscriptions, and close."""
        await asyncio.sleep(0)
        self._is_closed = True
        self._inbox.clear()
        for subscription in [s for s in self.broker.subscriptions if s.bus is self]:
            await subscription.unsubscribe()
        if self in self.broker.connections:
            self.broker.connections.remove(self)
        for task in list(self._tasks):
            task.cancel()

    async def _run(self, callback: Callable[[], Awaitable[None]]) -> None:
        try:
            await callback()
        except Exception:
            self.counters["callback_errors"] += 1
            _log.exception("a reconnect callback failed")

    def _require_connection(self) -> None:
        if not self.is_connected:
            raise NotConnectedError(f"{self.name} is not connected")

    def _require_store(self, what: str) -> None:
        self._require_connection()
        self.broker.store.require(what)

    async def _reach_store(self, what: str) -> None:
        await asyncio.sleep(self.broker.store.delay_s)
        self._require_store(what)

    def _accept(self, subscription: _MemorySubscription, message: Msg, delay_s: float) -> None:
        loop = asyncio.get_running_loop()
        if delay_s > 0:
            loop.call_later(delay_s, self._enqueue, subscription, message, context=self._context)
        else:
            self._enqueue(subscription, message)

    def _enqueue(self, subscription: _MemorySubscription, message: Msg) -> None:
        if not self.is_connected:
            self.counters["lost"] += 1
            return
        self._inbox.append((subscription, message))
        if not self._is_draining:
            self._is_draining = True
            asyncio.get_running_loop().call_soon(self._drain, context=self._context)

    def _drain(self) -> None:
        """Run the handlers of what has arrived; what they cause arrives in a later turn of the loop."""
        self._is_draining = False
        for _ in range(len(self._inbox)):
            if not self._inbox:  # a handler cut the connection
                return
            subscription, message = self._inbox.popleft()
            if not subscription.is_active:
                continue
            self.counters["received"] += 1
            try:
                subscription.handler(message)
            except Exception:
                self.counters["handler_errors"] += 1
                _log.exception("a handler failed on %s", message.subject)
