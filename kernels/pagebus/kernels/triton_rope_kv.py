"""Rotary, q/k norm and the write into the pages, in one kernel after the QKV product. Knows no model.

```
qkv [tokens, Hq * K | Hk * K | Hk * V] ─┬─ q: norm, rotate ──▶ [tokens, Hq, K]
                                        ├─ k: norm, rotate ──▶ key_pages[slot]
                                        └─ v ────────────────▶ value_pages[slot]
```

All arithmetic is in float32, rounded once when stored.
"""
# ruff: noqa: ANN001, ANN202, N803, N806 - kernels: arguments without types, constants in capitals

from dataclasses import dataclass
from typing import no_type_check

import torch

from pagebus.kernels.fp8 import MOST, peak_strides
from pagebus.kernels.jit import cdiv, kernel, kernel_with, power_of_2, tl
from pagebus.kernels.triton_fp8 import on_e4m3_grid
from pagebus.kernels.triton_norm import reference_rms_norm

_HEADS = 8  # heads a program


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """RMSNorm over each head's numbers; `is_offset`: times (1 + weight), as Gemma has it."""

    query_weight: torch.Tensor  # [key_dim]
    key_weight: torch.Tensor  # [key_dim]
    eps: float
    is_offset: bool = False


@kernel
@no_type_check
def _rotated(
    x, x_at, cos, sin, weight, eps, is_head, dims,
    DIM: tl.constexpr, ROTARY: tl.constexpr, IS_INTERLEAVED: tl.constexpr, IS_OFFSET: tl.constexpr,
):  # fmt: skip
    """Heads [HEADS, DIM_PAD] in float32, normed and rotated; `cos`, `sin` point at the position's factors.

    A number's partner is the other one of the pair that is turned together; it is loaded again (from L1).
    """
    HALF: tl.constexpr = ROTARY // 2
    is_rotary = dims < ROTARY
    if IS_INTERLEAVED:
        partners, factors, is_first = dims ^ 1, dims // 2, dims % 2 == 0
    else:
        is_first = dims < HALF
        partners = tl.where(is_first, dims + HALF, dims - HALF)
        factors = tl.where(is_first, dims, dims - HALF)
    is_there = is_head[:, None] & (dims < DIM)[None, :]
    is_turned = is_head[:, None] & is_rotary[None, :]
    own = tl.load(x + x_at + dims[None, :], mask=is_there, other=0.0).to(tl.float32)
    other = tl.load(x + x_at + partners[None, :], mask=is_turned, other=0.0).to(tl.float32)
    if weight is not None:
        scale = tl.rsqrt(tl.sum(own * own, 1) / DIM + eps)[:, None]
        own_weight = tl.load(weight + dims, mask=dims < DIM, other=0.0).to(tl.float32)
        other_weight = tl.load(weight + partners, mask=is_rotary, other=0.0).to(tl.float32)
        if IS_OFFSET:
            own_weight += 1.0
            other_weight += 1.0
        own *= scale * own_weight[None, :]
        other *= scale * other_weight[None, :]
    cosines = tl.load(cos + factors, mask=is_rotary, other=1.0).to(tl.float32)
    sines = tl.load(sin + factors, mask=is_rotary, other=0.0).to(tl.float32)
    return own * cosines[None, :] + other * tl.where(is_first, -sines, sines)[None, :]


@kernel
@no_type_check
def _quantized(values, scale, peaks, peaks_at, is_head, IS_FP8: tl.constexpr, MOST: tl.constexpr):
    """Heads' vectors as they are stored, by one scale for all or by each one's peak, which is written."""
    if scale is not None:
        values = values / tl.load(scale)
    if peaks is not None:
        is_broken = tl.max((values != values).to(tl.int32), 1) > 0  # a maximum passes over NaN
        found = tl.where(is_broken, float("nan"), tl.max(tl.abs(values), 1))
        tl.store(peaks + peaks_at, found, mask=is_head)
        values *= tl.div_rn(tl.zeros_like(found) + MOST, tl.maximum(found, 1e-30))[:, None]
    if IS_FP8:  # a conversion alone would make NaN of what is too large
        values = on_e4m3_grid(tl.minimum(tl.maximum(values, -MOST), MOST))
    return values


