"""One executor as the scheduler sees it: rows, blocks, plans under way, reports. Chooses nothing itself."""

from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pagebus.bus.messages import Grant, Hello, Plan, Step, pack_grants, pack_handles
from pagebus.scheduler.blocks import KvPool
from pagebus.scheduler.requests import Row, RowState

RESEND_INTERVAL_S = 0.2
MAX_UNACKNOWLEDGED = 8
"""Plans under way after which new ones wait: a deaf executor must not fill the scheduler's memory."""


@dataclass(slots=True)
class SentPlan:
    """A plan that the executor has not acknowledged."""

    plan: Plan
    sent_s: float


class Returning(NamedTuple):
    """Blocks (by group) of a row that left; free once the executor has taken the plan `sequence`."""

    sequence: int
    row: Row
    handle: int
    held: list[list[int]]


@dataclass(slots=True, eq=False)
class ExecutorState:
    """State of one executor within an epoch."""

    name: str
    kv: KvPool
    max_num_seqs: int
    max_len: int  # longest sequence in tokens: the model's, the setting's, the pool's
    full_len: int  # the same without the pool's limit
    heard_s: float
    sequence: int = 0  # of the newest plan
    acknowledged: int = 0  # newest plan that the executor took
    acknowledged_before: int = 0  # the same as it was a second or more ago
    acknowledged_at_upkeep: int = 0  # ... and at the last upkeep
    snapshot_sequence: int = 0
    num_steps: int = 0  # StepDones processed, in order
    num_steps_told: int = 0  # ... as the newest plan says
    is_lost: bool = False
    needs_snapshot: bool = True
    is_due: bool = True
    is_short: bool = False  # a row waits for blocks
    rows: dict[int, Row] = field(default_factory=dict)  # by handle
    handles: set[int] = field(default_factory=set)  # what the executor holds after the newest plan
    released: list[int] = field(default_factory=list)  # handles that the next plan releases
    new_rows: dict[int, Row] = field(default_factory=dict)  # not described yet
    grown: dict[int, Row] = field(default_factory=dict)  # with entries not told yet
    returning: deque[Returning] = field(default_factory=deque)
    unacknowledged: deque[SentPlan] = field(default_factory=deque)
    num_laid_out: int = 0  # steps of the newest plan
    num_done: int = 0  # ... that were reported
    num_behind: int = 0  # rows that have not reached what the newest plan brings them to
    repeated_s: float = 0.0

    @property
    def is_ready(self) -> bool:
        """Whether rows may be placed here: it lives, and holds nothing of an earlier state."""
        return not self.is_lost and not self.needs_snapshot and self.acknowledged >= self.snapshot_sequence

    # -- rows ------------------------------------------------------------------------------------------------

    def place(self, row: Row, handle: int) -> None:
        """Let a row run here; it has no blocks yet."""
        row.place(self.name, handle, len(self.kv.groups))
        self.rows[handle] = row
        self.new_rows[handle] = row
        self.is_due = True

    def grow(self, row: Row, target: int) -> None:
        """Give a row blocks for positions below `target`, or as many as are free."""
        if self.kv.grow(row.tables, target):
            self.grown[row.handle] = row

    def remove(self, row: Row, *, is_finished: bool) -> None:
        """A row leaves. Its blocks are free at once where the executor finished it or was never told of it.

        Otherwise they are free once the executor has taken the next plan, which releases the row.
        """
        handle = row.handle
        del self.rows[handle]
        self.grown.pop(handle, None)
        if row.position < row.target:
            self.num_behind -= 1
        held = row.tables.held()
        if not row.is_told:
            self.new_rows.pop(handle, None)
            self.free(held)
            return
        self.released.append(handle)
        if is_finished:
            self.free(held)
        else:
            self.returning.append(Returning(self.sequence + 1, row, handle, held))
            self.is_due = True

    def forget_rows(self) -> None:
        """Begin anew after all rows were given up: the next plan is an empty snapshot."""
        self.kv = KvPool(self.kv.groups, self.kv.max_step_tokens)
        self.rows.clear()
        self.new_rows.clear()
        self.grown.clear()
        self.released.clear()
        self.returning.clear()
        self.unacknowledged.clear()
        self.is_short = False
        self.needs_snapshot = True
        self.is_due = True

    def free(self, held: Sequence[Sequence[int]]) -> None:
        """Blocks went back: rows that are short of them can be looked at again."""
        self.kv.release(held)
        self.is_due |= self.is_short

    def row_of(self, handle: int) -> Row | None:
        """The row with this handle, also while its release is under way."""
        row = self.rows.get(handle)
        if row is None:
            row = next((entry.row for entry in self.returning if entry.handle == handle), None)
        return row

    @property
    def num_returning_blocks(self) -> list[int]:
        """Blocks, by group, that come back without anybody's doing."""
        totals = [0] * len(self.kv.groups)
        for entry in self.returning:
            for g, blocks in enumerate(entry.held):
                totals[g] += len(blocks)
        return totals

    # -- plans -----------------------------------------------------------------------------------------------

    @property
    def num_steps_left(self) -> int:
        """Steps of the newest plan that were not reported yet: how far the executor may be ahead."""
        return max(0, self.num_laid_out - self.num_done)

    def make_plan(self, epoch: int, steps: tuple[Step, ...], now_s: float) -> Plan | None:
        """The next plan with all that changed, or None where nothing would be said."""
        self.num_behind = sum(row.position < row.target for row in self.rows.values())
        has_news = steps or self.released or self.new_rows or self.needs_snapshot
        if not has_news and self.num_steps_told == self.num_steps:
            return None
        self.sequence += 1
        grants, granted = pack_grants(self._grants())
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
        self.num_laid_out = len(steps)
        self.num_done = 0
        self.unacknowledged.append(SentPlan(plan, now_s))
        return plan

    def _grants(self) -> list[Grant]:
        grants = []
        for handle, row in self.grown.items():
            tables = row.tables
            for g, blocks in enumerate(tables.blocks):
                told = max(tables.num_told[g], tables.num_dropped[g])
                if told < len(blocks):
                    tables.num_told[g] = len(blocks)
                    grants.append(Grant(handle, g, told, blocks[told:]))
        self.grown.clear()
        return grants

    def acknowledge(self, sequence: int) -> None:
        """The executor has taken the plan `sequence` and all before it: what they released is free."""
        if not self.acknowledged < sequence <= self.sequence:
            return
        self.acknowledged = sequence
        while self.unacknowledged and self.unacknowledged[0].plan.sequence <= sequence:
            self.unacknowledged.popleft()
        while self.returning and self.returning[0].sequence <= sequence:
            entry = self.returning.popleft()
            if entry.row.state is RowState.RETURNING:
                entry.row.state = RowState.WAITING
            self.free(entry.held)

    def renew_due(self) -> None:
        """After a report, the next plan is due when the lease is half done or nothing of it is left to do."""
        is_half_done = self.num_laid_out > 0 and self.num_done >= self.num_laid_out - self.num_laid_out // 2
        is_spent = self.num_behind <= 0 and (bool(self.rows) or self.num_steps_told < self.num_steps)
        if self.acknowledged == self.sequence and (is_half_done or is_spent):
            self.is_due = True

    def to_repeat(self, now_s: float, age_s: float = RESEND_INTERVAL_S) -> list[Plan]:
        """Unacknowledged plans that were sent `age_s` ago or earlier, in order; they count as sent now."""
        if not self.unacknowledged or now_s - self.unacknowledged[0].sent_s < age_s:
            return []
        for sent in self.unacknowledged:
            sent.sent_s = now_s
        return [sent.plan for sent in self.unacknowledged]

    def view_differs(self, hello: Hello, handles: "array[int]") -> bool:
        """Whether the executor, in our epoch, holds another state than plans and reports can explain."""
        if hello.plan > self.sequence or hello.plan < self.acknowledged_before:
            return True
        if hello.plan < self.sequence or self.unacknowledged:
            return False  # plans are under way, or this Hello is late
        return hello.has_gap or set(handles) != self.handles
