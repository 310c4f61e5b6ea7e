"""The executor's side of plans: which rows it holds, which steps it may still launch, what it has to report.

A pure state machine: plans, outputs and durations in, row inputs and messages out. Knows no clock, no thread,
no bus and no tensors.
"""

import enum
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from pagebus.bus.messages import DecodeError, Grant, Plan, PoolGroup, StepDone, pack_handles
from pagebus.executor.batch import BlockCopy, RowOutput
from pagebus.executor.launched import LaunchedStep, crash, land
from pagebus.executor.parsed import ParsedChunk, ParsedStart, ParsedStep, joined_chunks, parse
from pagebus.executor.reports import Report, RowFailure, RowResult, make_report
from pagebus.executor.rows import Row, flaw_of


class Outcome(enum.Enum):
    """What became of a plan. After a gap, a stale or an invalid plan the scheduler needs a `Hello`."""

    TAKEN = "taken"
    DUPLICATE = "duplicate"  # known already: acknowledge it again
    STALE = "stale"  # of a lower epoch than one heard, or for another executor
    GAP = "gap"  # a plan before it is missing
    INVALID = "invalid"  # malformed: nothing of it was applied


class View(NamedTuple):
    """What a `Hello` says of the state, and whose requesters are to be probed."""

    epoch: int
    plan: int
    num_steps: int
    handles: bytes
    has_gap: bool
    lives: frozenset[str]
    num_live: int = 0  # rows that are not over


