"""Paged attention on a GPU: a mixed batch in one launch, or split over the keys. Knows no model and no bus.

One idea: a program owns a tile of BLOCK_M rows, (query, head) pairs of one KV head, so that heads which share
keys read them once, and walks the keys' tiles that any of its queries sees with a running softmax.

```
rows of the tile     query 0: head 0 .. GROUP-1 | query 1: head 0 .. GROUP-1 | ...
keys' tiles          |masked by the window|  seen by all queries  |masked by causality|   others: never read
```

Decoding few rows leaves most of a GPU idle, so there the keys are cut into segments, each with a program of
its own, whose results (maximum, sum, weighted values) a second kernel adds up in the segments' order.
"""
# ruff: noqa: ANN001, ANN202, N803 - kernels: arguments without types, constants in capitals

from dataclasses import dataclass, replace
from typing import no_type_check

import torch

from pagebus.kernels.fp8 import MOST, peak_strides
from pagebus.kernels.jit import (
    cdiv,
    compute_type,
    kernel,
    kernel_with,
    num_multiprocessors,
    power_of_2,
    tl,
)

MAX_SEGMENTS = 32

_LOG2E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(-1e30)  # instead of -inf: a query that has seen no key yet makes no NaN


@dataclass(frozen=True, slots=True)
class TileConfig:
    """How a launch is cut; `tile` keys at once, rounded to whole blocks."""

    block_m: int
    tile: int
    num_warps: int
    num_stages: int


@kernel
@no_type_check
def _load(pointers, rows, dims, BY_ROW: tl.constexpr, BY_DIM: tl.constexpr):
    """Values, zero where masked; no mask where none is needed."""
    if BY_ROW:
        if BY_DIM:
            values = tl.load(pointers, mask=rows & dims, other=0.0)
        else:
            values = tl.load(pointers, mask=rows, other=0.0)
    elif BY_DIM:
        values = tl.load(pointers, mask=dims, other=0.0)
    else:
        values = tl.load(pointers)
    return values


