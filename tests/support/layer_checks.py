"""Inputs and comparisons for a layer's fused kernels; the interpreter's tests and the GPU's use the same."""

from dataclasses import dataclass
from typing import Literal

import torch

from pagebus.kernels.fp8 import dequantize
from pagebus.kernels.triton_gated import Activation, reference_gated, triton_gated
from pagebus.kernels.triton_norm import reference_rms_norm, triton_add_rms_norm
from pagebus.kernels.triton_rope_kv import HeadNorm, reference_rope_kv, triton_rope_kv

PAGE = 16


@dataclass
class RopeCase:
    heads: int
    kv_heads: int
    k_dim: int
    v_dim: int
    rotary: int
    is_interleaved: bool = False
    norm: Literal["plain", "offset"] | None = None
    num_tokens: int = 7
    dtype: torch.dtype = torch.float32
    page_dtype: torch.dtype | None = None
    slot_dtype: torch.dtype = torch.int64
    scales: tuple[float, float] | None = None
    has_nan: bool = False
    has_peaks: bool = False  # fp8 pages, each vector with its peak
    is_head_major: bool = False
    num_extra_columns: int = 0
    device: str = "cpu"
    tolerance: float = 1e-5


def check_rope(case: RopeCase) -> None:
    device, page_dtype = torch.device(case.device), case.page_dtype or case.dtype
    width = case.heads * case.k_dim + case.kv_heads * (case.k_dim + case.v_dim) + case.num_extra_columns
    qkv = torch.randn(case.num_tokens, width + 3, device=device).to(case.dtype)[:, :width]
    angles = torch.rand(50, case.rotary // 2, device=device) * 6
    positions = torch.randint(0, 50, (case.num_tokens,), device=device)
    slots = torch.randperm(5 * PAGE, device=device)[: case.num_tokens].to(case.slot_dtype)
    if case.num_tokens > 2:
        slots[1] = slots[-1] = -1
    norm = None
    if case.norm is not None:
        weights = torch.randn(2, case.k_dim, device=device).to(case.dtype)
        norm = HeadNorm(weights[0], weights[1], 1e-5, is_offset=case.norm == "offset")
    pages = []
    for dim in (case.k_dim, case.v_dim):
        page = torch.full((5, case.kv_heads, PAGE, dim), float("nan"), device=device)
        if case.is_head_major:
            page = page.transpose(0, 1).contiguous().transpose(0, 1)
        pages.append(page.to(page_dtype))
    scales = [
        None if case.scales is None else torch.tensor([s], device=device) for s in case.scales or (1, 1)
    ]
    peaks = [
        torch.full((5, case.kv_heads, PAGE), float("nan"), device=device) if case.has_peaks else None
        for _ in pages
    ]
    if case.has_nan:
        qkv[0, -1 - case.num_extra_columns] = float("nan")  # in the last head's values
    rotary = {"num_heads": case.heads, "is_interleaved": case.is_interleaved, "norm": norm}
    query = triton_rope_kv(
        qkv, *pages, positions, slots, angles.cos(), angles.sin(), **rotary,
        key_scale=scales[0], value_scale=scales[1], key_peaks=peaks[0], value_peaks=peaks[1],
    )  # fmt: skip
    expected, keys, values = reference_rope_kv(
        qkv, positions, angles.cos(), angles.sin(), **rotary, kv_heads=case.kv_heads, k_dim=case.k_dim
    )
    torch.testing.assert_close(query.double(), expected, atol=case.tolerance, rtol=case.tolerance)
    if case.has_peaks:
        for page, found, new in zip(pages, peaks, (keys, values), strict=True):
            _check_peaks(page, found, new, slots)
        return
    for page, new, scale in zip(pages, (keys, values), case.scales or (1, 1), strict=True):
        wanted = torch.full(page.shape, float("nan"), dtype=torch.float64, device=device)
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                wanted[slot // PAGE, :, slot % PAGE] = new[token] / scale
        close = {"atol": case.tolerance, "rtol": case.tolerance}
        if page_dtype == torch.float8_e4m3fn:
            wanted, close = wanted.clamp(-448, 448), {"atol": 0.01, "rtol": 0.07}
        torch.testing.assert_close(page.double(), wanted, **close, equal_nan=True)


def _check_peaks(page: torch.Tensor, peaks: torch.Tensor, new: torch.Tensor, slots: torch.Tensor) -> None:
    """Each vector's peak and numbers are there, and nothing else was written."""
    wanted = torch.full(page.shape, float("nan"), dtype=torch.float64, device=page.device)
    wanted_peaks = torch.full(peaks.shape, float("nan"), dtype=torch.float64, device=page.device)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            wanted[slot // PAGE, :, slot % PAGE] = new[token]
            wanted_peaks[slot // PAGE, :, slot % PAGE] = new[token].abs().amax(-1)
    torch.testing.assert_close(peaks.double(), wanted_peaks, atol=1e-2, rtol=1e-2, equal_nan=True)
    restored = dequantize(page, peaks).double()
    # Half a step of three bits of mantissa, and of the smallest step where a number is tiny beside its peak.
    room = 1.02 * (wanted.abs() / 16 + wanted_peaks[..., None] / 448 / 1024)
    assert torch.equal(restored.isnan(), (wanted + wanted_peaks[..., None]).isnan())
    worst = ((restored - wanted).abs() / room).nan_to_num().max()
    assert worst <= 1, worst
    largest = page.float().abs().amax(-1)
    assert (largest[~largest.isnan()] >= 416).all()


def check_norm(
    num_rows, dim, *, has_residual, is_offset, dtype=torch.float32, tolerance=1e-5, device="cpu"
) -> None:
    x = torch.randn(num_rows, dim + 2, device=device).to(dtype)[:, :dim]
    residual = torch.randn(num_rows, dim + 1, device=device).to(dtype)[:, 1:] if has_residual else None
    weight = torch.randn(dim, device=device).to(dtype)
    out, total = triton_add_rms_norm(x, residual, weight, 1e-6, is_offset=is_offset)
    wanted = x if residual is None else x + residual
    assert torch.equal(total, wanted)
    expected = reference_rms_norm(wanted, weight, 1e-6, is_offset=is_offset)
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


def check_gated(num_rows, width, activation: Activation, *, dtype, tolerance, device="cpu") -> None:
    gate_up = (torch.randn(num_rows, 2 * width + 3, device=device) * 3).to(dtype)[:, : 2 * width]
    gate_up[0, 0] = -300.0
    out = triton_gated(gate_up, activation)
    expected = reference_gated(gate_up, activation)
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
