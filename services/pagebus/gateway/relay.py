"""One stored request of a client at this gateway, which either owns it or reads what its owner is sent, and
goes from the one to the other: an owner that is gone is taken over from, a replaced one becomes a reader.

It knows owners, terms and logs, nothing of text.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

import msgspec

from pagebus.bus import messages
from pagebus.bus.messages import DecodeError, Failed, Message, Rejected, Tokens
from pagebus.bus.protocol import BusError, WrongRevisionError
from pagebus.gateway.out_taps import names_one
from pagebus.gateway.owners import Owners, OwnerState
from pagebus.gateway.relay_parts import Change, Part, RelayTicket, RelayTiming
from pagebus.gateway.stream_record import (
    MAX_TERM,
    BrokenRecordError,
    StreamRecord,
    decode_record,
    encode_record,
)
from pagebus.requester.events import Event, RequestFailed, RequestSpec
from pagebus.requester.following import Following

_log = logging.getLogger(__name__)

_YIELD_EVERY = 256
_DOUBT_AGAIN_S = 1.0


class Relay:
    """The requests of one record. `submit` each of them, then `start`; `close` at the end."""

    def __init__(
        self,
        owners: Owners,
        key: str,
        record: StreamRecord,
        revision: int | None,
        *,
        is_owner: bool,
        timing: RelayTiming | None = None,
        on_owned: Callable[["Relay"], None] = lambda relay: None,
    ) -> None:
        """`revision` None: the record is not written (yet, or at all). `on_owned` hears of a take-over."""
        self.key = key
        self.record = record
        self.revision = revision
        self.is_owner = is_owner
        self.on_change: Callable[[Change], None] = lambda change: None
        self._owners = owners
        self._on_owned = on_owned
        self._timing = timing or RelayTiming()
        self._parts: dict[str, Part] = {}
        self._task: asyncio.Task[None] | None = None
        self._next_sequence: dict[int, int] = {}  # by segment; absent: not read yet
        self._waiting: list[Message] | None = None  # live ones, while the log is read
        self._wake = asyncio.Event()
        self._last_news_s = 0.0
        self._doubted_s = float("-inf")
        self._began_s = time.monotonic()

    @property
    def age_s(self) -> float:
        """Seconds since it began here."""
        return time.monotonic() - self._began_s

    @property
    def request_ids(self) -> Sequence[str]:
        """The ids on the bus."""
        return [request.request_id for request in self.record.requests]

    def submit(self, spec: RequestSpec, on_event: Callable[[Event], None]) -> RelayTicket:
        """Take one of the record's requests: sent to the scheduler where it is owned here."""
        part = self._parts[spec.request_id] = Part(spec, on_event)
        ticket = RelayTicket(part)
        if self.is_owner:
            part.ticket = self._owners.submit(spec, on_event)
        else:
            part.following = Following(spec)
        return ticket

    def start(self) -> None:
        """All requests were submitted: begin to read, unless they are owned here."""
        if not self.is_owner:
            self._task = asyncio.create_task(self._read(), name="relay")

    def close(self) -> None:
        """Nobody waits any more. The generations cancel what they own themselves."""
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()

    async def doubt(self) -> None:
        """Look whether somebody else owns the requests now, once a second at most; if so, read on."""
        now_s = time.monotonic()
        if not self.is_owner or self.revision is None or now_s - self._doubted_s < _DOUBT_AGAIN_S:
            return
        self._doubted_s = now_s
        try:
            if not await self._reload() or not self.is_owner:
                return
        except BusError:
            return
        self.is_owner = False
        for part in self._parts.values():
            state = self._owners.release(part.spec.request_id)
            part.is_over = part.is_over or state is None
            if state is None:
                continue
            part.num_cached = state.num_cached_tokens
            part.following = Following(
                msgspec.structs.replace(
                    part.spec, received=state.received(), num_prompt_told=state.num_prompt_told
                )
            )
            part.ticket = None
        # What was sent here before was received here.
        self._next_sequence = dict.fromkeys(range(len(self.record.segments) - 1), 0)
        self.start()
        self.on_change("replaced")

    # Reading

    @property
    def _open_parts(self) -> list[Part]:
        return [part for part in self._parts.values() if not part.is_over]

    async def _read(self) -> None:
        """Until everything is over, or owned here."""
        try:
            while self._open_parts and not self.is_owner:
                tap = await self._owners.listen(self.record.owner, self.request_ids, self._on_live)
                try:
                    await self._follow_owner()
                finally:
                    await self._owners.leave(tap)
        except Exception:
            _log.exception("a stream cannot be read any more")
            self._fail(RequestFailed("internal_error", "the gateway failed to read this stream"))

    async def _follow_owner(self) -> None:
        """Returns when all is over, or somebody else owns it: this gateway too."""
        hole_since_s: float | None = None
        deaf_since_s: float | None = None
        is_gone = False
        while True:
            has_log = await self._catch_up()
            now_s = time.monotonic()
            if not self._open_parts:
                return
            if self._expire():
                return
            holes = any(part.following is not None and part.following.has_hole for part in self._open_parts)
            hole_since_s = (hole_since_s or now_s) if holes else None
            state = await self._owners.state_of(self.record.owner, self._open_parts[0].spec.request_id)
            deaf_since_s = (deaf_since_s or now_s) if state is OwnerState.DEAF else None
            was_gone, is_gone = is_gone, state is OwnerState.GONE
            is_stuck = (
                hole_since_s is not None and now_s - hole_since_s >= self._timing.hole_patience_s
            ) or (deaf_since_s is not None and now_s - deaf_since_s >= self._timing.deaf_patience_s)
            if has_log and ((is_gone and was_gone) or is_stuck):
                if await self._take_over():
                    return
            elif is_gone and has_log:
                continue  # its last words may have come meanwhile: read once more
            if state is OwnerState.LIVE and has_log and not holes:
                self.on_change("settled")
            await self._wait(self._timing.hole_s if holes else self._timing.silence_s, has_log)

    async def _catch_up(self) -> bool:
        """Read what the log has and was not read yet; False where it cannot be reached now."""
        self._waiting = []
        request_ids = [part.spec.request_id.encode() for part in self._open_parts]
        last = len(self.record.segments) - 1
        num_read = 0
        has_log = True
        try:
            for index, segment in enumerate(self.record.segments):
                if index in self._next_sequence and index != last:
                    continue
                sequence = self._next_sequence.get(index, segment.first_sequence)
                async for stored in self._owners.read(segment.owner, sequence):
                    self._next_sequence[index] = stored.sequence + 1
                    if names_one(stored.data, request_ids):
                        self._take_bytes(stored.data)
                    num_read += 1
                    if num_read % _YIELD_EVERY == 0:
                        await asyncio.sleep(0)
                self._next_sequence.setdefault(index, sequence)
        except BusError:
            has_log = False
        waiting, self._waiting = self._waiting, None
        for message in waiting:
            self._take(message)
        self._deliver()
        return has_log

    def _on_live(self, message: Message) -> None:
        if self._waiting is not None:
            self._waiting.append(message)
            return
        self._take(message)
        self._deliver()
        if not self._open_parts or any(
            part.following is not None and part.following.has_hole for part in self._open_parts
        ):
            self._wake.set()

    def _take_bytes(self, data: bytes) -> None:
        try:
            self._take(messages.decode(data))
        except DecodeError:
            return

    def _take(self, message: Message) -> None:
        match message:
            case Tokens(rows=rows, prompts=prompts):
                for prompt in prompts:
                    if (following := self._following(prompt.request_id)) is not None:
                        following.take_prompt(prompt)
                for row in rows:
                    if (following := self._following(row.request_id)) is not None:
                        following.take_row(row)
            case Failed() | Rejected():
                if (following := self._following(message.request_id)) is not None:
                    following.take_end(message)
            case _:
                return

    def _following(self, request_id: str) -> Following | None:
        part = self._parts.get(request_id)
        return None if part is None or part.is_over else part.following

    def _deliver(self) -> None:
        for part in self._open_parts:
            following = part.following
            if following is None:
                continue
            events = following.news()
            if events:
                self._last_news_s = time.monotonic()
            for event in events:
                if not part.is_over:
                    part.on_event(event)
            part.is_over = part.is_over or following.is_over

    async def _wait(self, at_most_s: float, has_log: bool) -> None:
        """Until nothing came for a while, something is missing, or all is over."""
        if not has_log:
            at_most_s = min(at_most_s, self._timing.retry_s)
        while True:
            self._wake.clear()
            try:
                async with asyncio.timeout(at_most_s):
                    await self._wake.wait()
            except TimeoutError:
                if time.monotonic() - self._last_news_s >= at_most_s or not has_log:
                    return
                continue
            if self._open_parts:
                await asyncio.sleep(min(at_most_s, self._timing.hole_s) / 4)  # the log is a moment behind
            return

    def _expire(self) -> bool:
        if time.time() < self.record.deadline_s:
            return False
        self._fail(RequestFailed("timeout", "the deadline of this request has passed"))
        return True

    def _fail(self, failure: RequestFailed) -> None:
        for part in self._open_parts:
            part.is_over = True
            part.on_event(failure)

    # Taking over

    async def _reload(self) -> bool:
        """Read the record again; whether somebody else owns it since. Raises `BusError`."""
        entry = await self._owners.get(self.key)
        if entry is None:
            return False
        try:
            record = decode_record(entry.value)
        except BrokenRecordError:
            return False
        if record.id != self.record.id or record.term < self.record.term:
            return False
        is_newer = record.term > self.record.term
        self.record, self.revision = record, entry.revision
        return is_newer

    async def _take_over(self) -> bool:
        """Own it, if nobody else was faster; whether it has another owner now."""
        try:
            if await self._reload():
                return True
            if self.record.is_cancelled:
                self._fail(RequestFailed("cancelled", "the request was cancelled"))
                return True
            if self.revision is None or self.record.term >= MAX_TERM:
                self._fail(RequestFailed("stream_lost", "what is kept of this stream is incomplete"))
                return True
            first_sequence = await self._owners.first_sequence()
            old_owner = self.record.owner
            record = self.record.taken_by(self._owners.instance, first_sequence)
            self.revision = await self._owners.update(self.key, encode_record(record), self.revision)
        except WrongRevisionError:
            return await self._is_taken()
        except BusError:
            return False
        self.record = record
        self._own()
        self._owners.tell_moved(old_owner, self.request_ids)
        return True

    async def _is_taken(self) -> bool:
        try:
            return await self._reload()
        except BusError:
            return False

    async def renew(self) -> None:
        """Write the record again before it is too old: the request goes on longer. Raises `BusError`."""
        if self.is_owner and self.revision is not None:
            self.revision = await self._owners.update(self.key, encode_record(self.record), self.revision)

    def _own(self) -> None:
        self.is_owner = True
        self._on_owned(self)
        self.on_change("owner")
        for part in self._open_parts:
            following = part.following
            if following is None:
                continue
            part.num_cached = following.num_cached_tokens
            spec = msgspec.structs.replace(
                part.spec,
                received=following.received(),
                num_prompt_told=following.num_prompt_told,
                first_attempt=self.record.first_attempt,
                timeout_s=max(0.001, self.record.deadline_s - time.time()),
            )
            part.following = None
            try:
                part.ticket = self._owners.submit(spec, part.on_event)
            except ValueError:  # it runs here already: two readers of this process, and one was faster
                part.following = following
                self.is_owner = False
            if part.is_over and part.ticket is not None:  # it ended before the ticket was here
                part.ticket.cancel()