@kernel
@no_type_check
def _walk(
    state, query, at, begin, end, first_key, stop_key, k_base, v_base, k_peaks, v_peaks, table, strides,
    logit_scale, softcap,
    IS_MASKED: tl.constexpr, TILE: tl.constexpr, PAGE: tl.constexpr, K_DIM: tl.constexpr,
    K_MAIN: tl.constexpr, K_REST: tl.constexpr, V_DIM: tl.constexpr, V_PAD: tl.constexpr,
    WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The tiles [begin, end) added to (maxima, sums, weighted values)."""
    highest, total, result = state
    main, rest = tl.arange(0, K_MAIN)[:, None], K_MAIN + tl.arange(0, K_REST)[:, None]
    values_at = tl.arange(0, V_PAD)[None, :]
    for start in range(begin, end, TILE):
        # 1. Where the tile's keys lie; no table entry and no slot is read that no query may see.
        keys = start + tl.arange(0, TILE)
        is_read = (keys >= first_key) & (keys < stop_key)
        if IS_MASKED:
            blocks = tl.load(table + keys // PAGE, mask=is_read, other=0).to(tl.int64)
        else:
            blocks = tl.load(table + keys // PAGE).to(tl.int64)
        k_at = k_base + blocks * strides[0] + (keys % PAGE) * strides[1]
        v_at = v_base + blocks * strides[2] + (keys % PAGE) * strides[3]

        # 2. Logits, in units of log 2.
        part = _load(k_at[None, :] + main, is_read[None, :], main < K_DIM, IS_MASKED, K_MAIN > K_DIM)
        logits = tl.dot(query[0], part.to(DOT), input_precision="ieee")
        if K_MAIN < K_DIM:
            is_padded: tl.constexpr = K_MAIN + K_REST > K_DIM
            part = _load(k_at[None, :] + rest, is_read[None, :], rest < K_DIM, IS_MASKED, is_padded)
            logits = tl.dot(query[1], part.to(DOT), logits, input_precision="ieee")
        logits *= logit_scale
        if k_peaks is not None:
            peaks = _load(k_peaks + blocks * strides[4] + keys % PAGE, is_read, is_read, IS_MASKED, False)
            logits *= peaks[None, :]
        if HAS_SOFTCAP:  # tanh from one exponential; the scale is already divided by the cap
            logits = softcap * (1 - 2 / (1 + tl.exp2(logits * 2)))
        if IS_MASKED:
            is_seen = (keys[None, :] <= at[:, None]) & is_read[None, :]
            if WINDOW > 0:
                is_seen &= keys[None, :] > at[:, None] - WINDOW
            logits = tl.where(is_seen, logits, float("-inf"))

        # 3. The running softmax.
        new_highest = tl.maximum(highest, tl.max(logits, 1))
        weights = tl.exp2(logits - new_highest[:, None])
        shrink = tl.exp2(highest - new_highest)
        total = total * shrink + tl.sum(weights, 1)
        dims = values_at < V_DIM
        values = _load(v_at[:, None] + values_at, is_read[:, None], dims, IS_MASKED, V_PAD > V_DIM)
        if v_peaks is not None:  # fewer products than with the values, and the sum above does without
            peaks = _load(v_peaks + blocks * strides[5] + keys % PAGE, is_read, is_read, IS_MASKED, False)
            weights *= peaks[None, :]
        result = tl.dot(weights.to(DOT), values.to(DOT), result * shrink[:, None], input_precision="ieee")
        highest = new_highest
    return highest, total, result


@kernel
@no_type_check
def _find_row(cu_seqlens, num_rows, block, BLOCK_Q: tl.constexpr):
    """Which row the tile belongs to: row r's tiles begin at cu_seqlens[r] // BLOCK_Q + r."""
    low, high = 0, num_rows
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(cu_seqlens + middle) // BLOCK_Q + middle <= block:
            low = middle
        else:
            high = middle - 1
    return low


@kernel
@no_type_check
def _load_query(
    q_at, sinks, heads, is_query, segment,
    BLOCK_M: tl.constexpr, K_DIM: tl.constexpr, K_MAIN: tl.constexpr, K_REST: tl.constexpr,
    V_PAD: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The query in two parts, and what its softmax starts from: nothing, or the sink."""
    main, rest = tl.arange(0, K_MAIN)[None, :], K_MAIN + tl.arange(0, K_REST)[None, :]
    query_main = tl.load(q_at[:, None] + main, mask=is_query[:, None] & (main < K_DIM), other=0.0).to(DOT)
    query_rest = query_main
    if K_MAIN < K_DIM:
        query_rest = tl.load(q_at[:, None] + rest, mask=is_query[:, None] & (rest < K_DIM), other=0.0).to(DOT)
    highest = tl.full([BLOCK_M], _LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if sinks is not None:  # noqa: SIM102 - decided when compiled, the inner one when run
        if segment == 0:
            highest = tl.load(sinks + heads, mask=is_query, other=0.0).to(tl.float32) * _LOG2E
            total += 1.0
    return (query_main, query_rest), (highest, total, tl.zeros([BLOCK_M, V_PAD], tl.float32))


@kernel
@no_type_check
def _walk_all(
    state, query, at, position, first, last, begin, first_key, stop_key,
    k_base, v_base, k_peaks, v_peaks, table, strides, logit_scale, softcap,
    IS_DECODE: tl.constexpr, TILE: tl.constexpr, PAGE: tl.constexpr, K_DIM: tl.constexpr,
    K_MAIN: tl.constexpr, K_REST: tl.constexpr, V_DIM: tl.constexpr, V_PAD: tl.constexpr,
    WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """All tiles; where queries are many, without masks where all of them see all keys."""
    if not IS_DECODE:
        full_end = tl.maximum(position + first + 1, 0) // TILE * TILE
        if WINDOW > 0:
            full_begin = (tl.maximum(last - WINDOW + 1, 0) + TILE - 1) // TILE * TILE
            state = _walk(
                state, query, at, begin, tl.minimum(full_begin, stop_key), first_key, stop_key,
                k_base, v_base, k_peaks, v_peaks, table, strides, logit_scale, softcap,
                True, TILE, PAGE, K_DIM, K_MAIN, K_REST, V_DIM, V_PAD, WINDOW, HAS_SOFTCAP, DOT,
            )  # fmt: skip
            begin = full_begin
        state = _walk(
            state, query, at, begin, full_end, first_key, stop_key,
            k_base, v_base, k_peaks, v_peaks, table, strides, logit_scale, softcap,
            False, TILE, PAGE, K_DIM, K_MAIN, K_REST, V_DIM, V_PAD, WINDOW, HAS_SOFTCAP, DOT,
        )  # fmt: skip
        begin = tl.maximum(begin, full_end)
    return _walk(
        state, query, at, begin, stop_key, first_key, stop_key,
        k_base, v_base, k_peaks, v_peaks, table, strides, logit_scale, softcap,
        True, TILE, PAGE, K_DIM, K_MAIN, K_REST, V_DIM, V_PAD, WINDOW, HAS_SOFTCAP, DOT,
    )  # fmt: skip


@kernel
@no_type_check
def _store(
    state, out, part_max, part_sum, v_scale, out_scale, place, segment, is_query,
    V_DIM: tl.constexpr, V_PAD: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """Results [tokens, heads], or a segment's part of them [tokens, heads, segments]."""
    highest, total, result = state
    if v_scale is not None:
        result *= tl.load(v_scale)
    if out_scale is not None:
        result *= out_scale
    values_at = tl.arange(0, V_PAD)[None, :]
    if SEGMENTS > 1:
        place = place * SEGMENTS + segment
        tl.store(part_max + place, highest, mask=is_query)
        tl.store(part_sum + place, total, mask=is_query)
    else:
        result = result / tl.where(total > 0, total, 1.0)[:, None]
    is_stored = is_query[:, None] & (values_at < V_DIM)
    tl.store(out + place[:, None] * V_DIM + values_at, result.to(out.dtype.element_ty), mask=is_stored)


@kernel_with(counts=("num_rows", "num_tokens", "table_stride"), loose=("tables", "contexts", "cu_seqlens"))
@no_type_check
def _attend(
    q, k_pages, v_pages, out, part_max, part_sum, tables, contexts, cu_seqlens, sinks, k_scale, v_scale,
    k_peaks, v_peaks, num_rows, num_tokens, scale, softcap, out_scale,
    q_st, q_sh, k_sb, k_sh, k_ss, v_sb, v_sh, v_ss, kp_sb, kp_sh, vp_sb, vp_sh, table_stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr,
    TILE: tl.constexpr, PAGE: tl.constexpr, K_DIM: tl.constexpr, K_MAIN: tl.constexpr,
    K_REST: tl.constexpr, V_DIM: tl.constexpr, V_PAD: tl.constexpr, WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, IS_DECODE: tl.constexpr, SEGMENTS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    # 1. Which queries. Tokens after the last row's are one more row, without keys: they get zeros.
    block, kv_head, segment = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if IS_DECODE:
        row, row_token, num_queries, first = block, block, 1, 0
    else:
        row = _find_row(cu_seqlens, num_rows, block, BLOCK_Q)
        row_token = tl.load(cu_seqlens + row)
        num_queries = tl.load(cu_seqlens + row + 1, mask=row < num_rows, other=num_tokens) - row_token
        first = (block - row_token // BLOCK_Q - row) * BLOCK_Q
        if first >= num_queries:
            return
    context = tl.load(contexts + row, mask=row < num_rows, other=0)
    places = tl.arange(0, BLOCK_M)
    queries = first + places // GROUP
    is_query = (places < BLOCK_Q * GROUP) & (queries < num_queries)
    heads = kv_head * GROUP + places % GROUP
    tokens = (row_token + queries).to(tl.int64)
    position = context - num_queries
    last = position + tl.minimum(first + BLOCK_Q, num_queries) - 1

    # 2. Which keys.
    stop_key = tl.minimum(context, last + 1)
    first_key = tl.maximum(position + first - WINDOW + 1, 0) if WINDOW > 0 else 0
    begin = first_key // TILE * TILE
    if SEGMENTS > 1:
        length = (tl.maximum(stop_key - begin, 0) + TILE * SEGMENTS - 1) // (TILE * SEGMENTS) * TILE
        begin += segment * length
        stop_key = tl.minimum(stop_key, begin + length)

    # 3. The running softmax over them.
    query, state = _load_query(q + tokens * q_st + heads * q_sh, sinks, heads, is_query, segment,
                               BLOCK_M, K_DIM, K_MAIN, K_REST, V_PAD, DOT)  # fmt: skip
    logit_scale = scale if k_scale is None else scale * tl.load(k_scale)
    state = _walk_all(
        state, query, position + queries, position, first, last, begin, first_key, stop_key,
        k_pages + kv_head.to(tl.int64) * k_sh, v_pages + kv_head.to(tl.int64) * v_sh,
        None if k_peaks is None else k_peaks + kv_head.to(tl.int64) * kp_sh,
        None if v_peaks is None else v_peaks + kv_head.to(tl.int64) * vp_sh,
        tables + row * table_stride, (k_sb, k_ss, v_sb, v_ss, kp_sb, vp_sb), logit_scale, softcap,
        IS_DECODE, TILE, PAGE, K_DIM, K_MAIN, K_REST, V_DIM, V_PAD, WINDOW, HAS_SOFTCAP, DOT,
    )  # fmt: skip
    _store(state, out, part_max, part_sum, v_scale, out_scale, tokens * HEADS + heads, segment, is_query,
           V_DIM, V_PAD, SEGMENTS)  # fmt: skip


@kernel
@no_type_check
def _reduce(
    parts, part_max, part_sum, out,
    V_DIM: tl.constexpr, V_PAD: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """Add the segments of one (token, head); a segment without keys is not read."""
    place = tl.program_id(0).to(tl.int64)
    segments, values_at = tl.arange(0, SEGMENTS), tl.arange(0, V_PAD)
    maxima = tl.load(part_max + place * SEGMENTS + segments)
    sums = tl.load(part_sum + place * SEGMENTS + segments)
    factors = tl.where(sums > 0, tl.exp2(maxima - tl.max(maxima, 0)), 0.0)
    total = tl.sum(sums * factors, 0)
    is_read = (sums > 0)[:, None] & (values_at < V_DIM)[None, :]
    partial = tl.load(
        parts + (place * SEGMENTS + segments)[:, None] * V_DIM + values_at[None, :], mask=is_read, other=0.0
    )
    result = tl.sum(partial * factors[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + place * V_DIM + values_at, result.to(out.dtype.element_ty), mask=values_at < V_DIM)


def tile_config(k_dim: int, v_dim: int, dtype: torch.dtype, group: int, *, is_decode: bool) -> TileConfig:
    """The cut for Hopper: decoding reads memory and wants many bytes in flight, prompts large products."""
    widest, is_full = max(k_dim, v_dim), dtype == torch.float32
    is_wide = widest > 128
    if is_full:  # for comparisons, not for speed
        config = TileConfig(16, 16, 8, 1) if is_wide else TileConfig(16, 32, 4, 1)
    elif is_decode:
        config = TileConfig(16, 32 if is_wide else 64, 4, 3)
    elif widest > 256:
        config = TileConfig(32, 32, 8, 2)
    elif is_wide:
        config = TileConfig(64, 32, 4, 2)
    else:
        config = TileConfig(128, 64, 8, 3)
    return replace(config, block_m=max(config.block_m, power_of_2(group)))


def num_segments(num_rows: int, kv_heads: int, max_context: int, tile: int, num_processors: int) -> int:
    """How many parts a decoding row's keys are cut into, so that all processors have two programs.

    A function of a launch's shape alone, so it is constant in a CUDA graph. A part has at least four tiles.
    """
    wanted = cdiv(2 * num_processors, max(1, num_rows * kv_heads))
    most = max(1, max_context // (4 * tile))
    return min(power_of_2(wanted), 1 << (most.bit_length() - 1), MAX_SEGMENTS)


def _dims(dim: int) -> tuple[int, int]:
    """A head's size as one product, or as two where one padded to a power of two would waste much."""
    padded = max(16, power_of_2(dim))
    rest = max(16, power_of_2(dim - padded // 2))
    return (padded // 2, rest) if dim > 16 and padded // 2 + rest < padded else (padded, 16)


def triton_paged_attention(
    query: torch.Tensor,  # [tokens, heads, key_dim]; any strides but the last
    key_pages: torch.Tensor,  # [blocks, kv_heads, BLOCK_SIZE, key_dim]; any strides but the last
    value_pages: torch.Tensor,  # [blocks, kv_heads, BLOCK_SIZE, value_dim]; or a view of the keys (latent)
    tables: torch.Tensor,  # [rows, max_blocks], int32
    contexts: torch.Tensor,  # [rows], int32: keys of each row, its queries' own included; 0: zeros come out
    cu_seqlens: torch.Tensor | None,  # [rows + 1], int32; None: decoding, token r is row r's
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,  # [heads]
    key_scale: torch.Tensor | None = None,  # [1], float32: key = stored * key_scale
    value_scale: torch.Tensor | None = None,  # [1], float32
    key_peaks: torch.Tensor | None = None,  # [blocks, kv_heads, BLOCK_SIZE], float32, of fp8 pages:
    value_peaks: torch.Tensor | None = None,  # key = stored * peak / 448
    segments: int | None = None,
    config: TileConfig | None = None,
) -> torch.Tensor:  # [tokens, heads, value_dim]
    """Causal attention over pages that hold the batch's own keys; a row's queries are its last positions.

    The grid depends on shapes only. With fixed `segments` and `config` rows give the same bits in any batch.
    """
    num_tokens, num_heads, k_dim = query.shape
    _, kv_heads, page, v_dim = value_pages.shape
    num_rows, max_blocks = tables.shape
    is_decode, group = cu_seqlens is None, num_heads // kv_heads
    if is_decode and num_tokens != num_rows:
        raise ValueError(f"{num_tokens} tokens for {num_rows} decoding rows")
    config = config or tile_config(k_dim, v_dim, query.dtype, group, is_decode=is_decode)
    block_q = config.block_m // group
    if segments is None:
        most = min(max_blocks * page, window or max_blocks * page)
        at_once = num_multiprocessors(query.device)
        segments = num_segments(num_rows, kv_heads, most, config.tile, at_once) if is_decode else 1
    out = torch.empty(num_tokens, num_heads, v_dim, dtype=query.dtype, device=query.device)
    parts, maxima, sums = out, out, out
    if segments > 1:
        maxima = torch.empty(num_tokens, num_heads, segments, device=query.device)
        sums = torch.empty_like(maxima)
        parts = torch.empty(num_tokens, num_heads, segments, v_dim, device=query.device)
    k_main, k_rest = _dims(k_dim)
    logit_scale = (scale / softcap if softcap else scale) / (1.0 if key_peaks is None else MOST)
    _attend[(num_rows if is_decode else num_tokens // block_q + num_rows + 1, kv_heads, segments)](
        query, key_pages, value_pages, parts, maxima, sums, tables, contexts, cu_seqlens, sinks,
        key_scale, value_scale, key_peaks, value_peaks, num_rows, num_tokens,
        logit_scale * _LOG2E.value, (softcap or 0.0) * _LOG2E.value,
        None if value_peaks is None else 1 / MOST,
        *query.stride()[:2], *key_pages.stride()[:3], *value_pages.stride()[:3],
        *peak_strides(key_peaks), *peak_strides(value_peaks), tables.stride(0),
        HEADS=num_heads, GROUP=group, BLOCK_M=config.block_m, BLOCK_Q=block_q, TILE=config.tile, PAGE=page,
        K_DIM=k_dim, K_MAIN=k_main, K_REST=k_rest, V_DIM=v_dim, V_PAD=max(16, power_of_2(v_dim)),
        WINDOW=window or 0, HAS_SOFTCAP=bool(softcap), IS_DECODE=is_decode, SEGMENTS=segments,
        DOT=compute_type(query.dtype), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if segments > 1:
        _reduce[(num_tokens * num_heads,)](
            parts, maxima, sums, out, V_DIM=v_dim, V_PAD=power_of_2(v_dim), SEGMENTS=segments, num_warps=2
        )
    return out
