"""Ids from logits on a GPU: the scan, the draw, the choice. Knows no parameters beyond a row's few numbers.

```
scan    (row, tile)  one pass over the logits: maximum, its lowest id, sum of exponentials
choose  (row)        top, log of the sum; rows at temperature 0 are done
draw    (row, tile)  best score + noise of the ids that the filters keep, score = (logit - top) / temperature
pick    (row)        the best tile's id and its log-probability
```

The noise is `gumbel.py`'s, integer for integer. A tile computes the logarithms (float64) of its groups' best
noise, and goes through the 64 ids of a group only while that group may still hold the winner: as on the CPU,
few groups are looked at. No result depends on other rows; equal sums give the lowest id.
"""
# ruff: noqa: ANN001, ANN202, N803 - kernels: arguments without types, constants in capitals

from dataclasses import dataclass
from typing import no_type_check

import torch

from pagebus.kernels import gumbel
from pagebus.kernels.jit import cdiv, kernel, power_of_2, tl

TILE = 4096
_NO_ID = tl.constexpr(2**31 - 1)
_GROUP = tl.constexpr(gumbel.GROUP)
_GOLDEN = tl.constexpr(gumbel._GOLDEN)
_MIX_1, _MIX_2 = tl.constexpr(gumbel._MIX_1), tl.constexpr(gumbel._MIX_2)
_GROUPS_KEY = tl.constexpr(gumbel._GROUPS_KEY)
_SLACK = tl.constexpr(1e-6)  # more than the rounding errors of noise


@dataclass(frozen=True, slots=True)
class Scanned:
    """What one pass over the logits tells of each row; a row with a NaN or +inf has no finite top."""

    tops: torch.Tensor  # [rows], float32
    ids: torch.Tensor  # [rows], int64: the lowest with that logit
    log_sums: torch.Tensor  # [rows], float32: log of the sum of exp(logit - top)


def noise_prefix(seed: int, choice: int) -> int:
    """What of `gumbel.noise_key` does not change while a row lives; the device adds the index. Signed."""
    key = 0
    for part in (seed, choice):
        key = gumbel._mix((key + gumbel._GOLDEN + (part & gumbel._MASK)) & gumbel._MASK)
    return gumbel._signed(key)


@kernel
@no_type_check
def _mixed(state):
    state = (state ^ (state >> 30)) * _MIX_1
    state = (state ^ (state >> 27)) * _MIX_2
    return state ^ (state >> 31)


@kernel
@no_type_check
def _key(prefixes, indices, row):
    index = tl.load(indices + row).to(tl.uint64)
    return _mixed(tl.load(prefixes + row).to(tl.uint64) + index + _GOLDEN)


@kernel
@no_type_check
def _exponential(bits):
    """-log(1 - u) in float64; 1 - u is exact, for u is a multiple of 2**-53."""
    return -tl.log(1.0 - ((bits >> 12).to(tl.float64) + 0.5) * 2.220446049250313e-16)


