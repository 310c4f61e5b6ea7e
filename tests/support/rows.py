"""Drives a `Runner` by hand: rows with scattered blocks, prefill in chunks of any size, ragged batches."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from pagebus.bus.messages import Sampling
from pagebus.executor.batch import BlockCopy, RowInput, Runner

BLOCK_SIZE = 16
GREEDY = Sampling(temperature=0)


class Blocks:
    """Hands out each group's blocks in a random order."""

    def __init__(self, runner: Runner, seed: int = 0) -> None:
        rng = random.Random(seed)
        self.windows = [group.window for group in runner.pool]
        self.free = [list(range(group.num_blocks)) for group in runner.pool]
        for blocks in self.free:
            rng.shuffle(blocks)

    def tables(self, num_tokens: int) -> list[list[int]]:
        num_blocks = -(-num_tokens // BLOCK_SIZE)
        return [[blocks.pop() for _ in range(num_blocks)] for blocks in self.free]

    def after_hit(self, donor: "Row", num_shared: int, num_tokens: int) -> list[list[int]]:
        """Tables that begin with the donor's first blocks, as far as a windowed group still needs them."""
        tables = self.tables(num_tokens)
        for table, given, window in zip(tables, donor.tables, self.windows, strict=True):
            first = 0 if window is None else max(0, num_shared * BLOCK_SIZE - window + 1) // BLOCK_SIZE
            table[:num_shared] = [-1] * first + list(given[first:num_shared])
        return tables

    def after_fork(self, parent: "Row", num_tokens: int) -> tuple[list[list[int]], list[BlockCopy]]:
        """Tables that share the parent's full blocks, and the copies of the block that it has half filled."""
        num_full, rest = divmod(parent.position, BLOCK_SIZE)
        tables, copies = self.after_hit(parent, num_full, num_tokens), []
        if rest:
            pairs = zip(parent.tables, tables, strict=True)
            copies = [BlockCopy(g, given[num_full], own[num_full]) for g, (given, own) in enumerate(pairs)]
        return tables, copies


@dataclass
class Row:
    """A sequence on its way: its prompt, the ids made so far, and the position to compute next."""

    prompt: Sequence[int]
    tables: list[list[int]]
    num_tokens: int
    sampling: Sampling = GREEDY
    choice: int = 0
    position: int = 0
    made: list[int] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return len(self.made) >= self.num_tokens

    def input(self, chunk: int) -> RowInput:
        """The next `chunk` ids at most, sampling where they are the last ones known."""
        ids = [*self.prompt, *self.made]
        end = min(self.position + chunk, len(ids))
        return RowInput(
            ids=ids[self.position : end],
            start=self.position,
            tables=self.tables,
            sampling=self.sampling,
            choice=self.choice,
            index=len(self.made),
            is_sampled=end == len(ids),
        )

    def take(self, given: RowInput, made: int | None) -> None:
        self.position += len(given.ids)
        if made is not None:
            self.made.append(made)

    def preempt(self, blocks: Blocks) -> None:
        """Lose the pages: what was made is part of the next prefill, in other blocks."""
        self.tables, self.position = blocks.tables(len(self.prompt) + self.num_tokens), 0

    def free_unseen(self, windows: Sequence[int | None]) -> None:
        """Forget blocks that a windowed group no longer sees, as the scheduler may."""
        for table, window in zip(self.tables, windows, strict=True):
            if window is not None:
                for block in range(max(0, self.position - window + 1) // BLOCK_SIZE):
                    table[block] = -1


def prefill(runner: Runner, row: Row, chunk: int) -> None:
    """Compute the whole prompt in chunks of `chunk`, without sampling and without freeing anything."""
    while row.position < len(row.prompt):
        given = row.input(min(chunk, len(row.prompt) - row.position))
        given.is_sampled = False
        output = runner.step([given])[0]
        assert output.error is None, output.error
        row.take(given, output.id)


def run_rows(
    runner: Runner,
    rows: Sequence[Row],
    rng: random.Random,
    max_chunk: int = 45,
    preempting: Blocks | None = None,
) -> None:
    """Step until all rows are done: random chunks, random order, and now and then a row sits out.

    With `preempting`, each row loses its pages once, somewhere between its 5th and 50th token.
    """
    windows = [group.window for group in runner.pool]
    losing = {id(row): rng.randint(5, 50) for row in rows} if preempting else {}
    while running := [row for row in rows if not row.is_done]:
        for row in running:
            if preempting and len(row.made) >= losing.get(id(row), row.num_tokens):
                del losing[id(row)]
                row.preempt(preempting)
        chosen = [row for row in running if rng.random() < 0.8] or running
        rng.shuffle(chosen)
        inputs = [row.input(rng.randint(1, max_chunk)) for row in chosen]
        for row, given, output in zip(chosen, inputs, runner.step(inputs), strict=True):
            assert output.error is None, output.error
            assert (output.id is not None) == given.is_sampled
            row.take(given, output.id)
            row.free_unseen(windows)