class PlanState:
    """Rows by handle and the lease. Not thread-safe: whoever runs the steps owns it.

    `max_in_flight` steps are in flight at most (1 or 2): `next_step`, then `complete` or `fail_step` of the
    oldest. Plans may be taken in between; rows that they drop are still reported with the steps that were
    launched with them. A snapshot and a new epoch, which may hand out every block anew, are taken only while
    nothing is in flight, unless one step at a time is enough.
    """

    def __init__(
        self, executor: str, pool: Sequence[PoolGroup], max_model_len: int, *, max_in_flight: int = 1
    ) -> None:
        self._executor = executor
        self._pool = tuple(pool)
        self._block_size = pool[0].block_size
        self._max_model_len = max_model_len
        self._epoch = 0
        self._heard_epoch = 0
        self._plan = 0
        self._num_steps = 0
        self._rows: dict[int, Row] = {}
        self._lease: deque[ParsedStep] = deque()
        self._prompts: dict[int, ParsedChunk] = {}  # all that the lease brings of a row, by handle
        self._copies: list[BlockCopy] = []  # before the next step
        self._in_flight: deque[LaunchedStep] = deque()
        self._max_in_flight = max_in_flight
        self._failures: list[RowFailure] = []
        self._misses_plan = False  # until any plan is taken
        self._needs_snapshot = False  # until a snapshot is taken

    # -- what others ask ---------------------------------------------------------------------------------

    @property
    def view(self) -> View:
        """The state as a `Hello` tells it. A higher epoch that was only heard shows as that epoch, plan 0."""
        is_behind = self._heard_epoch > self._epoch
        return View(
            epoch=self._heard_epoch,
            plan=0 if is_behind else self._plan,
            num_steps=0 if is_behind else self._num_steps,
            handles=pack_handles(sorted(self._rows)),
            has_gap=is_behind or self._misses_plan or self._needs_snapshot,
            lives=frozenset(row.start.life for row in self._rows.values() if row.start.life),
            num_live=sum(not row.is_over for row in self._rows.values()),
        )

    @property
    def has_gap(self) -> bool:
        """Whether the scheduler must be asked for a plan or a snapshot."""
        return self._heard_epoch > self._epoch or self._misses_plan or self._needs_snapshot

    @property
    def live_choices(self) -> list[tuple[str, int]]:
        """(request id, choice) of each row that is not over; by the rules of plans no two are the same."""
        return [(row.start.request_id, row.start.choice) for row in self._rows.values() if not row.is_over]

    @property
    def live_rows(self) -> list[Row]:
        """Rows that are not over, to be looked at only."""
        return [row for row in self._rows.values() if not row.is_over]

    @property
    def num_steps_left(self) -> int:
        """Steps of the lease that are not launched yet."""
        return len(self._lease)

    @property
    def num_in_flight(self) -> int:
        """Steps that were launched and neither completed nor failed."""
        return len(self._in_flight)

    @property
    def oldest_in_flight(self) -> LaunchedStep | None:
        """The one to be completed next."""
        return self._in_flight[0] if self._in_flight else None

    def needs_quiet(self, plan: Plan) -> bool:
        """Whether a plan is to be taken only while nothing is in flight: it may hand out blocks anew."""
        return plan.is_snapshot or plan.epoch != self._epoch

    def acknowledgement(self) -> StepDone:
        """A bare one, for a plan that no step will acknowledge soon.

        Not while a step is in flight that was launched before the plan: rows that it released are in there.
        """
        return StepDone(
            executor=self._executor, epoch=self._epoch, plan=self._plan, num_steps=self._num_steps
        )

    # -- plans -------------------------------------------------------------------------------------------

    def hear(self, epoch: int) -> bool:
        """Note a leader's epoch; True when it is higher than any heard before."""
        if epoch <= self._heard_epoch:
            return False
        self._heard_epoch = epoch
        return True

    def take_plan(self, plan: Plan) -> Outcome:
        """Apply a plan as the docstring of `Plan` says, or say why not; nothing is applied then."""
        if plan.epoch < max(self._heard_epoch, 1) or plan.executor != self._executor:
            return Outcome.STALE
        self.hear(plan.epoch)
        is_new_epoch = plan.epoch > self._epoch
        if not is_new_epoch and plan.sequence <= self._plan:
            return Outcome.DUPLICATE
        if not plan.is_snapshot and (is_new_epoch or plan.sequence != self._plan + 1):
            self._misses_plan = True
            return Outcome.GAP
        try:
            parsed = parse(plan)
        except DecodeError:
            self._needs_snapshot = True
            return Outcome.INVALID
        if is_new_epoch:
            self._enter_epoch(plan.epoch)
        self._plan = plan.sequence
        self._misses_plan = False
        if plan.is_snapshot:
            self._needs_snapshot = False
            named = {start.handle for start in plan.rows}
            self._rows = {handle: row for handle, row in self._rows.items() if handle in named}
        for handle in parsed.released:
            self._rows.pop(handle, None)
        new = [row for start in parsed.starts if (row := self._add_row(start)) is not None]
        for grant in parsed.grants:
            self._apply_grant(grant)
        for added, copies in new:
            self._add_copies(added, copies)
        for step in parsed.steps:
            self._check_chunks(step)
        self._lease = deque(parsed.steps)
        self._prompts = joined_chunks(parsed.steps)
        return Outcome.TAKEN

    def _enter_epoch(self, epoch: int) -> None:
        # A handle of another epoch names another row, and a new leader does not know which ids were made
        # since: nothing is carried over, requesters ask the new leader again.
        self._epoch = epoch
        self._plan = 0
        self._num_steps = 0
        self._rows = {}
        self._copies = []
        self._failures = []

    def _add_row(self, parsed: ParsedStart) -> tuple[Row, tuple[BlockCopy, ...]] | None:
        handle = parsed.start.handle
        if handle in self._rows:
            return None
        row = Row(parsed, num_groups=len(self._pool), block_size=self._block_size)
        self._rows[handle] = row
        flaw = flaw_of(parsed, self._max_model_len)
        if flaw is not None:
            self._fail(row, f"the row cannot start: {flaw}")
        return row, parsed.copies

    def _add_copies(self, row: Row, copies: tuple[BlockCopy, ...]) -> None:
        """Blocks are copied before the next step: whatever is written later comes after them."""
        for copy in copies:
            is_inside = 0 <= copy.group < len(self._pool)
            if not is_inside or not 0 <= copy.source < self._pool[copy.group].num_blocks:
                self._fail(row, f"block {copy.source} of group {copy.group} cannot be copied")
            elif copy.target < 0 or copy.target not in row.tables[copy.group]:
                self._fail(row, f"a copy goes to block {copy.target}, which is not the row's")
        if not row.is_over:
            self._copies.extend(copies)

    def _apply_grant(self, grant: Grant) -> None:
        row = self._rows.get(grant.handle)
        if row is None or row.is_over:
            return
        num_groups, offset, blocks = len(self._pool), grant.offset, grant.blocks
        max_entries = -(-self._max_model_len // self._block_size)
        if not 0 <= grant.group < num_groups:
            self._fail(row, f"a grant names group {grant.group} of {num_groups}")
        elif offset < 0 or offset + len(blocks) > max_entries:
            self._fail(row, f"a grant of {len(blocks)} blocks at {offset}; a table has {max_entries}")
        elif blocks and not (min(blocks) >= -1 and max(blocks) < self._pool[grant.group].num_blocks):
            self._fail(row, f"a granted block is outside the pool of {self._pool[grant.group].num_blocks}")
        else:
            flaw = row.grant(grant.group, offset, blocks)
            if flaw is not None:
                self._fail(row, flaw)

    def _check_chunks(self, step: ParsedStep) -> None:
        for chunk in step.chunks:
            row = self._rows.get(chunk.handle)
            if row is None or row.is_over:
                continue
            start, end, num_ids = chunk.start, chunk.end, row.start.num_ids
            if not 0 <= start < end <= num_ids or len(chunk.ids) != end - start:
                self._fail(row, f"a chunk [{start}, {end}) with {len(chunk.ids)} ids; the row has {num_ids}")

    # -- steps -------------------------------------------------------------------------------------------

    def next_step(self) -> LaunchedStep | None:
        """The next step of the lease with what its rows compute, or None when nothing can be launched now.

        Steps in which every row is skipped are dropped. After a step whose ids the host must know before
        the next one (penalties, a grammar), nothing is launched until it is collected. Raises `RuntimeError`
        while as many steps as may be are in flight.
        """
        if len(self._in_flight) >= self._max_in_flight:
            raise RuntimeError(f"{len(self._in_flight)} steps are in flight already")
        if self._in_flight and self._in_flight[-1].makes_history:
            return None
        while self._lease:
            step = self._lease.popleft()
            launched = LaunchedStep(self._epoch, self._plan, [], [], [])
            self._fill(launched, step)
            if launched.rows:
                launched.copies, self._copies = self._copies, []
                self._in_flight.append(launched)
                return launched
        return None

    def _fill(self, launched: LaunchedStep, step: ParsedStep) -> None:
        """Put the rows of `step` that can run into `launched`, each once, prefill first."""
        taken: set[int] = set()
        for chunk in step.chunks:
            row = self._rows.get(chunk.handle)
            if row is None or row.is_over or chunk.handle in taken:
                continue
            if chunk.start > row.next_position:
                self._needs_snapshot = True
                continue
            row_input = row.prefill_input(chunk, self._prompts[chunk.handle])
            if row_input is not None:
                taken.add(chunk.handle)
                launched.add(row, row_input)
        for handle in step.decode:
            row = self._rows.get(handle)
            if row is None or handle in taken:
                continue
            row_input = row.decode_input()
            if row_input is not None:
                taken.add(handle)
                launched.add(row, row_input)

    def complete(self, step: LaunchedStep, outputs: Sequence[RowOutput], duration_s: float) -> Report | None:
        """The oldest step in flight made `outputs` (one a row): what to send.

        None where nothing is left to say: a step of a former epoch, or all its rows ended meanwhile. Raises
        `ValueError` where there is not one output a row; the step is still in flight then.
        """
        if len(outputs) != len(step.rows):
            raise ValueError(f"{len(outputs)} outputs for {len(step.rows)} rows")
        if not self._take_off(step):
            return None
        landed = land(step, outputs)
        return self._report(step.plan, landed.results, landed.failures, duration_s)

    def fail_step(self, step: LaunchedStep, message: str, duration_s: float) -> Report | None:
        """The oldest step in flight raised: its rows fail, to be asked for again. None as in `complete`."""
        if not self._take_off(step):
            return None
        return self._report(step.plan, [], crash(step, message).failures, duration_s)

    def _take_off(self, step: LaunchedStep) -> bool:
        """The step is in flight no more; whether it is of this epoch."""
        if not self._in_flight or step is not self._in_flight[0]:
            raise RuntimeError("this is not the oldest step in flight")
        self._in_flight.popleft()
        return step.epoch == self._epoch

    # -- rows that end outside a step --------------------------------------------------------------------

    def end_requesters(self, lives: frozenset[str]) -> None:
        """Nobody listens on these life subjects any more: their rows end."""
        for row in self._rows.values():
            if row.start.life in lives and not row.is_over:
                row.error = "nobody listens"
                self._failures.append(RowFailure(row, "nobody listens", "nobody_listens", is_retryable=True))

    def hand_over(self) -> None:
        """This executor stops: what is not over goes on elsewhere."""
        self._lease.clear()
        for row in self._rows.values():
            if not row.is_over:
                row.error = "the executor is stopping"
                self._failures.append(RowFailure(row, row.error, "executor_draining", is_retryable=True))

    def _fail(self, row: Row, message: str) -> None:
        if not row.is_over:
            row.error = message
            self._failures.append(RowFailure(row, message, "row_failed", is_retryable=False))

    def report_failures(self) -> Report | None:
        """Rows that ended outside a step, as a step of their own: so it is repeated until acknowledged.

        It says no more of plans than the steps in flight will: rows that later plans released may be there.
        """
        if not self._failures:
            return None
        failures, self._failures = self._failures, []
        return self._report(self._reported_plan, [], failures, 0.0)

    @property
    def _reported_plan(self) -> int:
        return next((step.plan for step in self._in_flight if step.epoch == self._epoch), self._plan)

    def _report(
        self, plan: int, results: list[RowResult], failures: list[RowFailure], duration_s: float
    ) -> Report | None:
        if not results and not failures:
            return None
        self._num_steps += 1
        return make_report(
            executor=self._executor,
            epoch=self._epoch,
            plan=plan,
            num_steps=self._num_steps,
            results=results,
            failures=failures,
            duration_s=duration_s,
        )