@kernel_with(loose=("positions", "slots"))
@no_type_check
def _rope_kv(
    qkv, q_out, k_pages, v_pages, positions, slots, cos, sin, q_weight, k_weight, k_scale, v_scale,
    k_peaks, v_peaks, eps,
    qkv_st, table_stride, k_sb, k_sh, k_ss, v_sb, v_sh, v_ss, kp_sb, kp_sh, vp_sb, vp_sh,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, K_DIM: tl.constexpr, K_PAD: tl.constexpr,
    V_DIM: tl.constexpr, V_PAD: tl.constexpr, ROTARY: tl.constexpr, PAGE: tl.constexpr,
    HEADS: tl.constexpr, IS_INTERLEAVED: tl.constexpr, IS_OFFSET: tl.constexpr,
    IS_FP8: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    Q_PARTS: tl.constexpr = (Q_HEADS + HEADS - 1) // HEADS
    position = tl.load(positions + token).to(tl.int64)
    cos += position * table_stride
    sin += position * table_stride
    dims = tl.arange(0, K_PAD)
    if part < Q_PARTS:
        heads = part * HEADS + tl.arange(0, HEADS)
        x_at = token * qkv_st + heads[:, None] * K_DIM
        turned = _rotated(qkv, x_at, cos, sin, q_weight, eps, heads < Q_HEADS, dims, K_DIM, ROTARY,
                          IS_INTERLEAVED, IS_OFFSET)  # fmt: skip
        q_at = q_out + (token * Q_HEADS + heads[:, None]) * K_DIM + dims[None, :]
        is_query = (heads < Q_HEADS)[:, None] & (dims < K_DIM)[None, :]
        tl.store(q_at, turned.to(q_out.dtype.element_ty), mask=is_query)
    else:
        slot = tl.load(slots + token).to(tl.int64)
        heads = (part - Q_PARTS) * HEADS + tl.arange(0, HEADS)
        is_head = heads < tl.where(slot >= 0, KV_HEADS, 0)
        block, place = slot // PAGE, slot % PAGE
        x_at = token * qkv_st + (Q_HEADS + heads[:, None]) * K_DIM
        turned = _rotated(qkv, x_at, cos, sin, k_weight, eps, is_head, dims, K_DIM, ROTARY,
                          IS_INTERLEAVED, IS_OFFSET)  # fmt: skip
        k_peaks_at = block * kp_sb + heads * kp_sh + place
        turned = _quantized(turned, k_scale, k_peaks, k_peaks_at, is_head, IS_FP8, MOST)
        k_at = k_pages + block * k_sb + place * k_ss + heads[:, None] * k_sh + dims[None, :]
        tl.store(k_at, turned.to(k_pages.dtype.element_ty), mask=is_head[:, None] & (dims < K_DIM)[None, :])

        v_dims = tl.arange(0, V_PAD)
        is_value = is_head[:, None] & (v_dims < V_DIM)[None, :]
        values_at = token * qkv_st + (Q_HEADS + KV_HEADS) * K_DIM + heads[:, None] * V_DIM + v_dims[None, :]
        values = tl.load(qkv + values_at, mask=is_value, other=0.0).to(tl.float32)
        v_peaks_at = block * vp_sb + heads * vp_sh + place
        values = _quantized(values, v_scale, v_peaks, v_peaks_at, is_head, IS_FP8, MOST)
        values = values.to(v_pages.dtype.element_ty)
        v_at = v_pages + block * v_sb + place * v_ss + heads[:, None] * v_sh + v_dims[None, :]
        tl.store(v_at, values, mask=is_value)


def triton_rope_kv(
    qkv: torch.Tensor,  # [tokens, heads * key_dim + kv_heads * (key_dim + value_dim)]
    key_pages: torch.Tensor,  # [blocks, kv_heads, BLOCK_SIZE, key_dim], written
    value_pages: torch.Tensor,  # [blocks, kv_heads, BLOCK_SIZE, value_dim], written
    positions: torch.Tensor,  # [tokens], int32 or int64; below the table's length, of padding too
    slots: torch.Tensor,  # [tokens], int32 or int64: block * BLOCK_SIZE + place; -1: nothing is written
    cos: torch.Tensor,  # [positions, rotary_dim / 2]: only the first rotary_dim numbers of a head are turned
    sin: torch.Tensor,
    *,
    num_heads: int,
    is_interleaved: bool = False,  # pairs (0, 1), (2, 3), ...; else (0, rotary_dim / 2), ...
    norm: HeadNorm | None = None,
    key_scale: torch.Tensor | None = None,  # [1], float32: stored = key / key_scale
    value_scale: torch.Tensor | None = None,
    key_peaks: torch.Tensor | None = None,  # [blocks, kv_heads, BLOCK_SIZE], float32, written; fp8 pages only
    value_peaks: torch.Tensor | None = None,
) -> torch.Tensor:  # [tokens, heads, key_dim]
    """The queries, rotated; rotated keys and values are written into their slots, no two tokens into one.

    With peaks, each vector's largest magnitude is written there and stored = vector * 448 / peak.
    """
    num_tokens, (_, kv_heads, page, k_dim), v_dim = len(qkv), key_pages.shape, value_pages.shape[3]
    if qkv.shape[1] != num_heads * k_dim + kv_heads * (k_dim + v_dim):
        raise ValueError(
            f"{qkv.shape[1]} columns for {num_heads} and {kv_heads} heads of {k_dim} and {v_dim}"
        )
    if cos.stride() != sin.stride():
        raise ValueError("the tables of cosines and sines are laid out differently")
    query = torch.empty(num_tokens, num_heads, k_dim, dtype=qkv.dtype, device=qkv.device)
    if not num_tokens:
        return query
    _rope_kv[(num_tokens, cdiv(num_heads, _HEADS) + cdiv(kv_heads, _HEADS))](
        qkv, query, key_pages, value_pages, positions, slots, cos, sin,
        norm.query_weight if norm else None, norm.key_weight if norm else None, key_scale, value_scale,
        key_peaks, value_peaks, norm.eps if norm else 0.0, qkv.stride(0), cos.stride(0),
        *key_pages.stride()[:3], *value_pages.stride()[:3], *peak_strides(key_peaks),
        *peak_strides(value_peaks),
        Q_HEADS=num_heads, KV_HEADS=kv_heads, K_DIM=k_dim, K_PAD=power_of_2(k_dim),
        V_DIM=v_dim, V_PAD=power_of_2(v_dim), ROTARY=2 * cos.shape[1], PAGE=page, HEADS=_HEADS,
        IS_INTERLEAVED=is_interleaved, IS_OFFSET=bool(norm and norm.is_offset),
        IS_FP8=key_pages.dtype == torch.float8_e4m3fn, MOST=MOST, num_warps=4,
    )  # fmt: skip
    return query


def reference_rope_kv(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    num_heads: int,
    kv_heads: int,
    k_dim: int,
    is_interleaved: bool = False,
    norm: HeadNorm | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries [tokens, heads, key_dim], keys and values [tokens, kv_heads, dim], all float64."""
    sizes = [num_heads * k_dim, kv_heads * k_dim]
    parts = torch.split(qkv.double(), [*sizes, qkv.shape[1] - sum(sizes)], 1)
    by_head = zip(parts, (num_heads, kv_heads, kv_heads), strict=True)
    query, key, value = (part.reshape(len(qkv), heads, part.shape[1] // heads) for part, heads in by_head)
    if norm is not None:
        query = reference_rms_norm(query, norm.query_weight, norm.eps, is_offset=norm.is_offset)
        key = reference_rms_norm(key, norm.key_weight, norm.eps, is_offset=norm.is_offset)
    factors = cos[positions.long()].double()[:, None], sin[positions.long()].double()[:, None]
    return (
        _reference_rotated(query, *factors, is_interleaved),
        _reference_rotated(key, *factors, is_interleaved),
        value,
    )


def _reference_rotated(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_interleaved: bool
) -> torch.Tensor:
    rotary = 2 * cos.shape[-1]
    turned, rest = x[..., :rotary], x[..., rotary:]
    if is_interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned.chunk(2, -1)
    pair = (first * cos - second * sin, second * cos + first * sin)
    joined = torch.stack(pair, -1).flatten(-2) if is_interleaved else torch.cat(pair, -1)
    return torch.cat((joined, rest), -1)
