"""Log-probabilities of ids that were made or given, and of the best ones. Knows no sampling parameters.

They are those of the model's own distribution: float32 log-softmax of the logits as the head made them.
Equal logits: the lower id is the better one; an id's rank counts all that are at least as large.
"""

from collections.abc import Sequence

import numpy as np
import torch

from pagebus.bus.messages import Logprobs
from pagebus.executor.scan import Scan, largest, num_at_least


def describe(scanned: Scan, ids: Sequence[int], num_top: int) -> Logprobs:
    """The log-probabilities of one id a row, with the `num_top` best beside each (at most the vocabulary)."""
    given = torch.tensor(ids, dtype=torch.int64, device=scanned.index.device)[:, None]
    num_top = min(max(num_top, 0), scanned.vocabulary)
    wanted = torch.cat((given, largest(scanned, num_top)), 1) if num_top else given
    values, at = [], 0
    for some in scanned.whole():
        values.append(some.log_softmax(-1).gather(1, wanted[at : at + len(some)]))
        at += len(some)
    ranks = num_at_least(scanned, scanned.values(given)[:, 0])
    return Logprobs(
        num_top=num_top,
        ids=_packed(wanted, "<i4"),
        values=_packed(torch.cat(values), "<f4"),
        ranks=_packed(ranks, "<i4"),
    )


def describe_each(scanned: Scan, ids: Sequence[int], nums_top: Sequence[int]) -> list[Logprobs]:
    """One `Logprobs` a row, each with as many best ids as its row asks for."""
    told: dict[int, Logprobs] = {}
    for num_top in set(nums_top):
        rows = [row for row, num in enumerate(nums_top) if num == num_top]
        together = describe(scanned.some(rows), [ids[row] for row in rows], num_top)
        told.update(zip(rows, _each(together), strict=True))
    return [told[row] for row in range(len(ids))]


def _each(told: Logprobs) -> list[Logprobs]:
    width = 4 * (1 + told.num_top)
    return [
        Logprobs(
            num_top=told.num_top,
            ids=told.ids[row * width : (row + 1) * width],
            values=told.values[row * width : (row + 1) * width],
            ranks=told.ranks[row * 4 : (row + 1) * 4],
        )
        for row in range(len(told.ranks) // 4)
    ]


def joined(parts: Sequence[Logprobs]) -> Logprobs:
    """Rows of several, one after the other; all have the same number of best ids."""
    return Logprobs(
        num_top=parts[0].num_top,
        ids=b"".join(part.ids for part in parts),
        values=b"".join(part.values for part in parts),
        ranks=b"".join(part.ranks for part in parts),
    )


def _packed(values: torch.Tensor, kind: str) -> bytes:
    return values.cpu().numpy().astype(np.dtype(kind)).tobytes()
