"""Who leads: a record in the bucket that only take-over changes, and the signs that a leader lives.

`Watch` decides, purely; `Leadership` reads and writes the bucket. Neither knows requests or executors.
"""

import asyncio
import contextlib
import enum
import logging
import time
from dataclasses import dataclass

import msgspec

from pagebus.bus import subjects
from pagebus.bus.protocol import Bus, BusError, Entry, KeyValue, WrongRevisionError

log = logging.getLogger(__name__)

BEAT_INTERVAL_S = 0.5
SILENCE_S = 1.5
CHECK_TIMEOUT_S = 0.2
LEAVE_TIMEOUT_S = 0.5
MAX_EPOCH = 1 << 60
"""What is told above this is no epoch: following it would leave no room for the next."""


class Record(msgspec.Struct, frozen=True):
    """The leadership record, JSON: whose term it is."""

    instance: str
    epoch: int
    has_left: bool = False  # the term has ended in order: the next one may begin at once


class Beat(msgspec.Struct, frozen=True):
    """The leader's sign of life in the bucket, JSON. A new `count` is a sign."""

    instance: str
    epoch: int
    count: int


class Decision(enum.Enum):
    """What a standby does now."""

    WAIT = "wait"
    CREATE = "create"  # nobody ever led
    TAKE_OVER = "take over"


@dataclass(slots=True)
class Watch:
    """What a standby has seen of the leader. Times are monotonic seconds."""

    instance: str
    started_s: float
    highest_epoch: int = 0  # that any executor, heartbeat or record told of
    heartbeat_s: float | None = None
    heartbeat_epoch: int = 0  # its term
    left_epoch: int = 0  # the newest term whose leader said that it leaves
    beat: bytes = b""
    beat_s: float | None = None
    record: Record | None = None
    revision: int = 0

    def hear_epoch(self, epoch: int) -> None:
        """An executor or a scheduler told of this epoch."""
        if epoch <= MAX_EPOCH:
            self.highest_epoch = max(self.highest_epoch, epoch)

    def hear_heartbeat(self, scheduler: str, epoch: int, now_s: float) -> None:
        """A heartbeat on core NATS. One of an older term than the record's says nothing about its leader."""
        self.hear_epoch(epoch)
        if scheduler != self.instance and (self.record is None or epoch >= self.record.epoch):
            self.heartbeat_s, self.heartbeat_epoch = now_s, epoch

    def hear_leaving(self, epoch: int) -> None:
        """The last heartbeat of a term: its leader has sent its last plan."""
        self.hear_epoch(epoch)
        if epoch <= MAX_EPOCH:
            self.left_epoch = max(self.left_epoch, epoch)

    def see_beat(self, beat: bytes, now_s: float) -> None:
        """The beat's value as read; only a change is a sign of life."""
        if beat and beat != self.beat:
            is_first = not self.beat
            self.beat = beat
            if not is_first:  # the first may be years old
                self.beat_s = now_s

    def see_record(self, entry: Entry | None) -> None:
        """The record as read. One that cannot be decoded is taken over like a dead leader's."""
        self.record, self.revision = None, 0
        if entry is not None:
            self.revision = entry.revision
            self.record = _decode_record(entry.value)
            if self.record is not None:
                self.hear_epoch(self.record.epoch)

    def decide(self, now_s: float) -> Decision:
        """Take over when both signs are silent for 1.5 s; without a record, as soon as nobody is heard; from
        a leader that has left, at once, unless a newer term is heard."""
        if self.record is not None and (self.record.has_left or self.record.epoch <= self.left_epoch):
            is_newer_heard = (
                self.heartbeat_s is not None
                and self.heartbeat_epoch > self.record.epoch
                and now_s - self.heartbeat_s < SILENCE_S
            )
            return Decision.WAIT if is_newer_heard else Decision.TAKE_OVER
        signs = [sign for sign in (self.heartbeat_s, self.beat_s) if sign is not None]
        is_heard = any(now_s - sign < SILENCE_S for sign in signs)
        if self.revision == 0:
            return Decision.WAIT if is_heard else Decision.CREATE
        if is_heard or now_s - self.started_s < SILENCE_S:
            return Decision.WAIT
        return Decision.TAKE_OVER

    def next_epoch(self, unix_s: float) -> int:
        """The epoch of a term that begins now: above every one heard of, whatever became of the bucket."""
        return max(self.highest_epoch, int(unix_s)) + 1


def _decode_record(value: bytes) -> Record | None:
    try:
        return msgspec.json.decode(value, type=Record)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def has_lost(instance: str, epoch: int, other: str, other_epoch: int) -> bool:
    """Whether the leader of `epoch` must step down for another. Equal epochs (wiped buckets) go by name."""
    return other_epoch > epoch or (other_epoch == epoch and other != instance and other < instance)


