"""Rows in float8 e4m3 with a peak each, and products of them. Knows no layer; `fp8.py` says what is stored.

```
inputs [rows, in] ── peak and numbers of each row, one program a row ──▶ e4m3 [rows, in], [rows]
weight e4m3 [out, in], [out]         product in e4m3, sum in float32, times both peaks / 448^2
```
"""
# ruff: noqa: ANN001, ANN202, N803 - kernels: arguments without types, constants in capitals

from typing import no_type_check

import torch

from pagebus.kernels import fp8
from pagebus.kernels.jit import HAS_TRITON, IS_INTERPRETED, kernel, power_of_2, tl

_IS_INTERPRETED = tl.constexpr(IS_INTERPRETED)
MULTIPLE = 16
"""What both sizes of a weight must be a multiple of for the product in e4m3."""


@kernel
@no_type_check
def on_e4m3_grid(values):  # noqa: ANN201 - called by kernels only
    """Float32 rounded to what e4m3 holds: only in the interpreter, whose own conversion loses carries."""
    if _IS_INTERPRETED:
        exponent = ((values.to(tl.int32, bitcast=True) >> 23) & 255) - 127
        far = tl.exp2((tl.maximum(exponent, -6) + 20).to(tl.float32)) * 1.5
        values = (values + far) - far
    return values


@kernel
@no_type_check
def _quantize(
    x, stored, peaks, stride,
    DIM: tl.constexpr, BLOCK: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Two passes over a row; the second finds it in the cache."""
    row = tl.program_id(0).to(tl.int64)
    largest, is_broken = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.int32)
    for start in range(0, DIM, BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = tl.load(x + row * stride + at, mask=at < DIM, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(values))
        is_broken |= (values != values).to(tl.int32)
    peak = tl.where(tl.max(is_broken, 0) > 0, float("nan"), tl.max(largest, 0))  # a maximum passes over NaN
    tl.store(peaks + row, peak)
    scale = tl.div_rn(tl.zeros_like(peak) + MOST, tl.maximum(peak, 1e-30))
    for start in range(0, DIM, BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = tl.load(x + row * stride + at, mask=at < DIM, other=0.0).to(tl.float32) * scale
        values = on_e4m3_grid(tl.minimum(tl.maximum(values, -MOST), MOST))
        tl.store(stored + row * DIM + at, values.to(stored.dtype.element_ty), mask=at < DIM)


def triton_quantize(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`fp8.quantize` of [rows, dim] in one kernel."""
    num_rows, dim = rows.shape
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    stored = torch.empty(num_rows, dim, dtype=torch.uint8, device=rows.device).view(fp8.DTYPE)
    peaks = torch.empty(num_rows, dtype=torch.float32, device=rows.device)
    if num_rows:
        _quantize[(num_rows,)](
            rows, stored, peaks, rows.stride(0),
            DIM=dim, BLOCK=min(2048, power_of_2(dim)), MOST=fp8.MOST, num_warps=4,
        )  # fmt: skip
    return stored, peaks


def fp8_linear(
    inputs: torch.Tensor,  # [rows, in]
    weight: torch.Tensor,  # [out, in], e4m3
    weight_peaks: torch.Tensor,  # [out], float32
    bias: torch.Tensor | None = None,  # [out]
    *,
    scales: torch.Tensor | None = None,  # [1, out]: `product_scales(weight_peaks)`, computed once
) -> torch.Tensor:  # [rows, out], in the inputs' type
    """inputs @ weight^T + bias, the inputs quantized a row at a time; on a GPU with its units for e4m3."""
    if inputs.device.type != "cuda":
        quantize = triton_quantize if HAS_TRITON and IS_INTERPRETED else fp8.quantize
        return reference_fp8_linear(*quantize(inputs), weight, weight_peaks, bias).to(inputs.dtype)
    stored, peaks = triton_quantize(inputs)
    out = torch._scaled_mm(
        stored,
        weight.t(),
        scale_a=peaks[:, None],
        scale_b=product_scales(weight_peaks) if scales is None else scales,
        bias=bias if bias is not None and bias.dtype == torch.bfloat16 else None,
        out_dtype=torch.bfloat16,  # the only one that scales of rows go with
        use_fast_accum=True,
    )
    if bias is not None and bias.dtype != torch.bfloat16:
        out = out + bias
    return out.to(inputs.dtype)


def product_scales(weight_peaks: torch.Tensor) -> torch.Tensor:  # [out] -> [1, out]
    """What a product of stored numbers is multiplied by, besides its row's peak."""
    return (weight_peaks / fp8.MOST**2)[None, :]


def reference_fp8_linear(
    stored: torch.Tensor,  # [rows, in], e4m3
    peaks: torch.Tensor,  # [rows]
    weight: torch.Tensor,
    weight_peaks: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The product of what is stored, in float64."""
    out = stored.double() @ weight.double().t()
    out = out * (peaks.double()[:, None] / fp8.MOST) * (weight_peaks.double()[None, :] / fp8.MOST)
    return out if bias is None else out + bias.double()
