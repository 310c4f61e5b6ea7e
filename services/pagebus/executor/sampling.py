"""Chooses ids from logits: greedy, or a draw with counter-based noise. Knows no rows' text.

In vLLM's order (V1), on float32 logits: what changes the logits (`logits_processors.py`), temperature,
min-p, top-k, top-p (`filters.py`), then the argmax of score + Gumbel noise over the ids that are left.
Greedy rows, temperature 0, take the argmax after the processors. transformers applies min-p after top-p;
our users' parameters come from vLLM.

No result depends on the other rows, nor on how much of a row had to be looked at: noise belongs to ids.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pagebus.executor.batch import RowInput
from pagebus.executor.filters import has_filter, temperatures_of, thresholds
from pagebus.executor.logits_processors import is_changing, processed
from pagebus.executor.race import Race
from pagebus.executor.scan import Scan, greedy, scan
from pagebus.kernels.gumbel import noise_key


@dataclass(frozen=True, slots=True)
class Sampled:
    """One id a row, and what is wrong with rows that got none (their id means nothing)."""

    ids: list[int]
    flaws: dict[int, str]


def sample(scanned: Scan, rows: Sequence[RowInput]) -> Sampled:
    """An id for each row. Equal maxima: the lowest id. The logits are left as they are."""
    ids, flaws = [0] * len(rows), dict[int, str]()
    good = _sound(scanned, range(len(rows)), "the model made logits that are not finite", flaws)
    changing = [n for n in good if is_changing(rows[n])]
    if changing:
        changed = scan(processed(scanned.some(changing), [rows[n] for n in changing]))
        sound = _sound(changed, changing, "penalties or logit_bias made logits that are not finite", flaws)
        _choose(changed.some([at for at, n in enumerate(changing) if n not in flaws]), sound, rows, ids)
        good = sorted(set(good) - set(changing))
    _choose(scanned.some(good), good, rows, ids)
    return Sampled(ids, flaws)


def _sound(scanned: Scan, places: Sequence[int], flaw: str, flaws: dict[int, str]) -> list[int]:
    """For which rows, scanned in the order of `places`, an id can be chosen; of the others, what is wrong."""
    sound = []
    for n, top in zip(places, scanned.tops.tolist(), strict=True):
        if math.isfinite(top):
            sound.append(n)
        else:
            flaws[n] = "no id of the vocabulary is left to choose from" if top == -math.inf else flaw
    return sound


def _choose(scanned: Scan, places: list[int], rows: Sequence[RowInput], ids: list[int]) -> None:
    """Write the ids of the rows that are scanned in the order of `places`."""
    for is_drawn in (False, True):
        wanted = [at for at, n in enumerate(places) if (rows[n].sampling.temperature > 0) is is_drawn]
        if wanted:
            some = scanned.some(wanted)
            chosen = _drawn(some, [rows[places[at]] for at in wanted]) if is_drawn else greedy(some)
            for at, id in zip(wanted, chosen.tolist(), strict=True):
                ids[places[at]] = id


def _drawn(scanned: Scan, rows: Sequence[RowInput]) -> torch.Tensor:
    """One id a row, int64 [rows]: the argmax of score + noise over the scores that the filters keep."""
    device, samplings = scanned.index.device, [row.sampling for row in rows]
    temperatures = temperatures_of(samplings, device)
    limits = torch.full_like(temperatures, -math.inf)
    filtered = [n for n, sampling in enumerate(samplings) if has_filter(sampling)]
    if filtered:
        some = [samplings[n] for n in filtered]
        limits[filtered] = thresholds(scanned.some(filtered), temperatures[filtered], some)
    keys = [noise_key(row.sampling.seed, row.choice, row.index) for row in rows]
    return Race(scanned, temperatures, limits, torch.tensor(keys, device=device)).winners()
