"""One executor as the scheduler sees it: rows, blocks, plans under way, reports. Chooses nothing itself.

What a report says of positions is noted at once; ids, digests and the blocks of rows that ended are settled
later, after the plan was sent (`settle`).
"""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np

from pagebus.bus.messages import Hello, Plan, PoolGroup, Step, StepDone, pack_handles
from pagebus.scheduler.blocks import Ints, KvPool
from pagebus.scheduler.computing import Computing
from pagebus.scheduler.journal import Journal
from pagebus.scheduler.pace import Pace
from pagebus.scheduler.prefix import Hit
from pagebus.scheduler.requests import Request, Row, RowState
from pagebus.scheduler.slots import SlotTable
from pagebus.scheduler.underway import Returning, SentPlan

RESEND_INTERVAL_S = 0.2
MAX_UNACKNOWLEDGED = 8
"""Plans under way after which new ones wait: a deaf executor must not fill the scheduler's memory."""


class ReportError(Exception):
    """A `StepDone` that cannot be true."""


class ExecutorState:
    """State of one executor within an epoch."""

    def __init__(
        self,
        hello: Hello,
        kv: KvPool,
        *,
        max_num_seqs: int,
        full_len: int,
        now_s: float,
        handles: Iterator[int],
        is_caching: bool = True,
    ) -> None:
        self.name = hello.executor
        self.max_num_seqs = min(max_num_seqs, hello.max_num_seqs)
        self.full_len = full_len
        """Longest sequence in tokens by the model and the setting; `max_len`: by the pool too."""
        self.max_len = full_len if kv.num_positions is None else min(full_len, kv.num_positions)
        self.heard_s = now_s
        self.computing = Computing(hello, now_s)
        self.probed_s = now_s
        self.num_no_responders = 0  # since it was heard
        self.sequence = 0  # of the newest plan
        self.acknowledged = 0  # newest plan that the executor took
        self.acknowledged_before = 0  # the same as it was a second or more ago
        self.acknowledged_at_upkeep = 0  # ... and at the last upkeep
        self.snapshot_sequence = 0
        self.num_steps = 0  # StepDones processed, in order
        self.num_steps_told = 0  # ... as the newest plan says
        self.is_lost = False
        self.is_stuck = False  # it was lost because it hangs, and still says hello
        self.lost_requests: list[str] = []  # ids of what ran here when it was given up
        self.pace = Pace()
        self.num_changes = 0  # counts what may give a waiting row room
        self._handle_source = handles
        self.is_caching = is_caching
        self._pool = kv.groups
        self._max_step_tokens = kv.max_step_tokens
        self.num_laid_out = 0  # steps of the newest plan
        self.num_done = 0  # ... that were reported
        self._begin(kv)

    def _begin(self, kv: KvPool) -> None:
        self.kv = kv
        self.slots = SlotTable(kv, 2 * self.max_num_seqs + 8, self.max_len)
        self.needs_snapshot = True
        self.is_due = True
        self.is_short = False  # a row waits for blocks
        self.rows: dict[int, Row] = {}  # by handle: those that are planned
        self.prefilling: dict[int, Row] = {}  # ... whose prefill was not reported as done, first come first
        self.handles: set[int] = set()  # what the executor holds after the newest plan
        self.released: list[int] = []  # handles that the next plan releases
        self.new_rows: dict[int, Row] = {}  # not described yet
        self.suspect: Row | None = None  # runs here, and has not shown yet that it is harmless
        self.returning: deque[Returning] = deque()
        self.unacknowledged: deque[SentPlan] = deque()
        self._journal = Journal(self.slots, is_caching=self.is_caching)
        self._ended: list[Row] = []

    @property
    def pool(self) -> tuple[PoolGroup, ...]:
        """The KV groups, as the executor told them."""
        return self._pool

    def hear(self, now_s: float) -> None:
        """It lives."""
        self.heard_s = now_s
        self.num_no_responders = 0

    @property
    def owes(self) -> bool:
        """Whether it has a plan to acknowledge or steps to do."""
        top = self.slots.top
        return bool(self.unacknowledged) or bool((self.slots.position[:top] < self.slots.target[:top]).any())

    @property
    def is_ready(self) -> bool:
        """Whether rows may be placed here: it lives and stays, and holds nothing of an earlier state."""
        if self.is_lost or self.needs_snapshot or self.computing.phase == "draining":
            return False
        return self.acknowledged >= self.snapshot_sequence

    @property
    def has_room(self) -> bool:
        """Whether one more row may run here, as far as their number goes."""
        return len(self.rows) < self.max_num_seqs and self.slots.has_free

    @property
    def backlog(self) -> int:
        """Tokens of prompts that are placed and not computed yet."""
        top = self.slots.top
        return int(np.maximum(self.slots.num_ids[:top] - self.slots.position[:top], 0).sum())

    # -- rows ------------------------------------------------------------------------------------------------

    def place(
        self, row: Row, hit: Hit | None, copies: Iterable[tuple[int, int]], target: int, now_s: float
    ) -> None:
        """Let a row run here with blocks for positions below `target`, sharing those of the hit.

        `copies`: by KV group the block whose content its first own block gets.
        """
        slots = self.slots
        row.place(self.name, now_s)
        slots.take(row, self._handle_source)
        slot = row.slot
        slots.end[slot] = row.end_position
        if hit is not None:
            row.num_cached = hit.num_positions
            slots.position[slot] = slots.target[slot] = hit.num_positions
            slots.num_registered[slot] = hit.num_positions // self.kv.sizes[0]
            for g, blocks in enumerate(hit.blocks):
                self.kv.pools[g].share(blocks)
                slots.num_dropped[g, slot] = hit.first[g]
                slots.put(slot, g, hit.first[g], np.array(blocks, np.int32))
        slots.fit_capacity(slot)
        slots.grow(slot, target)
        for g, source in copies:
            own = slots.tables[g][slot, row.num_cached // self.kv.sizes[g]]
            row.copies.extend((g, source, int(own)))
        if row.request.is_suspect:
            self.suspect = row
        self.rows[row.handle] = self.prefilling[row.handle] = self.new_rows[row.handle] = row
        self.is_due = True

    def note_short(self, is_short: bool) -> None:
        """Whether a row waits for blocks; while one does, none is placed here."""
        self.num_changes += self.is_short and not is_short
        self.is_short = is_short

    def remove(self, row: Row, *, is_finished: bool) -> None:
        """A row leaves. Its blocks are free soon where the executor finished it or was never told of it.

        Otherwise they are free once the executor has taken the next plan, which releases the row.
        """
        handle = row.handle
        if row is self.suspect:
            self.suspect = None
        del self.rows[handle]
        self.slots.stop(row.slot)
        if self.prefilling.pop(handle, None) is not None and row.is_told:
            self._journal.note_prefill({handle: row})
        if not row.is_told:
            self.new_rows.pop(handle, None)
            self._free(row)
            return
        self.released.append(handle)
        if is_finished:
            self._ended.append(row)
        else:
            self.returning.append(Returning(self.sequence + 1, row))
            self.is_due = True

    def _free(self, row: Row) -> None:
        """A row's blocks and slot are free: rows that are short of them can be looked at again."""
        for pool, blocks in zip(self.kv.pools, self.slots.held(row.slot), strict=True):
            pool.release(blocks[::-1])  # the end of a chain is forgotten before its beginning
        self.slots.give_back(row.slot)
        row.slot = -1
        self.is_due |= self.is_short
        self.num_changes += 1

    def forget_rows(self) -> None:
        """Begin anew after all rows were given up: the next plan is an empty snapshot."""
        self._begin(KvPool(self._pool, self._max_step_tokens))

    def row_of(self, handle: int) -> Row | None:
        """The row with this handle, also while its release is under way."""
        slot = self.slots.slot_of(handle)
        return None if slot is None else self.slots.rows[slot]

    @property
    def num_returning_blocks(self) -> list[int]:
        """Blocks, by group, that come back without anybody's doing (as if nobody shared them)."""
        totals = [0] * len(self.kv.pools)
        for row in itertools.chain((entry.row for entry in self.returning), self._ended):
            for g in range(len(totals)):
                totals[g] += int(self.slots.num_entries[g, row.slot] - self.slots.num_dropped[g, row.slot])
        return totals

    # -- reports ---------------------------------------------------------------------------------------------

    def take_report(self, done: StepDone, now_s: float) -> list[Row]:
        """Note how far rows are; those returned have just completed their prefill. Raises `ReportError`."""
        self.num_steps = done.num_steps
        self.num_done += done.plan == self.sequence
        num = len(done.num_made)
        if len(done.handles) != 4 * num or len(done.num_computed) != 4 * num or len(done.ids) % 4:
            raise ReportError("the arrays' lengths differ")
        table = self.slots
        slots, is_whole = table.find(done.handles)
        positions: Ints = np.frombuffer(done.num_computed, "<i4")
        ids: Ints = np.frombuffer(done.ids, "<i4")
        if num and np.frombuffer(done.num_computed, "<u4").max() > self.max_len:
            raise ReportError("a position that no row can have")
        made_slots, made_positions = slots, positions
        if done.num_made != b"\1" * num:
            num_made = np.frombuffer(done.num_made, np.uint8)
            if num_made.max(initial=0) > 1:
                raise ReportError("a row made several ids in a step")
            made_slots, made_positions = slots[num_made > 0], positions[num_made > 0]
        if len(made_slots) != len(ids):
            raise ReportError(f"{len(made_slots)} rows made {len(ids)} ids")
        if not is_whole:  # rows that are not here any more
            positions, slots = positions[slots >= 0], slots[slots >= 0]
            ids, made_positions = ids[made_slots >= 0], made_positions[made_slots >= 0]
            made_slots = made_slots[made_slots >= 0]
        num_tokens = int((positions - table.position[slots]).sum()) if self.prefilling else len(slots)
        self.pace.note(num_tokens, len(slots), done.duration_us / 1e6)
        table.position[slots] = positions
        if len(ids):
            self._journal.note_ids(made_slots, made_positions, ids, now_s)
        if not self.prefilling:
            return []
        self._journal.note_prefill(self.prefilling)
        completed = [row for row in self.prefilling.values() if table.position[row.slot] >= row.num_ids]
        for row in completed:
            del self.prefilling[row.handle]
        return completed

    @property
    def has_unsettled(self) -> bool:
        """Whether `settle` has anything to do."""
        return self._journal.has_entries or bool(self._ended)

    @property
    def has_ended_rows(self) -> bool:
        """Whether `settle` would free blocks."""
        return bool(self._ended)

    def sole_suspect(self, num_harmless: int) -> Request | None:
        """Who alone can be to blame for a death: the suspect, where every other row had got on."""
        suspect = None if self.suspect is None else self.suspect.request
        return suspect if suspect is not None and self.has_got_on(num_harmless, suspect) else None

    def has_got_on(self, num_harmless: int, suspect: Request) -> bool:
        """Whether every row of other requests has made so many ids here."""
        position = self.slots.position
        return all(
            row.request is suspect or position[row.slot] >= row.num_ids + num_harmless - 1
            for row in itertools.chain(self.rows.values(), (entry.row for entry in self.returning))
        )

    def may_start(self, row: Row, num_harmless: int) -> bool:
        """Whether it would be clear which one a death is to be blamed on: beside a suspect none starts that
        may be at fault as well, and a suspect starts beside none that has not got on."""
        request = row.request
        if self.suspect is not None:
            return self.suspect.request is request
        return not request.is_suspect or self.has_got_on(num_harmless, request)

    def clear_suspect(self, num_harmless: int) -> None:
        """A suspect that has made so many ids since it came back is none any more."""
        row = self.suspect
        if row is not None and self.slots.position[row.slot] >= row.num_ids + num_harmless - 1:
            row.request.is_suspect = False
            self.suspect = None
            self.num_changes += 1

    def settle(self) -> dict[int, int]:
        """Do what can wait until a plan was sent: ids, digests, blocks of rows that ended.

        Returns how many ids were made since the last time, by the tenants' numbers.
        """
        self._journal.settle()
        ended, self._ended = self._ended, []
        for row in ended:
            self._journal.complete_ids(row.slot)
            self._free(row)
        for pool in self.kv.pools:
            pool.keep_free(min(len(self.rows), pool.num_blocks // 8))
        return self._journal.take_service()

    def settle_ids(self, row: Row) -> None:
        """Bring one row's ids up to what was reported."""
        self._journal.settle()
        self._journal.complete_ids(row.slot)

    # -- plans -----------------------------------------------------------------------------------------------

    @property
    def num_steps_left(self) -> int:
        """Steps of the newest plan that were not reported yet: how far the executor may be ahead."""
        return max(0, self.num_laid_out - self.num_done)

    def make_plan(self, epoch: int, steps: tuple[Step, ...], now_s: float) -> Plan | None:
        """The next plan with all that changed, or None where nothing would be said."""
        has_news = steps or self.released or self.new_rows or self.needs_snapshot
        if not has_news and self.num_steps_told == self.num_steps:
            return None
        self.sequence += 1
        grants, granted = self.slots.grants.take()
        plan = Plan(
            executor=self.name,
            epoch=epoch,
            sequence=self.sequence,
            num_steps_acknowledged=self.num_steps,
            is_snapshot=self.needs_snapshot,
            released=pack_handles(self.released),
            rows=tuple(row.start_message() for row in self.new_rows.values()),
            grants=grants,
            granted=granted,
            steps=steps,
        )
        if self.needs_snapshot:
            self.snapshot_sequence = self.sequence
            self.handles.clear()
            self.unacknowledged.clear()  # whatever they said is replaced
        self.handles.difference_update(self.released)
        self.handles.update(self.new_rows)
        for row in self.new_rows.values():
            row.is_told = True
        self.needs_snapshot = False
        self.released.clear()
        self.new_rows.clear()
        self.num_steps_told = self.num_steps
        self.num_laid_out = sum(step.num_times for step in steps)
        self.num_done = 0
        self.unacknowledged.append(SentPlan(plan, now_s))
        return plan

    def acknowledge(self, sequence: int) -> None:
        """The executor has taken the plan `sequence` and all before it: what they released is free."""
        if not self.acknowledged < sequence <= self.sequence:
            return
        self.acknowledged = sequence
        self.num_changes += 1
        while self.unacknowledged and self.unacknowledged[0].plan.sequence <= sequence:
            self.unacknowledged.popleft()
        if not self.returning or self.returning[0].sequence > sequence:
            return
        self._journal.settle()
        while self.returning and self.returning[0].sequence <= sequence:
            row = self.returning.popleft().row
            self._journal.complete_ids(row.slot)
            if row.state is RowState.RETURNING:
                row.state = RowState.WAITING if row.ticket else RowState.HELD
            self._free(row)

    def renew_due(self) -> None:
        """After a report, the next plan is due when the lease is half done or nothing of it is left to do."""
        if self.acknowledged != self.sequence or self.is_due:
            return
        is_half_done = self.num_laid_out > 0 and self.num_done >= self.num_laid_out - self.num_laid_out // 2
        if is_half_done:
            self.is_due = True
        elif self.rows or self.num_steps_told < self.num_steps:
            top = self.slots.top
            is_behind = self.slots.position[:top] < self.slots.target[:top]
            self.is_due = not is_behind.any()

    def to_repeat(self, now_s: float, age_s: float = RESEND_INTERVAL_S) -> list[Plan]:
        """Unacknowledged plans that were sent `age_s` ago or earlier, in order; they count as sent now."""
        if not self.unacknowledged or now_s - self.unacknowledged[0].sent_s < age_s:
            return []
        for sent in self.unacknowledged:
            sent.sent_s = now_s
        return [sent.plan for sent in self.unacknowledged]

    def view_differs(self, hello: Hello, handles: Iterable[int]) -> bool:
        """Whether the executor, in our epoch, holds another state than plans and reports can explain."""
        if hello.plan > self.sequence or hello.plan < self.acknowledged_before:
            return True
        if hello.plan < self.sequence or self.unacknowledged:
            return False  # plans are under way, or this Hello is late
        return hello.has_gap or set(handles) != self.handles
