"""What one step asks of a model: rows of ids with positions and block tables. Knows no tensors and no bus."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from pagebus.bus.messages import Logprobs, PoolGroup, Sampling
from pagebus.executor.pulse import Pulse


@dataclass(slots=True)
class RowInput:
    """One row of a step: compute `ids` at positions start, start+1, ... and perhaps sample one more id.

    `tables[g]` is the row's block table in KV group g: position p lives in block tables[g][p // 16], slot
    p % 16 (windowed groups may hold -1 where blocks were freed). The table covers every position computed.
    """

    ids: Sequence[int]
    start: int
    tables: Sequence[Sequence[int]]
    sampling: Sampling
    choice: int = 0
    index: int = 0  # index among the choice's generated ids of the id to be sampled
    is_sampled: bool = True
    num_prompt: int = 0  # the row's first so many ids are the prompt's
    history: Sequence[int] = ()  # all ids so far, prompt first; only where `sampling.needs_history`
    banned_ids: Sequence[int] = ()  # ids that must not be made now: the stop ids below `min_tokens`
    key: int = -1  # the row's handle, the same in all its steps; reused by another row in a new epoch only
    follows: int | None = None
    """The one id is the one that row number `follows` of the launch directly before makes.

    `ids` is `(0,)` then and says nothing. Only decode rows follow, only where not `sampling.needs_history`.
    A runner that is not pipelined never sees such a row.
    """


@dataclass(slots=True)
class RowOutput:
    """What a row made: the sampled id, or None where none was asked for, or why this row alone failed.

    With `sampling.num_prompt_logprobs`, a row that computes positions [start, end) also tells the
    log-probabilities of history[start + 1 : min(end + 1, num_prompt)].
    """

    id: int | None = None
    error: str | None = None
    logprobs: Logprobs | None = None  # of `id`; where `sampling.num_logprobs` asks for them
    prompt_logprobs: Logprobs | None = None  # of the prompt's ids that follow the row's positions


class BlockCopy(NamedTuple):
    """Copy the KV of block `source` of a KV group to block `target`."""

    group: int
    source: int
    target: int


class Runner(Protocol):
    """A model with its KV pages. Called from one thread only."""

    @property
    def pool(self) -> tuple[PoolGroup, ...]:
        """The KV groups and their numbers of blocks."""

    @property
    def max_model_len(self) -> int:
        """Longest sequence in tokens that the model itself allows."""

    @property
    def pulse(self) -> Pulse:
        """Advanced with each part of a step (a layer) that is computed."""

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Copy whole blocks, in order, before the next step."""

    def step(self, rows: Sequence[RowInput]) -> list[RowOutput]:
        """Write the rows' KV, attend, and sample: one output a row, in order."""


@runtime_checkable
class PipelinedRunner(Runner, Protocol):
    """A model on a device with a queue of its own: a step is launched before the one before it is collected.

    Launches are collected in their order, each once, and at most two are uncollected. `copy_blocks` is
    ordered with the launches, on the same stream. `step` is `launch` and `collect`, asked for only while
    nothing is uncollected. A launch that raised leaves nothing to collect; one whose `collect` raised is done
    with. What was launched before or after it is collected all the same, in order, or raises as well.
    """

    @property
    def is_pipelined(self) -> bool:
        """Whether `launch` and `collect` may be used; where not (a model on the CPU), `step` alone is."""

    def launch(self, rows: Sequence[RowInput]) -> object:
        """Start a step and return, without waiting for the device, what `collect` takes."""

    def collect(self, launched: object) -> list[RowOutput]:
        """Wait for the launched step: one output a row, in order.

        A row that follows one that made no id (it failed) may give any output: nobody looks at it.
        """


def pipelined(runner: Runner) -> PipelinedRunner | None:
    """The runner as one that is pipelined, or None where it is not."""
    return runner if isinstance(runner, PipelinedRunner) and runner.is_pipelined else None
