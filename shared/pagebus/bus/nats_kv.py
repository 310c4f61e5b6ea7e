"""Key-value buckets of JetStream behind `KeyValue`: bounded waits, and no error but `BusError`.

A bucket is a stream with one message a key, named and laid out as every NATS client expects it.
"""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from pagebus.bus import guard
from pagebus.bus.nats_jetstream import (
    NO_MESSAGE,
    STREAM_NOT_FOUND,
    WRONG_LAST_SEQUENCE,
    Answer,
    JetStream,
    JetStreamError,
)
from pagebus.bus.protocol import BusError, Entry, NoRespondersError, WrongRevisionError

T = TypeVar("T")

AGING_BUCKET_BYTES = 1 << 30
"""Most that a bucket with an age may hold; it forgets the oldest first. So it never takes the store's last
bytes from the bucket that holds leadership."""

_BUCKET_BYTES = 16 << 20
_DUPLICATE_WINDOW_S = 120.0
_EXPECTED = "Nats-Expected-Last-Subject-Sequence"


class NatsKeyValue:
    """One bucket, made again where the server lost it. Every operation answers or raises `BusError`.

    Values are read from the stream's leader: what was written is read.
    """

    def __init__(self, jetstream: JetStream, name: str, max_age_s: float | None) -> None:
        self._jetstream = jetstream
        self._name = name
        self._max_age_s = max_age_s

    @classmethod
    async def open(cls, jetstream: JetStream, name: str, max_age_s: float | None = None) -> "NatsKeyValue":
        """The bucket, made if absent (history 1, kept in the server's store)."""
        bucket = cls(jetstream, name, max_age_s)
        await bucket._make()
        return bucket

    async def get(self, key: str) -> Entry | None:
        """The newest value, or None."""
        subject = self._subject(key)
        question = {"last_by_subj": subject}
        try:
            answer = await self._again(lambda: self._jetstream.call(self._api("MSG.GET"), question))
        except JetStreamError as error:
            if error.code == NO_MESSAGE:
                return None
            raise
        if answer.message is None:
            raise BusError(f"JetStream's answer about {key} holds no message")
        return Entry(answer.message.data, answer.message.seq)

    async def create(self, key: str, value: bytes) -> int:
        """Write a key that does not exist. Raises `WrongRevisionError` if it exists."""
        return await self._write(key, value, {_EXPECTED: "0"})

    async def update(self, key: str, value: bytes, revision: int) -> int:
        """Replace the value of exactly `revision`. Raises `WrongRevisionError`."""
        return await self._write(key, value, {_EXPECTED: str(revision)})

    async def put(self, key: str, value: bytes) -> int:
        """Write without comparing; the new revision."""
        return await self._write(key, value, None)

    async def _write(self, key: str, value: bytes, headers: dict[str, str] | None) -> int:
        subject = self._subject(key)
        try:
            answer = await self._again(lambda: self._jetstream.ask(subject, value, headers))
        except JetStreamError as error:
            if error.code in WRONG_LAST_SEQUENCE:
                raise WrongRevisionError(f"{key} is at another revision") from error
            raise
        if answer.seq < 1:  # whoever answers here is no stream
            raise BusError(f"JetStream's answer about {key} holds no sequence")
        return answer.seq

    async def _again(self, operation: Callable[[], Awaitable[Answer]]) -> Answer:
        """Once more after a server that came back with an empty store: nobody answers for the bucket."""
        try:
            return await operation()
        except NoRespondersError:
            await self._make()
        except JetStreamError as error:
            if error.code != STREAM_NOT_FOUND:
                raise
            await self._make()
        return await operation()

    async def _make(self) -> None:
        max_age_s = self._max_age_s or 0.0
        await self._jetstream.open(
            {
                "name": f"KV_{self._name}",
                "subjects": [f"$KV.{self._name}.>"],
                "retention": "limits",
                "storage": "file",
                "max_msgs_per_subject": 1,
                "max_bytes": AGING_BUCKET_BYTES if max_age_s else _BUCKET_BYTES,
                "max_age": round(max_age_s * 1e9),
                "duplicate_window": round(min(max_age_s or _DUPLICATE_WINDOW_S, _DUPLICATE_WINDOW_S) * 1e9),
                "discard": "old" if max_age_s else "new",
                "allow_rollup_hdrs": True,
                "deny_delete": True,
            }
        )

    def _api(self, kind: str) -> str:
        return f"STREAM.{kind}.KV_{self._name}"

    def _subject(self, key: str) -> str:
        guard.check_publish(key)
        return f"$KV.{self._name}.{key}"
