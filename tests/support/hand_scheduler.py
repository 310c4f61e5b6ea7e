"""A scheduler written by hand for tests of the executor: few rows, no policy, every rule of plans kept."""

from array import array
from dataclasses import dataclass, field

from pagebus.bus.messages import (
    Chunk,
    Grant,
    Hello,
    Plan,
    RowStart,
    Sampling,
    Step,
    StepDone,
    pack_grants,
    pack_handles,
    pack_ids,
    unpack_handles,
    unpack_ids,
)

BLOCK = 16
GREEDY = Sampling(temperature=0.0)


@dataclass
class HandRow:
    """What this scheduler knows of a row; the executor may be ahead."""

    start: RowStart
    ids: list[int]  # prompt and received ids
    tables: list[list[int]]
    computed: int = 0
    made: list[int] = field(default_factory=list)
    num_granted: int = 0  # entries that some plan carried
    is_announced: bool = False
    is_over: bool = False
    error: str = ""


@dataclass
class Preempted:
    """A row to be admitted again once the plan that released it is settled."""

    row: HandRow
    released_by: int


class HandScheduler:
    """Lays out `horizon` steps for all its rows in each plan; hands out no block still being written."""

    def __init__(
        self,
        executor: str,
        *,
        epoch: int = 1,
        num_blocks: int = 64,
        num_groups: int = 1,
        horizon: int = 4,
        chunk_size: int = 24,
    ) -> None:
        self.executor = executor
        self.epoch = epoch
        self.num_blocks = num_blocks
        self.horizon = horizon
        self.chunk_size = chunk_size
        self.sequence = 0
        self.num_steps = 0
        self.rows: dict[int, HandRow] = {}
        self.free = [list(range(num_blocks)) for _ in range(num_groups)]
        self.handle_of: dict[tuple[str, int], int] = {}  # (request, choice) -> newest handle
        self._next_handle = 1
        self._released: list[int] = []
        self._retired: list[tuple[int, list[list[int]]]] = []  # freed when this plan is acknowledged
        self._preempted: list[Preempted] = []

    def add(
        self,
        request_id: str,
        prompt: list[int],
        *,
        max_tokens: int,
        received: tuple[int, ...] | list[int] = (),
        choice: int = 0,
        attempt: int = 1,
        min_tokens: int = 0,
        stop: tuple[int, ...] = (),
        sampling: Sampling = GREEDY,
        reply: str = "pagebus.out.r",
        life: str = "",
    ) -> int:
        """A new row; its handle."""
        handle = self._next_handle
        self._next_handle += 1
        ids = [*prompt, *received]
        self.rows[handle] = HandRow(
            start=RowStart(
                handle=handle,
                request_id=request_id,
                attempt=attempt,
                choice=choice,
                reply=reply,
                life=life,
                sampling=sampling,
                stop_token_ids=pack_ids(stop),
                num_ids=len(ids),
                num_generated=len(received),
                max_tokens=max_tokens,
                min_tokens=min_tokens,
                all_ids=pack_ids(ids) if sampling.needs_history else b"",
            ),
            ids=ids,
            tables=[[] for _ in self.free],
        )
        self.handle_of[request_id, choice] = handle
        return handle

    def release(self, handle: int) -> HandRow:
        """Drop a row with the next plan; its blocks come back once that is acknowledged (or it was over)."""
        row = self.rows.pop(handle)
        if row.is_announced:
            self._released.append(handle)
        if row.is_over or not row.is_announced:
            self._give_back(row.tables)
        else:
            self._retired.append((self.sequence + 1, row.tables))
        return row

    def preempt(self, handle: int) -> None:
        """Release a row, and admit it again with a new handle and the ids that it made."""
        row = self.release(handle)
        released_by = self.sequence + 1 if row.is_announced else 0
        self._preempted.append(Preempted(row, released_by))
        if not row.is_announced:
            self._readmit()

    def plan(self, *, is_snapshot: bool = False) -> Plan:
        """The next plan; the first one is a snapshot."""
        self.sequence += 1
        is_snapshot = is_snapshot or self.sequence == 1
        for handle in [handle for handle, row in self.rows.items() if row.is_over]:
            row = self.rows.pop(handle)
            self._released.append(handle)
            self._give_back(row.tables)
        layouts = [self._lay_out(handle, row) for handle, row in self.rows.items()]
        steps = []
        for index in range(self.horizon):
            parts = [layout[index] for layout in layouts if index < len(layout)]
            chunks = tuple(part for part in parts if isinstance(part, Chunk))
            decode = pack_handles(part for part in parts if isinstance(part, int))
            steps.append(Step(chunks=chunks, decode=decode))
        grants, starts = [], []
        for handle, row in self.rows.items():
            if is_snapshot or not row.is_announced:
                starts.append(row.start)
            first = 0 if is_snapshot else row.num_granted
            for group, table in enumerate(row.tables):
                if first < len(table):
                    grants.append(Grant(handle, group, first, array("i", table[first:])))
            row.num_granted = len(row.tables[0])
            row.is_announced = True
        released, self._released = self._released, []
        packed, granted = pack_grants(grants)
        return Plan(
            executor=self.executor,
            epoch=self.epoch,
            sequence=self.sequence,
            num_steps_acknowledged=self.num_steps,
            is_snapshot=is_snapshot,
            released=pack_handles(released),
            rows=tuple(starts),
            grants=packed,
            granted=granted,
            steps=tuple(step for step in steps if step.chunks or step.decode),
        )

    def take_done(self, done: StepDone) -> bool:
        """Learn from a step, once and in order; True if it was the next one."""
        if done.epoch != self.epoch:
            return False
        is_next = bool(done.handles) and done.num_steps == self.num_steps + 1
        if is_next:
            self.num_steps += 1
            self._learn(done)
        if self.num_steps >= done.num_steps:
            settled = [p for p in self._preempted if p.released_by <= done.plan]
            if settled:
                self._readmit(done.plan)
        for sequence, tables in [entry for entry in self._retired if entry[0] <= done.plan]:
            self._retired.remove((sequence, tables))
            self._give_back(tables)
        return is_next

    def needs_snapshot(self, hello: Hello) -> bool:
        """Whether what the executor says of itself asks for a snapshot."""
        return hello.epoch < self.epoch or hello.has_gap or hello.plan == 0

    @property
    def num_free(self) -> int:
        """Free blocks of the first group, those not acknowledged yet left out."""
        return len(self.free[0])

    def _learn(self, done: StepDone) -> None:
        ids = iter(unpack_ids(done.ids))
        entries = zip(
            unpack_handles(done.handles), unpack_handles(done.num_computed), done.num_made, strict=True
        )
        waiting = {preempted.row.start.handle: preempted.row for preempted in self._preempted}
        for handle, computed, num_made in entries:
            made = [next(ids) for _ in range(num_made)]
            row = self.rows.get(handle) or waiting.get(handle)
            if row is None:
                continue
            row.computed = computed
            row.made += made
            row.error = done.failed.get(handle, "")
            row.is_over = handle in done.finished or handle in done.failed

    def _readmit(self, plan: int = 0) -> None:
        for preempted in [p for p in self._preempted if p.released_by <= plan]:
            self._preempted.remove(preempted)
            row, start = preempted.row, preempted.row.start
            if row.is_over:
                continue
            num_prompt = len(row.ids) - start.num_generated
            self.add(
                start.request_id,
                row.ids[:num_prompt],
                received=[*row.ids[num_prompt:], *row.made],
                max_tokens=start.max_tokens,
                choice=start.choice,
                attempt=start.attempt,
                min_tokens=start.min_tokens,
                stop=tuple(unpack_ids(start.stop_token_ids)),
                sampling=start.sampling,
                reply=start.reply,
                life=start.life,
            )

    def _lay_out(self, handle: int, row: HandRow) -> list[Chunk | int]:
        """What the row does in each step of the lease, as far as there are blocks."""
        layout: list[Chunk | int] = []
        position = row.computed
        last = len(row.ids) + row.start.max_tokens - row.start.num_generated - 1
        for _ in range(self.horizon):
            if position >= last:
                break
            end = min(position + self.chunk_size, len(row.ids)) if position < len(row.ids) else position + 1
            if not self._cover(row, end):
                break
            if position < len(row.ids):
                ids = pack_ids(row.ids[position:end])
                layout.append(Chunk(handle=handle, start=position, end=end, ids=ids))
            else:
                layout.append(handle)
            position = end
        return layout

    def _cover(self, row: HandRow, end: int) -> bool:
        while len(row.tables[0]) * BLOCK < end:
            if not all(self.free):
                return False
            for table, free in zip(row.tables, self.free, strict=True):
                table.append(free.pop())  # the block freed last: reuse shows mistakes at once
        return True

    def _give_back(self, tables: list[list[int]]) -> None:
        for free, table in zip(self.free, tables, strict=True):
            free.extend(table)
