"""What the services ask of a bus. `NatsBus` and `MemoryBus` provide it; services know only this."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple, Protocol


class Msg(NamedTuple):
    """One message as received. `headers` is empty where the sender gave none."""

    subject: str
    data: bytes
    reply: str = ""
    headers: Mapping[str, str] = {}

    @property
    def is_no_responders(self) -> bool:
        """Whether the bus itself sent this to a message's reply subject: nobody listens there."""
        return not self.data and self.headers.get("Status") == "503"


Handler = Callable[[Msg], None]
"""Called on the event loop for every message of a subscription, in order. It must return at once
(enqueue or change state; never block). What it raises is counted and logged, and goes no further."""


class BusError(Exception):
    """Base of what a bus raises."""


class NotConnectedError(BusError):
    """The bus is not connected now; nothing was sent and nothing is buffered. Try again later."""


class NotPermittedError(BusError):
    """The server refuses this user, or a subscription of it."""


class NoRespondersError(BusError):
    """Nobody listens on the subject of a request."""


class RequestTimeoutError(BusError):
    """A request was not answered in time."""


class PayloadTooLargeError(BusError):
    """Payload and headers exceed the server's `max_payload`; nothing was sent."""

    def __init__(self, size: int, max_payload: int) -> None:
        super().__init__(f"a message of {size} bytes exceeds the bus's max_payload of {max_payload} bytes")
        self.size = size
        self.max_payload = max_payload


class InvalidMessageError(BusError):
    """A subject, reply subject or header cannot be sent (wildcards, spaces, line ends); nothing was sent."""


class WrongRevisionError(BusError):
    """A compare-and-set found another revision (or, for `create`, an existing value)."""


class Entry(NamedTuple):
    """A key's value and the revision that a compare-and-set names."""

    value: bytes
    revision: int


class Subscription(Protocol):
    """A live subscription."""

    async def unsubscribe(self) -> None:
        """Stop it; messages already received may still be handled."""


class KeyValue(Protocol):
    """A key-value bucket with compare-and-set. Every call raises `BusError` when it cannot be answered."""

    async def get(self, key: str) -> Entry | None:
        """The newest value, or None."""

    async def create(self, key: str, value: bytes) -> int:
        """Write a key that does not exist; its revision. Raises `WrongRevisionError` if it exists."""

    async def update(self, key: str, value: bytes, revision: int) -> int:
        """Replace the value of exactly `revision`; the new revision. Raises `WrongRevisionError`."""

    async def put(self, key: str, value: bytes) -> int:
        """Write without comparing; the new revision."""


class Stored(NamedTuple):
    """A message as a log kept it. `sequence` rises over all subjects of the log, with gaps on each."""

    sequence: int
    data: bytes


class MessageLog(Protocol):
    """What was published on some subjects, kept for a while beside its delivery: publishers pay nothing and
    learn nothing of it, so a message may be missing. Calls that cannot be answered raise `BusError`."""

    async def last_sequence(self) -> int:
        """The newest message's sequence; 0 in an empty log."""

    def read(self, subject: str, first_sequence: int) -> AsyncIterator[Stored]:
        """What is kept of one subject (no wildcard) from `first_sequence` on, in order; ends where nothing
        more is kept now."""


class Bus(Protocol):
    """Publish and subscribe with at-most-once delivery, key-value buckets, and logs of what was published."""

    @property
    def is_connected(self) -> bool:
        """Whether a publish would be sent now."""

    @property
    def max_payload(self) -> int:
        """Largest payload including headers, in bytes."""

    async def publish(
        self, subject: str, data: bytes, *, reply: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        """Send once; never buffers while disconnected.

        With `reply` and nobody listening on `subject`, the bus sends a message with `is_no_responders` there.
        Raises `NotConnectedError`, `PayloadTooLargeError`, `InvalidMessageError`.
        """

    def publish_now(
        self, subject: str, data: bytes, *, reply: str = "", headers: Mapping[str, str] | None = None
    ) -> bool:
        """As `publish`, before this returns; False, and nothing sent, where `publish` would wait for a bus
        that is far behind. Raises as `publish` does."""

    async def request(self, subject: str, data: bytes, *, timeout_s: float) -> Msg:
        """Send and wait for one answer.

        Raises `NoRespondersError`, `RequestTimeoutError`, `NotConnectedError`.
        """

    async def subscribe(self, subject: str, handler: Handler, *, queue: str = "") -> Subscription:
        """Deliver messages on `subject` (may hold `*`, `>`) to `handler`; each to one of a `queue` group."""

    async def key_value(self, bucket: str, *, max_age_s: float | None = None) -> KeyValue:
        """The bucket, made if absent; its values go after `max_age_s`, None: never."""

    async def message_log(
        self, name: str, subjects: Sequence[str], *, max_age_s: float, max_bytes: int
    ) -> MessageLog:
        """The log `name` of `subjects` (may hold `*`, `>`), made if absent; it forgets the oldest first."""

    def on_reconnect(self, callback: Callable[[], Awaitable[None]]) -> None:
        """Run `callback` whenever messages may have been lost: after every reconnect, and when servers of a
        cluster came or went."""

    async def close(self) -> None:
        """Send what is pending and close."""
