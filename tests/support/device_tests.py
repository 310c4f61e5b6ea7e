"""Drives a pipelined runner by hand, a launch ahead, beside one that takes a step at a time."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from pagebus.bus.messages import Logprobs
from pagebus.executor.batch import PipelinedRunner, RowInput, RowOutput, Runner
from tests.support.rows import Row


@dataclass
class DrivenRow:
    """A row with its name, when it joins, and which launches it sits out."""

    row: Row
    key: int
    joins: int = 0
    banned: Sequence[int] = ()
    min_tokens: int = 0
    logprobs: list[Logprobs | None] = field(default_factory=list)
    prompt_logprobs: list[Logprobs] = field(default_factory=list)

    def input(self, chunk: int) -> RowInput:
        """As `Row.input`, with what only some rows have."""
        row = self.row
        given = row.input(chunk)
        given.key, given.num_prompt = self.key, len(row.prompt)
        given.banned_ids = self.banned if len(row.made) < self.min_tokens else ()
        if row.sampling.needs_history:
            given.history = [*row.prompt, *row.made]
        return given

    def take(self, given: RowInput, output: RowOutput) -> None:
        """Bring the row up to what it made."""
        assert output.error is None, output.error
        self.row.take(given, output.id)
        if output.id is not None:
            self.logprobs.append(output.logprobs)
        if output.prompt_logprobs is not None:
            self.prompt_logprobs.append(output.prompt_logprobs)


def in_turn(runner: Runner, rows: Sequence[DrivenRow], max_chunk: int = 24) -> None:
    """One row after the other, a step at a time."""
    for each in rows:
        while not each.row.is_done:
            given = each.input(max_chunk)
            each.take(given, runner.step([given])[0])


def ahead(runner: PipelinedRunner, rows: Sequence[DrivenRow], rng: random.Random, max_chunk: int = 24) -> int:
    """A step is launched before the one before it is collected; how many launches there were.

    Rows that need no history follow themselves, also one step past their last token: nobody looks at it.
    """
    waiting: list[tuple[object, list[tuple[DrivenRow, RowInput]]]] = []
    num_launches = 0
    while any(not each.row.is_done for each in rows):
        before = waiting[-1][1] if waiting else []
        numbers = {each.key: number for number, (each, _) in enumerate(before)}
        step: list[tuple[DrivenRow, RowInput]] = []
        for each in rng.sample(list(rows), len(rows)):
            if each.row.is_done or num_launches < each.joins or rng.random() < 0.15:
                continue
            if each.key not in numbers:
                step.append((each, each.input(rng.randint(1, max_chunk))))
                continue
            last = before[numbers[each.key]][1]
            if last.is_sampled and not last.sampling.needs_history:
                index = last.index + 1
                step.append((each, replace(
                    last, ids=(0,), start=last.start + len(last.ids), index=index,
                    banned_ids=each.banned if index < each.min_tokens else (), follows=numbers[each.key],
                )))  # fmt: skip
        if not step and not waiting:
            num_launches += 1  # a row joins later
            continue
        if step:
            waiting.append((runner.launch([given for _, given in step]), step))
            num_launches += 1
        if len(waiting) == 2 or not step:
            collect(runner, *waiting.pop(0))
    while waiting:
        collect(runner, *waiting.pop(0))
    return num_launches


def collect(runner: PipelinedRunner, launched: object, step: list[tuple[DrivenRow, RowInput]]) -> None:
    """What became of a launch; of rows that are done already, nothing."""
    for (each, given), output in zip(step, runner.collect(launched), strict=True):
        if not each.row.is_done:
            each.take(given, output)
