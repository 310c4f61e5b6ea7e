"""Where records and sent messages are kept: the bucket of records and the log of all replies, opened in the
background and watched, so that nobody on the way of a request waits for them for long.

It knows the bus, nothing of what a record says.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

from pagebus.bus import subjects
from pagebus.bus.protocol import (
    Bus,
    BusError,
    Entry,
    KeyValue,
    MessageLog,
    NotConnectedError,
    PayloadTooLargeError,
    Stored,
)

_log = logging.getLogger(__name__)

WAIT_S = 0.2
"""How long a request waits for its record; longer, and it goes on without."""
LOG_AGE_S = 600.0
RECORD_AGE_S = 1800.0
"""Beyond the log's age by more than a request usually has: a record without messages is still a request."""
LOG_BYTES = 1 << 30

_HEAD_BYTES = 512  # what a write's headers may take
_REFRESH_S = 1.0
_START_WAIT_S = 2.0


class StreamStore:
    """Opens and watches both. `first_sequence` is None while one of them cannot be reached."""

    def __init__(self, bus: Bus, *, wait_s: float = WAIT_S) -> None:
        self.first_sequence: int | None = None
        self._bus = bus
        self._wait_s = wait_s
        self._records: KeyValue | None = None
        self._messages: MessageLog | None = None
        self._watching: asyncio.Task[None] | None = None
        self._has_complained = False

    async def start(self) -> None:
        """Begin to open them; a bus that has neither yet is tried again."""
        self._bus.on_reconnect(self._on_reconnect)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_START_WAIT_S):
                await self.refresh()
        self._watching = asyncio.create_task(self._watch(), name="stream-store")

    async def close(self) -> None:
        """Stop watching."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)

    @property
    def is_ready(self) -> bool:
        """Whether a record written now would find its messages."""
        return self.first_sequence is not None and self._bus.is_connected

    async def get(self, key: str) -> Entry | None:
        """A record; raises `BusError`."""
        return await self._bucket().get(key)

    async def create(self, key: str, value: bytes) -> int:
        """Write the first one, in `wait_s` at most; raises `WrongRevisionError`, `BusError`,
        `TimeoutError`."""
        if len(value) > self._bus.max_payload - _HEAD_BYTES:
            raise PayloadTooLargeError(len(value), self._bus.max_payload)
        async with asyncio.timeout(self._wait_s):
            return await self._bucket().create(key, value)

    async def update(self, key: str, value: bytes, revision: int) -> int:
        """Replace one; raises `WrongRevisionError`, `BusError`."""
        return await self._bucket().update(key, value, revision)

    def read(self, owner: str, first_sequence: int) -> AsyncIterator[Stored]:
        """What was sent to a process; raises `BusError`, here or later."""
        if self._messages is None:
            raise NotConnectedError("the log of streams has not been reached yet")
        return self._messages.read(subjects.out(owner), first_sequence)

    async def refresh(self) -> bool:
        """Learn the log's newest sequence now; whether that was possible."""
        try:
            if self._records is None:
                self._records = await self._bus.key_value(subjects.STREAMS_BUCKET, max_age_s=RECORD_AGE_S)
            if self._messages is None:
                self._messages = await self._bus.message_log(
                    subjects.OUT_LOG, [subjects.ALL_OUT], max_age_s=LOG_AGE_S, max_bytes=LOG_BYTES
                )
            self.first_sequence = await self._messages.last_sequence() + 1
        except BusError as error:
            self.first_sequence = None
            if not self._has_complained:
                self._has_complained = True
                _log.warning("streams cannot be resumed now: %s", error)
            return False
        self._has_complained = False
        return True

    def _bucket(self) -> KeyValue:
        if self._records is None or not self._bus.is_connected:
            raise NotConnectedError("the records of streams cannot be reached")
        return self._records

    async def _on_reconnect(self) -> None:
        self.first_sequence = None  # a server that came back may count from the start
        with contextlib.suppress(BusError):
            await self.refresh()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_REFRESH_S)
            try:
                await self.refresh()
            except Exception:
                _log.exception("the log of streams cannot be watched")
