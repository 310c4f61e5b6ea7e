"""An imaginary executor: does what plans say to counters instead of tensors, and reports it. Knows no time.

It follows the contract of `Plan` for one KV group with full attention. Ids are made up; a row ends
with "stop" when it has made as many as its request is known, here alone, to make.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pagebus.bus.messages import Chunk, Plan, RowStart, StepDone, unpack_grants, unpack_handles, unpack_ids

Handles = npt.NDArray[np.int64]
NO_HANDLES: Handles = np.zeros(0, np.int64)


class PlanError(RuntimeError):
    """A plan that an executor could not carry out: a fault of the scheduler."""


@dataclass(slots=True)
class _Lease:
    """One entry of a lease, to be done `num_times` more times."""

    chunks: tuple[Chunk, ...]
    decode: Handles
    num_times: int


@dataclass(slots=True)
class LaunchedStep:
    """A step being computed: who prefills up to where, who decodes, and what that reads and computes."""

    plan: int
    ends: dict[int, int]  # by handle: the position that its chunk brings it to
    decode: Handles
    num_tokens: int
    num_kv_tokens: int

    @property
    def num_rows(self) -> int:
        """Rows in the step."""
        return len(self.ends) + len(self.decode)


class ImaginaryExecutor:
    """Rows and blocks by handle. `end_position(request id, choice)`: positions that a row writes in all."""

    def __init__(
        self, name: str, num_blocks: int, block_size: int, end_position: Callable[[str, int], int]
    ) -> None:
        self.name = name
        self.block_size = block_size
        self._end_position = end_position
        self.epoch = 0
        self.plan = 0
        self.num_steps = 0
        self.num_restarts = 0  # rows that began with generated ids: preempted ones
        self._lease: deque[_Lease] = deque()
        self.starts: dict[int, RowStart] = {}  # by handle, until `forget`, as are tables
        self._tables: dict[int, list[int]] = {}
        self._held: set[int] = set()  # not released by a plan
        self.leaving: deque[tuple[int, int]] = deque()  # plan that released it, handle: rows cut short
        self.uses = np.zeros(num_blocks, np.int32)  # tables that name a block
        self.num_row_blocks = 0  # entries of all tables
        self._running: Handles | None = NO_HANDLES
        self._is_running = np.zeros(0, np.bool_)  # by handle, as are the others
        self._position = np.zeros(0, np.int64)
        self._num_ids = np.zeros(0, np.int64)
        self._end = np.zeros(0, np.int64)
        self._capacity = np.zeros(0, np.int64)

    # -- state -----------------------------------------------------------------------------------------------

    @property
    def handles(self) -> list[int]:
        """The rows held, ascending."""
        return sorted(self._held)

    @property
    def running(self) -> Handles:
        """The rows that are not over."""
        if self._running is None:
            self._running = np.flatnonzero(self._is_running)
        return self._running

    def positions(self) -> tuple[Handles, Handles, Handles]:
        """Of the running rows: positions written, ids to prefill, positions that tables have slots for."""
        rows = self.running
        return self._position[rows], self._num_ids[rows], self._capacity[rows]

    # -- plans -----------------------------------------------------------------------------------------------

    def take(self, plan: Plan) -> bool:
        """Apply a plan; False for one that was taken before. Raises `PlanError` for one that is no use."""
        if plan.epoch == self.epoch and plan.sequence <= self.plan:
            return False
        if plan.epoch == self.epoch and plan.sequence != self.plan + 1 and not plan.is_snapshot:
            raise PlanError(f"plan {plan.sequence} came after plan {self.plan}")
        self.epoch, self.plan = plan.epoch, plan.sequence
        released = list(unpack_handles(plan.released))
        if plan.is_snapshot:
            named = {start.handle for start in plan.rows}
            released += self._held - named
        for handle in released:
            if handle not in self._held:
                raise PlanError(f"row {handle} is released and not held")
            self._held.remove(handle)
            if self._is_running[handle]:
                self._stop(handle)
                self.leaving.append((plan.sequence, handle))
        for start in plan.rows:
            if start.handle not in self._held:
                self._start(start)
        for grant in unpack_grants(plan):
            # What ended since the plan was made is skipped: the scheduler has those blocks back already.
            if grant.handle in self.starts and self._is_running[grant.handle]:
                self._grant(grant.handle, grant.offset, list(grant.blocks))
        for start in plan.rows:
            targets = unpack_ids(start.copies)[2::3]
            if not set(targets) <= set(self._tables[start.handle]):
                raise PlanError(f"a copy goes to a block that row {start.handle} does not have")
        self._lease = deque(
            _Lease(step.chunks, np.frombuffer(step.decode, "<u4").astype(np.int64), step.num_times)
            for step in plan.steps
        )
        return True

    def _start(self, start: RowStart) -> None:
        handle = start.handle
        self._make_space(handle + 1)
        self.starts[handle] = start
        self._tables[handle] = []
        self._held.add(handle)
        self._is_running[handle] = True
        self._running = None
        self._position[handle] = start.num_cached
        self._num_ids[handle] = start.num_ids
        self._end[handle] = self._end_position(start.request_id, start.choice)
        self._capacity[handle] = 0
        self.num_restarts += start.num_generated > 0

    def _make_space(self, num_handles: int) -> None:
        num_more = max(1024, num_handles - len(self._position))
        if num_handles > len(self._position):
            self._is_running = np.append(self._is_running, np.zeros(num_more, np.bool_))
            more = np.zeros(num_more, np.int64)
            self._position = np.append(self._position, more)
            self._num_ids = np.append(self._num_ids, more)
            self._end = np.append(self._end, more)
            self._capacity = np.append(self._capacity, more)

    def _stop(self, handle: int) -> None:
        self._is_running[handle] = False
        self._running = None

    def _grant(self, handle: int, offset: int, blocks: list[int]) -> None:
        table = self._tables[handle]
        if offset > len(table):
            raise PlanError(
                f"row {handle} has {len(table)} blocks and is granted some from entry {offset} on"
            )
        old = table[offset : offset + len(blocks)]
        if old != blocks[: len(old)]:
            raise PlanError(f"row {handle} is to use other blocks than it has")
        new = blocks[len(old) :]
        table += new
        self.uses[new] += 1
        self.num_row_blocks += len(new)
        self._capacity[handle] = len(table) * self.block_size

    def forget(self, handle: int) -> None:
        """The scheduler knows that this row is over: its blocks are free."""
        del self.starts[handle]
        table = self._tables.pop(handle)
        self.uses[table] -= 1
        self.num_row_blocks -= len(table)

    # -- steps -----------------------------------------------------------------------------------------------

    def next_step(self) -> LaunchedStep | None:
        """The next step in which any row can run, or None."""
        while self._lease:
            lease = self._lease[0]
            lease.num_times -= 1
            if lease.num_times == 0:
                self._lease.popleft()
            step = self._launch(lease)
            if step.num_rows:
                return step
        return None

    def _launch(self, lease: _Lease) -> LaunchedStep:
        decode = lease.decode
        position = self._position[decode]
        can_run = (position >= self._num_ids[decode]) & (position < self._capacity[decode])
        can_run &= (position < self._end[decode]) & self._is_running[decode]
        decode = decode[can_run]
        num_tokens, num_kv_tokens = len(decode), int(position[can_run].sum()) + len(decode)
        ends: dict[int, int] = {}
        for chunk in lease.chunks:
            handle = chunk.handle
            if not self._is_running[handle]:
                continue
            start = int(self._position[handle])
            if chunk.start > start:
                raise PlanError(f"row {handle} is at {start}; its chunk starts at {chunk.start}")
            if start < chunk.end <= self._capacity[handle]:
                ends[handle] = chunk.end
                num_tokens += chunk.end - start
                num_kv_tokens += chunk.end
        return LaunchedStep(self.plan, ends, decode, num_tokens, num_kv_tokens)

    def complete(self, step: LaunchedStep, duration_s: float) -> StepDone:
        """The step is done: what to report. Rows that a plan released meanwhile are still in the report."""
        self._position[step.decode] += 1
        prefilled = np.fromiter(step.ends, np.int64, len(step.ends))
        self._position[prefilled] = np.fromiter(step.ends.values(), np.int64, len(step.ends))
        handles = np.concatenate((prefilled, step.decode))
        position = self._position[handles]
        num_made = (position >= self._num_ids[handles]).astype(np.uint8)
        is_over = (position >= self._end[handles]) & (num_made > 0)
        finished = handles[is_over].tolist()
        for handle in finished:
            if self._is_running[handle]:
                self._stop(handle)
        self.num_steps += 1
        return StepDone(
            executor=self.name,
            epoch=self.epoch,
            plan=step.plan,
            num_steps=self.num_steps,
            handles=handles.astype("<u4").tobytes(),
            num_computed=position.astype("<u4").tobytes(),
            num_made=num_made.tobytes(),
            ids=(handles[num_made > 0] & 0xFFFF).astype("<i4").tobytes(),
            finished=dict.fromkeys(finished, "stop"),
            duration_us=max(1, round(duration_s * 1e6)),
        )

    def acknowledgement(self) -> StepDone:
        """A bare one, for a plan that no step will acknowledge soon."""
        return StepDone(executor=self.name, epoch=self.epoch, plan=self.plan, num_steps=self.num_steps)
