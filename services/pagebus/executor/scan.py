"""A first look at logits: the maxima of blocks of 64 ids. Most questions then need few of the ids.

Knows no sampling. No result depends on other rows: maxima have no order, and everything else is done an
element at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

BLOCK = 64
"""Ids a block; the noise's groups are the same ones."""

_ROWS_AT_ONCE = 8  # of whole-vocabulary temporaries
_ID_BITS = 32


@dataclass(frozen=True, slots=True)
class Scan:
    """Some rows of float32 logits and their maxima. Logits are never copied; a NaN shows in `tops`."""

    logits: torch.Tensor  # [all rows, vocabulary], contiguous
    index: torch.Tensor  # [rows], int64: which rows are meant
    maxima: torch.Tensor  # [rows, blocks]
    tops: torch.Tensor  # [rows]

    def __len__(self) -> int:
        return len(self.index)

    @property
    def vocabulary(self) -> int:
        """How many logits a row has."""
        return self.logits.shape[1]

    def some(self, places: list[int]) -> "Scan":
        """Some of the rows, in this order."""
        if places == list(range(len(self))):
            return self
        wanted = torch.tensor(places, dtype=torch.int64, device=self.index.device)
        return Scan(self.logits, self.index[wanted], self.maxima[wanted], self.tops[wanted])

    def part(self, places: slice) -> "Scan":
        """Neighbouring rows."""
        return Scan(self.logits, self.index[places], self.maxima[places], self.tops[places])

    def values(self, ids: torch.Tensor) -> torch.Tensor:
        """The logits of `ids` [rows, ...]."""
        firsts = (self.index * self.vocabulary).view(-1, *[1] * (ids.dim() - 1))
        return self.logits.view(-1)[ids + firsts]

    def block_values(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits in `blocks` [rows, n] and their ids, [rows, n * BLOCK]; -inf beyond the vocabulary."""
        ids = (blocks[..., None] * BLOCK + torch.arange(BLOCK, device=blocks.device)).flatten(1)
        if self.vocabulary % BLOCK == 0:
            return self.values(ids), ids
        values = self.values(ids.clamp(max=self.vocabulary - 1))
        return values.masked_fill_(ids >= self.vocabulary, float("-inf")), ids

    def whole(self) -> Iterator[torch.Tensor]:
        """All logits of the rows, a few rows at a time: [at most 8, vocabulary], not to be written to."""
        rows = self.index.tolist()
        for at in range(0, len(rows), _ROWS_AT_ONCE):
            some = rows[at : at + _ROWS_AT_ONCE]
            if some == list(range(some[0], some[0] + len(some))):
                yield self.logits[some[0] : some[0] + len(some)]
            else:
                yield torch.stack([self.logits[row] for row in some])


def scan(logits: torch.Tensor) -> Scan:
    """Look at float32 `logits` [rows, vocabulary]."""
    logits = logits.contiguous()
    num_whole = logits.shape[1] // BLOCK
    parts = []
    if num_whole:
        parts.append(_blocks(logits, num_whole).amax(-1))
    if logits.shape[1] % BLOCK:
        parts.append(logits[:, num_whole * BLOCK :].amax(-1, keepdim=True))
    maxima = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
    return Scan(logits, torch.arange(len(logits), device=logits.device), maxima, maxima.amax(-1))


def greedy(scanned: Scan) -> torch.Tensor:
    """The id of each row's largest logit, [rows]; of equals the lowest."""
    values, ids = scanned.block_values(scanned.maxima.argmax(-1, keepdim=True))
    return ids.gather(1, values.argmax(-1, keepdim=True))[:, 0]


def largest(scanned: Scan, num: int) -> torch.Tensor:
    """The ids of the `num` largest logits, [rows, num], best first and of equals the lower id first.

    They lie in the `num` best blocks in the same order: each of those holds an id before any other block's.
    """
    num = min(num, scanned.vocabulary)
    blocks = torch.arange(scanned.maxima.shape[1], device=scanned.index.device).expand(len(scanned), -1)
    if num < blocks.shape[1]:
        blocks = _places(_keys(scanned.maxima, blocks).topk(num, dim=-1, sorted=False).values)
    values, ids = scanned.block_values(blocks)
    return _places(_keys(values, ids).topk(num, dim=-1).values)


def largest_values(scanned: Scan, num: int) -> torch.Tensor:
    """The `num` largest logits, [rows, num], descending."""
    num = min(num, scanned.vocabulary)
    if num < scanned.maxima.shape[1]:
        blocks = scanned.maxima.topk(num, dim=-1, sorted=False).indices
        return scanned.block_values(blocks)[0].topk(num, dim=-1).values
    return torch.cat([logits.topk(num, dim=-1).values for logits in scanned.whole()])


def num_at_least(scanned: Scan, limits: torch.Tensor) -> torch.Tensor:
    """How many logits of each row are at least `limits` [rows], int64 [rows]."""
    most = int((scanned.maxima >= limits[:, None]).sum(-1).amax())
    if most * 8 < scanned.maxima.shape[1]:
        blocks = scanned.maxima.topk(max(1, most), dim=-1, sorted=False).indices
        return (scanned.block_values(blocks)[0] >= limits[:, None]).sum(-1)
    if limits.device.type != "cpu":
        return (scanned.logits[scanned.index] >= limits[:, None]).sum(-1)
    rows = zip(scanned.index.tolist(), limits.tolist(), strict=True)
    logits = scanned.logits.numpy()  # its comparisons are five times as fast on a CPU
    return torch.tensor([int(np.count_nonzero(logits[row] >= limit)) for row, limit in rows])


def _blocks(logits: torch.Tensor, num: int) -> torch.Tensor:
    """The first `num` blocks, [rows, num, BLOCK]: a view."""
    return logits.as_strided((len(logits), num, BLOCK), (logits.shape[1], BLOCK, 1))


def _keys(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """int64 that order as (value, lower place): floats as integers of the same order, then the place."""
    bits = (values + 0.0).view(torch.int32).long()  # + 0.0: one zero only
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered << _ID_BITS) - places


def _places(keys: torch.Tensor) -> torch.Tensor:
    return -keys & ((1 << _ID_BITS) - 1)
