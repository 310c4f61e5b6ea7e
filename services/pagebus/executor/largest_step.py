"""The step that takes most memory, as rows for a runner. Knows no device and no model."""

from collections.abc import Sequence

from pagebus.bus.messages import Sampling
from pagebus.executor.batch import RowInput
from pagebus.kernels.kv_write import BLOCK_SIZE

_SAMPLING = Sampling(temperature=1.0, top_k=50, top_p=0.9, min_p=0.01, num_logprobs=5, seed=1)
"""All filters at once: their temporaries count too."""


def lengths_of(num_tokens: int, num_rows: int, max_model_len: int) -> list[int]:
    """At most `num_rows` rows that share `num_tokens` new tokens, none beyond the context."""
    num_rows = min(num_rows, num_tokens)
    short, more = divmod(num_tokens, num_rows)
    return [min(max_model_len, short + (row < more)) for row in range(num_rows)]


def blocks_for(lengths: Sequence[int]) -> int:
    """Blocks that rows of these lengths hold, in each KV group."""
    return sum(-(-length // BLOCK_SIZE) for length in lengths)


def largest_step(lengths: Sequence[int], num_groups: int, vocab_size: int) -> list[RowInput]:
    """Rows that all begin, all sample, and lie one after the other in the pages."""
    rows, first = [], 0
    for length in lengths:
        stop = first + -(-length // BLOCK_SIZE)
        rows.append(
            RowInput(
                ids=[at % vocab_size for at in range(length)],
                start=0,
                tables=[list(range(first, stop))] * num_groups,
                sampling=_SAMPLING,
            )
        )
        first = stop
    return rows