@kernel
@no_type_check
def _scan(logits, stride, tops, ids, sums, VOCABULARY: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr):
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tile * TILE + tl.arange(0, TILE)
    values = tl.load(logits + row * stride + at, mask=at < VOCABULARY, other=float("-inf")).to(tl.float32)
    is_bad = tl.max(((values != values) | (values == float("inf"))).to(tl.int32), 0)
    top = tl.max(values, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    tl.store(ids + row * TILES + tile, tl.min(tl.where(values == top, at, _NO_ID), 0))
    tl.store(sums + row * TILES + tile, tl.sum(tl.exp(values - base), 0))
    tl.store(tops + row * TILES + tile, tl.where(is_bad > 0, float("nan"), top))


@kernel
@no_type_check
def _choose(
    tile_tops, tile_ids, tile_sums, tops, ids, log_sums,
    TILES: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, PAD)
    is_there = at < TILES
    maxima = tl.load(tile_tops + row * TILES + at, mask=is_there, other=float("-inf"))
    is_bad = tl.max((maxima != maxima).to(tl.int32), 0)
    top = tl.max(maxima, 0)
    candidates = tl.load(tile_ids + row * TILES + at, mask=is_there, other=_NO_ID)
    sums = tl.load(tile_sums + row * TILES + at, mask=is_there, other=0.0)
    base = tl.where(top == float("-inf"), 0.0, top)
    tl.store(tops + row, tl.where(is_bad > 0, float("nan"), top))
    tl.store(ids + row, tl.min(tl.where(maxima == top, candidates, _NO_ID), 0).to(tl.int64))
    tl.store(log_sums + row, tl.log(tl.sum(sums * tl.exp(maxima - base), 0)))


@kernel
@no_type_check
def _scores(logits, at, top, temperature, limit, VOCABULARY: tl.constexpr):
    """float32 with IEEE division, the same bits as torch's; -inf where the id is not drawn."""
    values = tl.load(logits + at, mask=at < VOCABULARY, other=float("-inf")).to(tl.float32)
    scores = tl.div_rn(values - top, temperature)
    return tl.where((at < VOCABULARY) & (scores >= limit), scores, float("-inf"))


@kernel
@no_type_check
def _draw(
    logits, stride, tops, temperatures, limits, prefixes, indices, best_sums, best_ids,
    VOCABULARY: tl.constexpr, TILES: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature, top, limit = tl.load(temperatures + row), tl.load(tops + row), tl.load(limits + row)
    if temperature <= 0:
        return
    logits += row * stride
    key = _key(prefixes, indices, row)

    # 1. Each group's best noise and who has it: what the group can reach, and what its lucky id does reach.
    places, members = tl.arange(0, GROUPS), tl.arange(0, _GROUP)
    groups = tile * GROUPS + places
    scores = _scores(logits, groups[:, None] * _GROUP + members[None, :], top, temperature, limit, VOCABULARY)
    bits = _mixed(groups.to(tl.uint64) * _GOLDEN + (key ^ _GROUPS_KEY))
    floors = _exponential(bits) * 0.015625
    lucky = (bits & (_GROUP - 1)).to(tl.int32)
    group_noise = -tl.log(floors)
    reach = tl.max(scores, 1).to(tl.float64) + group_noise
    reached = tl.max(tl.where(members[None, :] == lucky[:, None], scores, float("-inf")), 1).to(tl.float64)
    bound = tl.max(reached + group_noise, 0)

    # 2. Groups in falling order of what they can reach, while one can.
    best, best_id = tl.full([], float("-inf"), tl.float64), tl.full([], _NO_ID, tl.int32)
    most = tl.max(reach, 0)
    while (most > float("-inf")) & (most + _SLACK >= bound):
        place = tl.min(tl.where(reach == most, places, GROUPS), 0)
        is_it = places == place
        floor = tl.sum(tl.where(is_it, floors, 0.0), 0)
        winner = tl.sum(tl.where(is_it, lucky, 0), 0)
        ids = (tile * GROUPS + place) * _GROUP + members
        above = _exponential(_mixed(ids.to(tl.uint64) * _GOLDEN + key))
        noise = -tl.log(tl.where(members == winner, 0.0, above) + floor)
        sums = _scores(logits, ids, top, temperature, limit, VOCABULARY).to(tl.float64) + noise
        highest = tl.max(sums, 0)
        lowest_id = tl.min(tl.where(sums == highest, ids, _NO_ID), 0)
        is_tie = (highest == best) & (lowest_id < best_id)
        best_id = tl.where((highest > best) | is_tie, lowest_id, best_id)
        best = tl.maximum(best, highest)
        bound = tl.maximum(bound, best)
        reach = tl.where(is_it, float("-inf"), reach)
        most = tl.max(reach, 0)
    tl.store(best_sums + row * TILES + tile, best)
    tl.store(best_ids + row * TILES + tile, best_id)


@kernel
@no_type_check
def _pick(
    logits, stride, tops, log_sums, top_ids, temperatures, best_sums, best_ids, ids, logprobs,
    TILES: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, PAD)
    chosen, top = tl.load(top_ids + row), tl.load(tops + row)
    if tl.load(temperatures + row) > 0:
        sums = tl.load(best_sums + row * TILES + at, mask=at < TILES, other=float("-inf"))
        candidates = tl.load(best_ids + row * TILES + at, mask=at < TILES, other=_NO_ID)
        chosen = tl.min(tl.where(sums == tl.max(sums, 0), candidates, _NO_ID), 0).to(tl.int64)
    is_sound = (top == top) & (top != float("-inf")) & (chosen < _NO_ID)
    logit = tl.load(logits + row * stride + tl.where(is_sound, chosen, 0)).to(tl.float32)
    tl.store(ids + row, tl.where(is_sound, chosen, -1))
    tl.store(logprobs + row, tl.where(is_sound, logit - top - tl.load(log_sums + row), float("nan")))


def triton_scan(logits: torch.Tensor) -> Scanned:
    """One pass over logits [rows, vocabulary], any float type, any row stride."""
    num_rows, vocabulary = logits.shape
    tiles, device = cdiv(vocabulary, TILE), logits.device
    tile_tops = torch.empty(num_rows, tiles, device=device)
    tile_sums = torch.empty_like(tile_tops)
    tile_ids = torch.empty(num_rows, tiles, dtype=torch.int32, device=device)
    tops = torch.empty(num_rows, device=device)
    log_sums = torch.empty_like(tops)
    ids = torch.empty(num_rows, dtype=torch.int64, device=device)
    shape = {"VOCABULARY": vocabulary, "TILES": tiles, "TILE": TILE}
    _scan[(num_rows, tiles)](logits, logits.stride(0), tile_tops, tile_ids, tile_sums, **shape, num_warps=8)
    _choose[(num_rows,)](
        tile_tops, tile_ids, tile_sums, tops, ids, log_sums, TILES=tiles, PAD=power_of_2(tiles), num_warps=1
    )
    return Scanned(tops, ids, log_sums)


def triton_sample(
    logits: torch.Tensor,  # [rows, vocabulary], any float type, any row stride
    scanned: Scanned,
    temperatures: torch.Tensor,  # [rows], float32; 0: greedy
    limits: torch.Tensor,  # [rows], float32: lower scores are not drawn; -inf: all are
    prefixes: torch.Tensor,  # [rows], int64: `noise_prefix`
    indices: torch.Tensor,  # [rows], int64: of the id to be made, among the row's generated ones
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids, int64 [rows], and their log-probabilities, float32 [rows]; -1 and NaN where none can be chosen."""
    num_rows, vocabulary = logits.shape
    tiles, device = cdiv(vocabulary, TILE), logits.device
    best_sums = torch.empty(num_rows, tiles, dtype=torch.float64, device=device)
    best_ids = torch.empty(num_rows, tiles, dtype=torch.int32, device=device)
    ids = torch.empty(num_rows, dtype=torch.int64, device=device)
    logprobs = torch.empty(num_rows, dtype=torch.float32, device=device)
    _draw[(num_rows, tiles)](
        logits, logits.stride(0), scanned.tops, temperatures, limits, prefixes, indices, best_sums, best_ids,
        VOCABULARY=vocabulary, TILES=tiles, GROUPS=TILE // gumbel.GROUP, num_warps=4,
    )  # fmt: skip
    _pick[(num_rows,)](
        logits, logits.stride(0), scanned.tops, scanned.log_sums, scanned.ids, temperatures,
        best_sums, best_ids, ids, logprobs, TILES=tiles, PAD=power_of_2(tiles), num_warps=1,
    )  # fmt: skip
    return ids, logprobs


def reference_sums(
    logits: torch.Tensor,  # [rows, vocabulary]
    temperatures: torch.Tensor,  # [rows], all above 0
    limits: torch.Tensor,  # [rows]
    keys: torch.Tensor,  # [rows], int64: `gumbel.noise_key`
) -> torch.Tensor:
    """What the drawn rows take the argmax of, float64 [rows, vocabulary]."""
    values = logits.float()
    scores = (values - values.amax(-1, keepdim=True)) / temperatures[:, None]
    scores = scores.masked_fill(scores < limits[:, None], float("-inf"))
    ids = torch.arange(logits.shape[1], device=logits.device)[None]
    return scores.double() + gumbel.gumbel_noise(keys, ids)
