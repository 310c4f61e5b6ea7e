"""Top-k and top-p as one threshold a row, without a sort. Knows no noise and no text.

One idea: a score's bits, read as an integer, keep the scores' order. The greatest value above which enough
ids, or enough mass, lies is found four bits at a time: a pass over the row sums counts (or masses) of the 16
values of the next four bits, and descends into the one where the wanted share is reached. Eight passes give
the exact score, one that stands in the row; equal scores are kept or dropped together.
"""
# ruff: noqa: ANN001, ANN202, N803 - kernels: arguments without types, constants in capitals

from typing import no_type_check

import torch

from pagebus.kernels.jit import kernel, tl

_TILE = 2048


@kernel
@no_type_check
def _ordered(scores):
    """Bits that, as unsigned integers, are in the scores' order."""
    bits = scores.to(tl.uint32, bitcast=True)
    return tl.where(scores < 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@kernel
@no_type_check
def _weights(logits, at, top, temperature, limit, IS_MASS: tl.constexpr, VOCABULARY: tl.constexpr):
    """Scores, and what each counts: 1 or its mass, 0 below the limit and beyond the vocabulary."""
    values = tl.load(logits + at, mask=at < VOCABULARY, other=float("-inf")).to(tl.float32)
    scores = tl.div_rn(values - top, temperature)
    counts = tl.exp(scores) if IS_MASS else tl.full(scores.shape, 1.0, tl.float32)
    return scores, tl.where((at < VOCABULARY) & (scores >= limit), counts, 0.0)


@kernel
@no_type_check
def _reached(
    logits, top, temperature, limit, target,
    IS_MASS: tl.constexpr, VOCABULARY: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The greatest score such that it and all above count at least `target`, as ordered bits."""
    digits = tl.arange(0, 16)
    found = tl.full([], 0, tl.uint32)
    above = tl.full([], 0.0, tl.float64)
    for level in range(8):
        shift = 28 - 4 * level
        counts = tl.zeros([16], tl.float64)
        for start in range(0, VOCABULARY, TILE):
            at = start + tl.arange(0, TILE)
            scores, weights = _weights(logits, at, top, temperature, limit, IS_MASS, VOCABULARY)
            upper = (_ordered(scores) >> shift).to(tl.uint32)
            is_inside = (upper >> 4) == (found & 0x0FFFFFFF)
            digit = tl.where(is_inside, (upper & 15).to(tl.int32), -1)
            is_digit = digit[:, None] == digits[None, :]
            counts += tl.sum(tl.where(is_digit, weights.to(tl.float64)[:, None], 0.0), 0)
        from_digit = tl.sum(tl.where(digits[:, None] >= digits[None, :], counts[:, None], 0.0), 0)
        place = tl.max(tl.where(above + from_digit >= target, digits, -1), 0)
        if place < 0:  # rounding: the whole is a little less than it was
            place = tl.min(tl.where(counts > 0, digits, 15), 0)
        above += tl.sum(tl.where(digits > place, counts, 0.0), 0)
        found = (found << 4) | place.to(tl.uint32)
    return found


@kernel
@no_type_check
def _score_of(found):
    bits = tl.where(found >= 0x80000000, found ^ 0x80000000, found ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@kernel
@no_type_check
def _limits(
    logits, stride, tops, temperatures, least, top_ks, top_ps, limits,
    VOCABULARY: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    top, temperature, limit = tl.load(tops + row), tl.load(temperatures + row), tl.load(least + row)
    top_k, top_p = tl.load(top_ks + row), tl.load(top_ps + row)
    is_drawn = (temperature > 0) & (top == top) & (top != float("-inf"))
    if is_drawn:
        if (top_k > 0) & (top_k < VOCABULARY):
            wanted = top_k.to(tl.float64)
            kth = _reached(logits, top, temperature, float("-inf"), wanted, False, VOCABULARY, TILE)
            limit = tl.maximum(limit, _score_of(kth))
        if top_p < 1.0:
            total = tl.full([], 0.0, tl.float64)
            for start in range(0, VOCABULARY, TILE):
                at = start + tl.arange(0, TILE)
                _, masses = _weights(logits, at, top, temperature, limit, True, VOCABULARY)
                total += tl.sum(masses.to(tl.float64), 0)
            pth = _reached(logits, top, temperature, limit, top_p * total, True, VOCABULARY, TILE)
            limit = tl.maximum(limit, _score_of(pth))
    tl.store(limits + row, limit)


def triton_limits(
    logits: torch.Tensor,  # [rows, vocabulary], any float type, any row stride
    tops: torch.Tensor,  # [rows], float32
    temperatures: torch.Tensor,  # [rows], float32; 0: the row is passed over
    least: torch.Tensor,  # [rows], float32: log(min_p); -inf without
    top_k: torch.Tensor,  # [rows], int32; 0: all
    top_p: torch.Tensor,  # [rows], float64; 1: all
) -> torch.Tensor:
    """The least score kept, float32 [rows]: all ids whose score reaches it are kept; the best always is."""
    num_rows, vocabulary = logits.shape
    limits = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    _limits[(num_rows,)](
        logits, logits.stride(0), tops, temperatures, least, top_k, top_p, limits,
        VOCABULARY=vocabulary, TILE=_TILE, num_warps=16,
    )  # fmt: skip
    return limits


def reference_limits(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    least: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
) -> torch.Tensor:
    """The same by sorting; masses in float64. Rows at temperature 0 keep `least`."""
    limits = least.clone()
    for row, temperature in enumerate(temperatures.tolist()):
        values = logits[row].float()
        if not temperature > 0:
            continue
        ordered = ((values - values.max()) / temperatures[row]).sort(descending=True).values
        if 0 < int(top_k[row]) < len(ordered):
            limits[row] = torch.maximum(limits[row], ordered[int(top_k[row]) - 1])
        if float(top_p[row]) < 1.0:
            kept = ordered[ordered >= limits[row]]
            masses = kept.double().exp().cumsum(0)
            place = int((masses < top_p[row] * masses[-1]).sum())
            limits[row] = kept[min(place, len(kept) - 1)]
    return limits
