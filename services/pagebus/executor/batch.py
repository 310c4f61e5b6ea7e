"""What one step asks of a model: rows of ids with positions and block tables. Knows no tensors and no bus."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pagebus.bus.messages import PoolGroup, Sampling


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


@dataclass(slots=True)
class RowOutput:
    """What a row made: the sampled id, or None where none was asked for, or why this row alone failed."""

    id: int | None = None
    error: str | None = None


class Runner(Protocol):
    """A model with its KV pages. Called from one thread only."""

    @property
    def pool(self) -> tuple[PoolGroup, ...]:
        """The KV groups and their numbers of blocks."""

    @property
    def max_model_len(self) -> int:
        """Longest sequence in tokens that the model itself allows."""

    def step(self, rows: Sequence[RowInput]) -> list[RowOutput]:
        """Write the rows' KV, attend, and sample: one output a row, in order."""
