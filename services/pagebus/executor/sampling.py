"""Chooses ids from logits: greedy, or a draw with temperature, top-k, top-p and min-p. Knows no rows' text.

A draw is the argmax of logits / temperature + Gumbel noise over the ids that the filters keep, in the order
temperature, top-k, top-p, min-p, each on the probabilities that the one before leaves. A filter keeps all
ids whose logit reaches a threshold, so equal logits are kept or dropped together and sorting order never
matters. No result depends on the other rows: sums are taken over at least two rows, never over one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pagebus.bus.messages import Sampling
from pagebus.kernels.gumbel import gumbel_noise, noise_key

_PREFIX = 1024  # largest logits looked at first: sorting a whole vocabulary is slow and rarely needed
_NO_LIMIT = 1 << 62  # a top-k beyond every vocabulary
_NOISE_IDS = 1 << 18  # (row, id) pairs that get noise at once: what a cache holds


@dataclass(frozen=True, slots=True)
class Draw:
    """How one row's id is chosen; noise is a function of (seed, choice, index) and the token id."""

    sampling: Sampling
    choice: int
    index: int


def sample(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """The ids chosen, int64 [rows], from finite `logits` [rows, vocabulary]. Equal maxima: the lowest id."""
    chosen = logits.argmax(-1)
    noisy = [row for row, draw in enumerate(draws) if draw.sampling.temperature > 0]
    if noisy:
        rows = torch.tensor(noisy, device=logits.device)
        chosen[rows] = _draw(logits[rows].float(), [draws[row] for row in noisy])
    return chosen


def _draw(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    device = logits.device
    temperatures = torch.tensor([draw.sampling.temperature for draw in draws], device=device)
    # Relative to the maximum first: a tiny temperature then gives -inf for the others, never inf - inf.
    scores = (logits - logits.amax(-1, keepdim=True)) / temperatures.clamp(min=1e-30)[:, None]
    filtered = [row for row, draw in enumerate(draws) if _has_filter(draw.sampling)]
    if filtered:
        rows = torch.tensor(filtered, device=device)
        kept = scores[rows]
        limits = thresholds(kept, [draws[row].sampling for row in filtered])
        scores[rows] = kept.masked_fill_(kept < limits[:, None], float("-inf"))
    keys = torch.tensor(
        [noise_key(draw.sampling.seed, draw.choice, draw.index) for draw in draws], device=device
    )
    ids = torch.arange(logits.shape[1], device=device)
    size = max(1, _NOISE_IDS // logits.shape[1])
    for at in range(0, len(draws), size):
        scores[at : at + size] += gumbel_noise(keys[at : at + size], ids)
    return scores.argmax(-1)


def _has_filter(sampling: Sampling) -> bool:
    return sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0


def thresholds(scores: torch.Tensor, samplings: Sequence[Sampling]) -> torch.Tensor:
    """The least score kept in each row, [rows], of `scores` [rows, vocabulary] whose maximum is 0."""
    num_rows, vocabulary = scores.shape
    if num_rows == 1:  # a lone row's sums would be split over threads, and added in another order
        return thresholds(scores.expand(2, -1).contiguous(), [samplings[0], samplings[0]])[:1]
    limits = torch.full((num_rows,), float("-inf"), device=scores.device)
    whole = torch.exp(scores).sum(-1)
    prefix = scores.topk(min(_PREFIX, vocabulary), dim=-1).values
    is_open = _limit(prefix, whole, samplings, limits, is_complete=prefix.shape[1] == vocabulary)
    if is_open:  # rows whose filters reach beyond the prefix
        rows = torch.tensor(is_open * 2 if len(is_open) == 1 else is_open, device=scores.device)
        some = torch.full((len(rows),), float("-inf"), device=scores.device)
        ordered = scores[rows].sort(dim=-1, descending=True).values
        of_rows = [samplings[row] for row in rows.tolist()]
        _limit(ordered, whole[rows], of_rows, some, is_complete=True)
        limits[rows] = some
    return limits


def _limit(
    ordered: torch.Tensor,  # [rows, n]: the largest scores, descending
    whole: torch.Tensor,  # [rows]: the sum of exp over all scores
    samplings: Sequence[Sampling],
    limits: torch.Tensor,  # [rows], written
    *,
    is_complete: bool,
) -> list[int]:
    """Write the rows' thresholds; the rows that need more than `ordered` are returned instead."""
    device, num_ordered = ordered.device, ordered.shape[1]
    ks = [min(s.top_k, _NO_LIMIT) if s.top_k > 0 else _NO_LIMIT for s in samplings]
    top_k = torch.tensor(ks, device=device)
    top_p = torch.tensor([s.top_p for s in samplings], device=device)
    min_p = torch.tensor([s.min_p for s in samplings], device=device)
    masses = torch.exp(ordered).cumsum(-1)

    # 1. Top-k: the k-th score, and all scores equal to it.
    has_k = top_k < (num_ordered if is_complete else num_ordered + 1)
    kth = ordered.gather(1, (top_k.clamp(max=num_ordered) - 1)[:, None])[:, 0]
    limits.copy_(torch.where(has_k, kth, limits))
    num_kept = (ordered >= limits[:, None]).sum(-1)
    is_inside = ~has_k | (num_kept < num_ordered) | is_complete
    total = torch.where(has_k, masses.gather(1, (num_kept - 1)[:, None])[:, 0], whole)

    # 2. Top-p of what is left: ids are kept while those before them hold less than p.
    before = torch.cat((torch.zeros_like(masses[:, :1]), masses[:, :-1]), 1)
    wanted = (before < (top_p * total)[:, None]).sum(-1).clamp(min=1)
    wanted = torch.minimum(wanted, num_kept)
    pth = ordered.gather(1, (wanted - 1)[:, None])[:, 0]
    has_p = top_p < 1.0
    is_inside &= ~has_p | (wanted < num_ordered) | is_complete
    # A k beyond the prefix.
    is_inside &= has_k | (top_k >= _NO_LIMIT) | is_complete
    limits.copy_(torch.where(has_p, torch.maximum(limits, pth), limits))

    # 3. Min-p: relative to the most probable id, whose score is 0.
    limits.copy_(torch.maximum(limits, torch.log(min_p)))
    return [] if is_complete else torch.nonzero(~is_inside)[:, 0].tolist()
