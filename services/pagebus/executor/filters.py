"""Min-p, top-k and top-p as one threshold a row: what lies below is not drawn. Knows no noise and no text.

A *score* is (logit - largest logit) / temperature. The filters apply in vLLM's order: min-p, top-k, top-p,
each on what the one before leaves; top-p's share is of the mass that min-p and top-k left. A threshold keeps
or drops equal logits together, so that sorting order never matters.

Nearly always all that is kept lies among a row's largest `_PREFIX` scores. Rows where it does not are
answered one by one, on the host, still without sorting a vocabulary.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from pagebus.bus.messages import Sampling
from pagebus.executor.scan import Scan, largest_values

_Scores = npt.NDArray[np.float32]

_PREFIX = 128
_NUM_HALVINGS = 7  # of the range, in logarithms, in which a wide nucleus ends
_LEAST_TEMPERATURE, _MOST_TEMPERATURE = 1e-30, 1e30


def has_filter(sampling: Sampling) -> bool:
    """Whether a draw may leave out ids at all."""
    return sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0


def temperatures_of(samplings: Sequence[Sampling], device: torch.device) -> torch.Tensor:
    """float32 [rows], kept where no score can become NaN."""
    clamped = [min(max(s.temperature, _LEAST_TEMPERATURE), _MOST_TEMPERATURE) for s in samplings]
    return torch.tensor(clamped, dtype=torch.float32, device=device)


def thresholds(scanned: Scan, temperatures: torch.Tensor, samplings: Sequence[Sampling]) -> torch.Tensor:
    """The least score kept in each row, float32 [rows]; the best score, 0, is always kept."""
    device, vocabulary = scanned.index.device, scanned.vocabulary
    values = largest_values(scanned, _PREFIX)
    ordered = (values - scanned.tops[:, None]) / temperatures[:, None]  # [rows, prefix], descending
    masses = ordered.double().exp().cumsum(-1)
    num_ordered = ordered.shape[1]
    is_complete = num_ordered == vocabulary

    # 1. Min-p and top-k, as far as the prefix tells: the k-th score, and all scores equal to it.
    min_p = [math.log(min(s.min_p, 1.0)) if s.min_p > 0 else -math.inf for s in samplings]
    top_k = [s.top_k if 0 < s.top_k < vocabulary else 0 for s in samplings]
    limits = torch.tensor(min_p, dtype=torch.float32, device=device)
    places = torch.tensor([min(max(k, 1), num_ordered) - 1 for k in top_k], device=device)
    is_near = torch.tensor([0 < k <= num_ordered for k in top_k], device=device)
    kth = ordered.gather(1, places[:, None])[:, 0]
    limits = torch.where(is_near, torch.maximum(limits, kth), limits)
    is_far = torch.tensor([k > num_ordered for k in top_k], device=device)
    if is_complete:
        is_inside = torch.ones_like(is_far)
    else:
        is_inside = ordered[:, -1] < limits
        is_far &= ~is_inside  # min-p already keeps fewer

    # 2. Top-p: ids are kept while those before them hold less than their share of the mass.
    has_p = torch.tensor([s.top_p < 1.0 for s in samplings], device=device)
    num_kept = (ordered >= limits[:, None]).sum(-1)
    total = masses.gather(1, (num_kept - 1)[:, None])[:, 0]
    is_whole = has_p & ~is_inside & ~is_far & torch.isneginf(limits)
    if rows := is_whole.nonzero()[:, 0].tolist():
        total[rows] = _whole_masses(scanned.some(rows), temperatures[rows])
    top_p = torch.tensor([s.top_p for s in samplings], dtype=torch.float64, device=device)
    wanted = (masses < (top_p * total)[:, None]).sum(-1) + 1  # the last is the first to reach the share
    is_found = ~is_far & (is_inside | (is_whole & (wanted <= num_ordered)))
    wanted = torch.minimum(wanted, num_kept)
    pth = ordered.gather(1, (wanted - 1)[:, None])[:, 0]
    limits = torch.where(has_p & is_found, torch.maximum(limits, pth), limits)

    # 3. Rows that reach beyond the prefix.
    wide = (is_far | (has_p & ~is_found)).nonzero()[:, 0].tolist()
    for row in wide:
        scores = (scanned.logits[scanned.index[row]] - scanned.tops[row]) / temperatures[row]
        limits[row] = _wide(
            scores.cpu().numpy(), float(limits[row]), top_k[row] if is_far[row] else 0, samplings[row].top_p
        )
    return limits


def _whole_masses(scanned: Scan, temperatures: torch.Tensor) -> torch.Tensor:
    """The sums of exp(score) over the whole vocabulary, float64 [rows].

    The softmax kernel works a row at a time, whatever the batch; the best score's share is 1 / sum.
    """
    sums, at = [], 0
    for logits in scanned.whole():
        rows = slice(at, at + len(logits))
        scores = logits  # softmax subtracts the maximum itself
        if bool((temperatures[rows] != 1.0).any()):
            scores = (logits - scanned.tops[rows, None]).div_(temperatures[rows, None])
        sums.append(scores.softmax(-1).amax(-1).double().reciprocal())
        at += len(logits)
    return torch.cat(sums)


def _wide(scores: _Scores, limit: float, top_k: int, top_p: float) -> float:
    """One row's threshold, from its scores [vocabulary], when at least `limit` and the `top_k` best count."""
    if top_k:
        limit = max(limit, float(np.partition(scores, len(scores) - top_k)[-top_k]))
    if not top_p < 1.0:
        return limit
    weights = np.exp(scores)
    weights[scores < limit] = 0.0
    share = top_p * (total := _mass_above(weights, 0.0))
    # The ids of weight up to `low` hold less than what may be left out; those above `high` less than `share`.
    low, high = max((1.0 - top_p) * total / len(scores), 1e-37), 1.0
    for _ in range(_NUM_HALVINGS):
        middle = math.sqrt(low * high)
        if _mass_above(weights, middle) < share:
            high = middle
        else:
            low = middle
    band = np.sort(scores[(weights > low) & (weights <= high)])[::-1]
    if not len(band):  # nothing weighs between the two: rounding
        return max(limit, math.log(low))
    held = np.exp(band, dtype=np.float64).cumsum() + _mass_above(weights, high)
    last = int((held < share).sum())
    return float(band[min(last, len(band) - 1)])


def _mass_above(weights: _Scores, limit: float) -> float:
    return float(torch.nn.functional.threshold(torch.from_numpy(weights), limit, 0.0).sum())
