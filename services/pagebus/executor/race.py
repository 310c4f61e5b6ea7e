"""The argmax of score + noise over the ids that the filters keep. Knows thresholds, no parameters.

On a CPU the noise of most ids is never computed: a group of 64 ids cannot win when its largest score and its
best noise add up to less than a sum that was found, nor can an id when its own score and that noise do.
Some 40 groups and 50 ids a row are left, fewer where the scores are peaked or flat. NumPy, where a call
costs a microsecond: a step of one row makes as many calls as one of 32.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pagebus.executor.scan import BLOCK, Scan
from pagebus.kernels.gumbel import gumbel_noise, host_group_noise, host_gumbel_noise

_SLACK = 1e-6  # more than the rounding errors of noise
_HOST_ROWS = 8  # looked at at once: what caches hold
_MOST_PAIRS = 1 << 22  # (row, id) pairs that get noise at once where all ids do

_Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Race:
    """What decides some rows' draws."""

    scanned: Scan
    temperatures: torch.Tensor  # [rows]
    limits: torch.Tensor  # [rows]: lower scores are not drawn
    keys: torch.Tensor  # [rows]: of the noise

    def winners(self) -> torch.Tensor:
        """The rows' ids, int64 [rows]; of equal sums the lowest."""
        if self.keys.device.type != "cpu":
            return self.winners_of_all()
        return torch.from_numpy(np.concatenate([part._host_winners() for part in self._parts(_HOST_ROWS)]))

    def winners_of_all(self) -> torch.Tensor:
        """The same from the noise of all ids, which a GPU makes faster than it chooses."""
        all_ids = torch.arange(self.scanned.vocabulary, device=self.keys.device)[None]
        winners = []
        for part in self._parts(max(1, _MOST_PAIRS // self.scanned.vocabulary)):
            logits = part.scanned.logits[part.scanned.index]
            scores = (logits - part.scanned.tops[:, None]) / part.temperatures[:, None]
            scores.masked_fill_(scores < part.limits[:, None], float("-inf"))
            winners.append((scores + gumbel_noise(part.keys, all_ids)).argmax(-1))
        return torch.cat(winners)

    def _parts(self, num_rows: int) -> Iterator["Race"]:
        for at in range(0, len(self.keys), num_rows):
            part = slice(at, at + num_rows)
            yield Race(self.scanned.part(part), self.temperatures[part], self.limits[part], self.keys[part])

    @np.errstate(over="ignore")  # the scores of a tiny temperature are -inf
    def _host_winners(self) -> _Ids:
        vocabulary, maxima, keys = self.scanned.vocabulary, self.scanned.maxima.numpy(), self.keys.numpy()
        logits, tops = self.scanned.logits.numpy().reshape(-1), self.scanned.tops.numpy()
        temperatures, limits = self.temperatures.numpy(), self.limits.numpy()
        firsts = (self.scanned.index.numpy() * vocabulary)[:, None]

        # 1. A good sum: of the ids that have their groups' best noise, and of the block of the best score.
        noise, places = host_group_noise(keys, self.scanned.maxima.shape[1])
        values = (logits[np.minimum(places, vocabulary - 1) + firsts] - tops[:, None]) / temperatures[:, None]
        is_drawn = (values >= limits[:, None]) & (places < vocabulary)
        good = (values + noise).max(-1, where=is_drawn, initial=-np.inf)
        ids = _ids_of(maxima.argmax(-1), vocabulary)
        values = (logits[ids + firsts] - tops[:, None]) / temperatures[:, None]
        sums = host_gumbel_noise(keys[:, None], ids) + values
        good = np.maximum(good, sums.max(-1, where=values >= limits[:, None], initial=-np.inf)) - _SLACK

        # 2. The groups, and then the ids, that can do as well: at least the one of that sum.
        scores = (maxima - tops[:, None]) / temperatures[:, None]
        rows, groups = np.nonzero((scores + noise >= good[:, None]) & (scores >= limits[:, None]))
        ids = _ids_of(groups, vocabulary)
        values = (logits[ids + firsts[rows]] - tops[rows, None]) / temperatures[rows, None]
        can_win = (values + noise[rows, groups, None] >= good[rows, None]) & (values >= limits[rows, None])
        pairs, places = np.nonzero(can_win)
        rows, ids, values = rows[pairs], ids[pairs, places], values[pairs, places]

        # 3. The best of them: they stand in the order of rows and ids.
        sums = host_gumbel_noise(keys[rows], ids) + values
        starts = np.searchsorted(rows, np.arange(len(keys)))
        best = np.flatnonzero(sums == np.maximum.reduceat(sums, starts)[rows])
        winners: _Ids = ids[best[np.searchsorted(best, starts)]]
        return winners


def _ids_of(groups: _Ids, vocabulary: int) -> _Ids:
    """Each group's ids, [..., BLOCK]; beyond the vocabulary its last id again."""
    ids: _Ids = np.minimum(groups[..., None] * BLOCK + np.arange(BLOCK), vocabulary - 1)
    return ids
