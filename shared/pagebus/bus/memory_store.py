"""What a `MemoryBroker` keeps: buckets and logs as JetStream keeps them, with ages by the event loop's clock.

It knows no connection: each one gives a `reach` that raises while it is cut or the store is away.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pagebus.bus import guard
from pagebus.bus.protocol import Entry, RequestTimeoutError, Stored, WrongRevisionError

_OVERHEAD_BYTES = 32  # about what JetStream adds to a message


class _Value(NamedTuple):
    entry: Entry
    written_s: float  # on the loop's clock


class _Kept(NamedTuple):
    sequence: int
    subject: str
    data: bytes
    kept_s: float  # on the loop's clock


@dataclass
class Bucket:
    """Values of one bucket; revisions count all writes to the bucket, as JetStream's do."""

    max_age_s: float | None = None
    num_writes: int = 0
    written: dict[str, _Value] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, Entry]:
        """What has not aged out yet."""
        self._forget()
        return {key: value.entry for key, value in self.written.items()}

    def get(self, key: str) -> Entry | None:
        """The newest value, or None."""
        self._forget()
        value = self.written.get(key)
        return value.entry if value else None

    def write(self, key: str, value: bytes) -> int:
        """Write; the revision."""
        self.num_writes += 1
        self.written.pop(key, None)  # in order of writing, for `_forget`
        self.written[key] = _Value(Entry(bytes(value), self.num_writes), _now_s())
        return self.num_writes

    def _forget(self) -> None:
        if self.max_age_s is None:
            return
        oldest_s = _now_s() - self.max_age_s
        for key in list(self.written):
            if self.written[key].written_s > oldest_s:
                return
            del self.written[key]


@dataclass
class Log:
    """What was published on some subjects."""

    subjects: tuple[str, ...]
    max_age_s: float
    max_bytes: int
    last_sequence: int = 0
    num_bytes: int = 0
    messages: list[_Kept] = field(default_factory=list)
    num_forgotten: int = 0  # at the start of `messages`, not yet cut off

    def keep(self, subject: str, data: bytes) -> None:
        """Take a message if its subject is one of the log's."""
        if not any(guard.matches(pattern, subject) for pattern in self.subjects):
            return
        self.last_sequence += 1
        self.messages.append(_Kept(self.last_sequence, subject, data, _now_s()))
        self.num_bytes += _num_bytes(subject, data)
        self.forget()

    def forget(self) -> None:
        """Drop what is too old or too much, the oldest first."""
        oldest_s = _now_s() - self.max_age_s
        while self.num_forgotten < len(self.messages):
            oldest = self.messages[self.num_forgotten]
            if self.num_bytes <= self.max_bytes and oldest.kept_s > oldest_s:
                break
            self.num_forgotten += 1
            self.num_bytes -= _num_bytes(oldest.subject, oldest.data)
        if self.num_forgotten > len(self.messages) // 2:
            del self.messages[: self.num_forgotten]
            self.num_forgotten = 0

    def next(self, subject: str, sequence: int) -> Stored | None:
        """The first message of `subject` at or after `sequence`."""
        self.forget()
        first = self.messages[0].sequence if self.messages else 0
        for position in range(max(sequence - first, self.num_forgotten), len(self.messages)):
            message = self.messages[position]
            if message.subject == subject:
                return Stored(message.sequence, message.data)
        return None


@dataclass
class MemoryStore:
    """Buckets and logs of one broker. They outlive connections; `is_available` and `wipe` are for tests."""

    buckets: dict[str, Bucket] = field(default_factory=dict)
    logs: dict[str, Log] = field(default_factory=dict)
    is_available: bool = True
    """While false, every bucket and log raises, and logs miss what is published."""
    delay_s: float = 0.0
    """How long every read and write takes."""

    def wipe(self) -> None:
        """Lose everything, as a server that comes back with an empty store: the next use makes it again."""
        self.buckets.clear()
        self.logs.clear()

    def keep(self, subject: str, data: bytes) -> None:
        """Offer a published message to all logs."""
        if self.is_available:
            for log in self.logs.values():
                log.keep(subject, data)

    def require(self, what: str) -> None:
        """Raises `RequestTimeoutError` while the store is not available."""
        if not self.is_available:
            raise RequestTimeoutError(f"the store does not answer about {what}")


class MemoryKeyValue:
    """A bucket as seen by one connection; `reach` raises where that is cut or the store is away."""

    def __init__(
        self,
        store: MemoryStore,
        name: str,
        max_age_s: float | None,
        reach: Callable[[str], Awaitable[None]],
    ) -> None:
        self._store = store
        self._name = name
        self._max_age_s = max_age_s
        self._reach = reach

    async def get(self, key: str) -> Entry | None:
        """The newest value, or None."""
        return (await self._bucket(key)).get(key)

    async def create(self, key: str, value: bytes) -> int:
        """Write a key that does not exist. Raises `WrongRevisionError` if it exists."""
        bucket = await self._bucket(key)
        if bucket.get(key) is not None:
            raise WrongRevisionError(f"{key} exists")
        return bucket.write(key, value)

    async def update(self, key: str, value: bytes, revision: int) -> int:
        """Replace the value of exactly `revision`. Raises `WrongRevisionError`."""
        bucket = await self._bucket(key)
        entry = bucket.get(key)
        if (entry.revision if entry else 0) != revision:
            raise WrongRevisionError(f"{key} is not at revision {revision}")
        return bucket.write(key, value)

    async def put(self, key: str, value: bytes) -> int:
        """Write without comparing; the new revision."""
        return (await self._bucket(key)).write(key, value)

    async def _bucket(self, key: str) -> Bucket:
        guard.check_publish(key)
        await self._reach(key)
        return self._store.buckets.setdefault(self._name, Bucket(self._max_age_s))


class MemoryLog:
    """A log as seen by one connection; `reach` raises where that is cut or the store is away."""

    def __init__(
        self,
        store: MemoryStore,
        name: str,
        subjects: Sequence[str],
        max_age_s: float,
        max_bytes: int,
        reach: Callable[[str], Awaitable[None]],
    ) -> None:
        self._store = store
        self._name = name
        self._subjects = tuple(subjects)
        self._max_age_s = max_age_s
        self._max_bytes = max_bytes
        self._reach = reach

    async def last_sequence(self) -> int:
        """The newest message's sequence; 0 in an empty log."""
        return (await self.log()).last_sequence

    async def read(self, subject: str, first_sequence: int) -> AsyncGenerator[Stored, None]:
        """What is kept of `subject` from `first_sequence` on, in order; each message is a step of its own, so
        that faults may strike between them."""
        guard.check_publish(subject)
        sequence = first_sequence
        while (stored := (await self.log()).next(subject, sequence)) is not None:
            sequence = stored.sequence + 1
            yield stored

    async def log(self) -> Log:
        """The log itself, made again where it was lost."""
        await self._reach(self._name)
        fresh = Log(self._subjects, self._max_age_s, self._max_bytes)
        return self._store.logs.setdefault(self._name, fresh)


def _now_s() -> float:
    return asyncio.get_running_loop().time()


def _num_bytes(subject: str, data: bytes) -> int:
    return len(subject) + len(data) + _OVERHEAD_BYTES
