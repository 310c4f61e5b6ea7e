"""An executor as small as the contract allows, for tests of the core: no bus, no clock, no tensors.

An id is a hash of the whole sequence read back through the block table, so that a stale block, a lost id or
a wrong row changes all that follows. A step is launched and completed apart, with plans taken in between.
"""

import hashlib
from dataclasses import dataclass, field

from pagebus.bus.messages import (
    Hello,
    Plan,
    PoolGroup,
    RowStart,
    StepDone,
    pack_handles,
    pack_ids,
    unpack_grants,
    unpack_handles,
    unpack_ids,
)

VOCABULARY = 50_000


def next_id(sequence, window=None):
    """The id that follows `sequence` (of which a windowed model sees the end)."""
    seen = sequence if window is None else sequence[-window:]
    digest = hashlib.blake2b(repr((len(sequence), list(seen))).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % VOCABULARY


def expected_ids(prompt, max_tokens, stop_ids=(), window=None):
    """What a row must make."""
    sequence = list(prompt)
    while len(sequence) < len(prompt) + max_tokens:
        sequence.append(next_id(sequence, window))
        if sequence[-1] in stop_ids:
            break
    return sequence[len(prompt) :]


@dataclass
class ModelRow:
    start: RowStart
    tables: list
    position: int = 0
    num_generated: int = 0
    last_id: int | None = None
    finish: str | None = None


@dataclass
class ModelExecutor:
    """`made` collects (request id, attempt, choice, index, id, finish) as a requester receives them."""

    name: str
    pool: tuple = (PoolGroup(num_blocks=8),)
    max_model_len: int = 1 << 20
    max_num_seqs: int = 256
    epoch: int = 0
    plan: int = 0
    num_steps: int = 0
    has_gap: bool = False
    rows: dict = field(default_factory=dict)
    lease: list = field(default_factory=list)
    in_flight: tuple | None = None
    outbox: list = field(default_factory=list)
    made: list = field(default_factory=list)
    pages: dict = field(default_factory=dict)
    num_step_tokens_seen: int = 0
    copies: list = field(default_factory=list)
    cached: list = field(default_factory=list)  # (request id, choice, positions), a row each

    def hello(self):
        return Hello(
            executor=self.name,
            model="m",
            epoch=self.epoch,
            plan=self.plan,
            num_steps=self.num_steps,
            handles=pack_handles(sorted(self.rows)),
            pool=self.pool,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            has_gap=self.has_gap,
        )

    def acknowledgement(self):
        return StepDone(executor=self.name, epoch=self.epoch, plan=self.plan, num_steps=self.num_steps)

    def take(self, plan: Plan):
        """What it answers at once: a `Hello` at a gap, a bare acknowledgement when it is idle."""
        assert plan.executor == self.name
        if plan.epoch < self.epoch:
            return [self.hello()]
        is_new = plan.epoch > self.epoch
        if not is_new and plan.sequence <= self.plan:
            return [] if self.in_flight else [self.acknowledgement()]
        if not plan.is_snapshot and (is_new or plan.sequence != self.plan + 1):
            self.has_gap = True
            return [self.hello()]
        if is_new:
            self.epoch, self.num_steps, self.rows, self.outbox = plan.epoch, 0, {}, []
        self._apply(plan)
        if self.in_flight is None and not self.can_launch():
            return [self.acknowledgement()]
        return []

    def _apply(self, plan):
        self.plan, self.has_gap = plan.sequence, False
        self.outbox = [done for done in self.outbox if done.num_steps > plan.num_steps_acknowledged]
        if plan.is_snapshot:
            named = {start.handle for start in plan.rows}
            self.rows = {handle: row for handle, row in self.rows.items() if handle in named}
        for handle in unpack_handles(plan.released):
            assert handle in self.rows, "a handle is released that the executor does not hold"
            del self.rows[handle]
        for start in plan.rows:
            assert start.handle not in self.rows
            tables = [[] for _ in self.pool]
            self.rows[start.handle] = ModelRow(
                start, tables, position=start.num_cached, num_generated=start.num_generated
            )
            self.cached.append((start.request_id, start.choice, start.num_cached))
        for grant in unpack_grants(plan):
            row, blocks = self.rows.get(grant.handle), list(grant.blocks)
            if row is None:
                continue  # it was preempted after it grew
            table = row.tables[grant.group]
            assert blocks
            assert all(0 <= block < self.pool[grant.group].num_blocks for block in blocks)
            assert grant.offset >= len(table), "a grant replaces an entry"
            table.extend([-1] * (grant.offset - len(table)))
            table.extend(blocks)
        for start in plan.rows:
            numbers = unpack_ids(start.copies)
            for group, source, target in zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True):
                table = self.rows[start.handle].tables[group]
                assert table.index(target) == start.num_cached // 16
                self.copies.append((group, source, target))
        self._check_no_written_block_is_shared()
        self.lease = [step for step in plan.steps for _ in range(step.num_times)]
        assert all(step.num_times == 1 or not step.chunks for step in plan.steps)

    def _live(self):
        rows = {handle: row for handle, row in self.rows.items() if row.finish is None}
        if self.in_flight:
            rows |= {row.start.handle: row for row, _ in self.in_flight[1] if row.finish is None}
        return rows.values()

    def _check_no_written_block_is_shared(self):
        """A block that a row may still write is in nobody else's table (below a window nothing is used)."""
        rows = list(self._live())
        for g, group in enumerate(self.pool):
            readers = {}
            for row in rows:
                first = 0 if group.window is None else max(0, row.position - group.window + 1) // 16
                for block in row.tables[g][first:]:
                    readers.setdefault(block, []).append(row)
            for row in rows:
                for block in row.tables[g][row.position // 16 :]:
                    assert block < 0 or readers[block] == [row], f"block {block} in two rows"

    def can_launch(self):
        return any(self._inputs(step) for step in self.lease)

    def _has_slots(self, row, end):
        first = row.position // 16
        return all(len(table) * 16 >= end and min(table[first : -(-end // 16)]) >= 0 for table in row.tables)

    def _inputs(self, step):
        inputs, taken = [], set()
        for chunk in step.chunks:
            row = self.rows.get(chunk.handle)
            if row is None or row.finish or chunk.end <= row.position or not self._has_slots(row, chunk.end):
                continue
            assert chunk.start <= row.position, "a chunk leaves a gap"
            ids = list(unpack_ids(chunk.ids))
            assert len(ids) == chunk.end - chunk.start
            inputs.append((row, ids[row.position - chunk.start :]))
            taken.add(chunk.handle)
        for handle in unpack_handles(step.decode):
            row = self.rows.get(handle)
            if row is None or row.finish or handle in taken or row.last_id is None:
                continue
            if self._has_slots(row, row.position + 1):
                inputs.append((row, [row.last_id]))
        return inputs

    def launch(self):
        """Whether a step could be launched."""
        assert self.in_flight is None
        while self.lease:
            inputs = self._inputs(self.lease.pop(0))
            if inputs:
                self._copy_blocks()
                self.in_flight = (self.plan, inputs, self.epoch)
                self.num_step_tokens_seen = max(self.num_step_tokens_seen, sum(len(ids) for _, ids in inputs))
                return True
        return False

    def _copy_blocks(self):
        for group, source, target in self.copies:
            for offset in range(16):
                if (group, source, offset) in self.pages:
                    self.pages[group, target, offset] = self.pages[group, source, offset]
        self.copies.clear()

    def complete(self):
        """The report of the step in flight, or None where its term is over."""
        plan, inputs, epoch = self.in_flight
        self._check_no_written_block_is_shared()
        self.in_flight = None
        handles, computed, counts, ids, finished = [], [], [], [], {}
        for row, row_ids in inputs:
            made = self._compute(row, row_ids)
            handles.append(row.start.handle)
            computed.append(row.position)
            counts.append(made is not None)
            if made is not None:
                ids.append(made)
                if epoch == self.epoch:
                    start = row.start
                    self.made.append(
                        (
                            start.request_id,
                            start.attempt,
                            start.choice,
                            row.num_generated - 1,
                            made,
                            row.finish,
                        )
                    )
            if row.finish:
                finished[row.start.handle] = row.finish
        if epoch != self.epoch:
            return None
        self.num_steps += 1
        done = StepDone(
            executor=self.name,
            epoch=epoch,
            plan=plan,
            num_steps=self.num_steps,
            handles=pack_handles(handles),
            num_computed=pack_handles(computed),
            num_made=bytes(counts),
            ids=pack_ids(ids),
            finished=finished,
        )
        self.outbox.append(done)
        return done

    def _compute(self, row, ids):
        for token in ids:
            for g, table in enumerate(row.tables):
                block = table[row.position // 16]
                self.pages[g, block, row.position % 16] = (token, row.position)
            row.position += 1
        is_prefilling = row.position < row.start.num_ids
        if is_prefilling:
            return None
        made = self._sample(row)
        row.last_id, row.num_generated = made, row.num_generated + 1
        if made in unpack_ids(row.start.stop_token_ids) and row.num_generated >= row.start.min_tokens:
            row.finish = "stop"
        elif row.num_generated >= row.start.max_tokens:
            row.finish = "length"
        return made

    def _sample(self, row):
        sequences = []
        for g, group in enumerate(self.pool):
            first = 0 if group.window is None else max(0, row.position - group.window)
            sequence = []
            for position in range(first, row.position):
                token, written_at = self.pages[g, row.tables[g][position // 16], position % 16]
                assert written_at == position, "a stale page"
                sequence.append(token)
            sequences.append(sequence)
        longest = max(sequences, key=len)
        assert all(longest[len(longest) - len(sequence) :] == sequence for sequence in sequences)
        return next_id([0] * (row.position - len(longest)) + longest, self.window)

    @property
    def window(self):
        """What the model sees: all, unless every group has a window."""
        windows = [group.window for group in self.pool]
        return None if None in windows else max(windows)