class Leadership:
    """The term of one scheduler instance: standing by (epoch 0) or leading.

    `run` does the bucket's reads and writes; the service tells it what it hears and asks for `epoch`.
    """

    def __init__(self, bus: Bus, model: str, instance: str) -> None:
        self._bus = bus
        self._record_key = subjects.leader_key(model)
        self._beat_key = subjects.leader_beat_key(model)
        self._instance = instance
        self._watch = Watch(instance, time.monotonic())
        self._num_beats = 0
        self._bucket: KeyValue | None = None
        self._is_unreachable = False
        self._is_closed = False
        self._wake = asyncio.Event()
        self.epoch = 0

    def hear_heartbeat(self, scheduler: str, epoch: int, *, is_leaving: bool = False) -> None:
        """A heartbeat of another scheduler arrived."""
        if scheduler == self._instance:
            self._watch.hear_epoch(epoch)
            return
        if is_leaving:
            self._watch.hear_leaving(epoch)
            self._wake.set()
            return
        self._watch.hear_heartbeat(scheduler, epoch, time.monotonic())
        if self.epoch and has_lost(self._instance, self.epoch, scheduler, epoch):
            self.step_down(f"{scheduler} leads with epoch {epoch}")

    def hear_epoch(self, epoch: int) -> None:
        """An executor told of the epoch that it obeys."""
        self._watch.hear_epoch(epoch)
        if self.epoch and self.epoch < epoch <= MAX_EPOCH:
            self.step_down(f"an executor obeys epoch {epoch}")

    def step_down(self, why: str) -> None:
        """Stand by from now on; the signs of life must fall silent again before a take-over."""
        if self.epoch:
            log.warning("steps down from epoch %d: %s", self.epoch, why)
        self.epoch = 0
        self._watch.started_s = time.monotonic()

    async def run(self) -> None:
        """Watch and beat until `close` or cancelled."""
        while not self._is_closed:
            try:
                await self._turn()
                self._is_unreachable = False
            except BusError as error:
                if not self._is_unreachable:
                    log.warning("the bucket cannot be reached: %s", error)
                self._is_unreachable = True
                self._bucket = None
            if not self._is_closed:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), BEAT_INTERVAL_S)
                self._wake.clear()

    async def leave(self) -> None:
        """End the term in order, after its last plan: whoever stands by, or comes, takes over at once.

        Waits 0.5 s at most; where the bucket cannot be reached, the silence says it.
        """
        epoch, self.epoch, self._is_closed = self.epoch, 0, True
        if not epoch:
            return
        log.info("leaves epoch %d", epoch)
        try:
            async with asyncio.timeout(LEAVE_TIMEOUT_S):
                bucket = self._bucket or await self._bus.key_value(subjects.BUCKET)
                entry = await bucket.get(self._record_key)
                if entry is not None and _decode_record(entry.value) == Record(self._instance, epoch):
                    left = Record(self._instance, epoch, has_left=True)
                    await bucket.update(self._record_key, msgspec.json.encode(left), entry.revision)
        except (BusError, TimeoutError) as error:
            log.warning("the record could not be given up: %s", error or "no answer in time")

    def close(self) -> None:
        """End `run` after the call under way: a bus's own waiting may swallow a cancellation."""
        self._is_closed = True

    async def _turn(self) -> None:
        if self._bucket is None:
            self._bucket = await self._bus.key_value(subjects.BUCKET)
        if self.epoch:
            await self._beat(self._bucket)
        else:
            await self._stand_by(self._bucket)

    async def _stand_by(self, bucket: KeyValue) -> None:
        beat = await bucket.get(self._beat_key)
        self._watch.see_beat(beat.value if beat else b"", time.monotonic())
        self._watch.see_record(await bucket.get(self._record_key))
        decision = self._watch.decide(time.monotonic())
        if decision is not Decision.WAIT:
            await self._begin_term(bucket, self._watch.next_epoch(time.time()))

    async def _begin_term(self, bucket: KeyValue, epoch: int) -> None:
        value = msgspec.json.encode(Record(self._instance, epoch))
        try:
            if self._watch.revision:
                await bucket.update(self._record_key, value, self._watch.revision)
            else:
                await bucket.create(self._record_key, value)
        except WrongRevisionError:
            self._watch.started_s = time.monotonic()  # somebody else was faster: give it time
            return
        if self._watch.highest_epoch >= epoch:
            return  # a higher epoch was heard while the record was written: the next turn sees to it
        self._watch.hear_epoch(epoch)
        self.epoch = epoch
        log.info("leads with epoch %d", epoch)

    async def _beat(self, bucket: KeyValue) -> None:
        if not await self._is_confirmed(bucket):
            return
        self._num_beats += 1
        await bucket.put(
            self._beat_key, msgspec.json.encode(Beat(self._instance, self.epoch, self._num_beats))
        )

    async def _is_confirmed(self, bucket: KeyValue) -> bool:
        """Read the record; step down where another one's stands there. A wiped one is written again."""
        epoch = self.epoch
        entry = await bucket.get(self._record_key)
        if self.epoch != epoch:
            return False
        record = _decode_record(entry.value) if entry else None
        if entry is None:
            try:
                await bucket.create(self._record_key, msgspec.json.encode(Record(self._instance, epoch)))
            except WrongRevisionError:
                return False  # the next turn reads it
        elif (
            record is None
            or record.epoch > epoch
            or (record.epoch == epoch and record.instance != self._instance)
        ):
            self._watch.see_record(entry)
            self.step_down(f"the record says {record}")
        return self.epoch == epoch

    async def check(self) -> None:
        """After a pause: read the record before anything is sent, waiting 0.2 s at most."""
        if not self.epoch:
            return
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                await self._is_confirmed(self._bucket or await self._bus.key_value(subjects.BUCKET))
        except (BusError, TimeoutError):
            log.warning("the leadership record could not be read after a pause; leads on")
