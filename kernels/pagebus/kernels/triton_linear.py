"""A linear whose rows do not depend on their batch: one cut, one order of sums. Knows no layer.

```
inputs [rows, in]      a program has BLOCK_M rows and BLOCK_N outputs, and walks `in` from its start in steps
weight [out, in]       of BLOCK_K, adding in float32: no part of that depends on how many rows there are
```

Libraries choose other tiles, and split the sum, by the number of rows. Their choice is faster; this one is
always the same. Inputs and weight may be in e4m3 with peaks (`fp8.py`): e4m3 is exact in what is multiplied.
"""
# ruff: noqa: ANN001, ANN202, N803 - kernels: arguments without types, constants in capitals

from typing import no_type_check

import torch

from pagebus.kernels.fp8 import MOST
from pagebus.kernels.jit import cdiv, compute_type, kernel_with, tl

_PROCESSORS = 132  # of a Hopper GPU
_GROUP_M = 8  # tiles of rows that share a tile of weights while it is in the second cache


@kernel_with(counts=("num_rows",))
@no_type_check
def _linear(
    inputs, weight, bias, in_peaks, weight_peaks, out, num_rows, scale,
    in_sb, in_sr, weight_sb, weight_sr, weight_sk, out_sb, out_sr,
    NUM_IN: tl.constexpr, NUM_OUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    # 1. Which tile: neighbours in launch order take the same weights.
    program, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_m, num_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(NUM_OUT, BLOCK_N)
    group = program // (GROUP_M * num_n)
    height = tl.minimum(num_m - group * GROUP_M, GROUP_M)
    tile_m = group * GROUP_M + (program % (GROUP_M * num_n)) % height
    tile_n = (program % (GROUP_M * num_n)) // height

    # 2. The sum over all inputs, in their order.
    rows = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    outs = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    places = tl.arange(0, BLOCK_K)
    is_row, is_out = (rows < num_rows)[:, None], (outs < NUM_OUT)[None, :]
    in_at = inputs + batch * in_sb + rows[:, None] * in_sr
    weight_at = weight + batch * weight_sb + outs[None, :] * weight_sr
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, NUM_IN, BLOCK_K):
        at = start + places
        if NUM_IN % BLOCK_K == 0:
            left = tl.load(in_at + at[None, :], mask=is_row, other=0.0)
            right = tl.load(weight_at + at[:, None] * weight_sk, mask=is_out, other=0.0)
        else:
            is_in = at < NUM_IN
            left = tl.load(in_at + at[None, :], mask=is_row & is_in[None, :], other=0.0)
            right = tl.load(weight_at + at[:, None] * weight_sk, mask=is_out & is_in[:, None], other=0.0)
        total = tl.dot(left.to(DOT), right.to(DOT), total, input_precision="ieee")

    # 3. Peaks, bias, and one rounding.
    if in_peaks is not None:
        total *= tl.load(in_peaks + rows, mask=rows < num_rows, other=0.0)[:, None]
        total *= (tl.load(weight_peaks + outs, mask=outs < NUM_OUT, other=0.0) * scale)[None, :]
    if bias is not None:
        total += tl.load(bias + outs, mask=outs < NUM_OUT, other=0.0).to(tl.float32)[None, :]
    out_at = out + batch * out_sb + rows[:, None] * out_sr + outs[None, :]
    tl.store(out_at, total.to(out.dtype.element_ty), mask=is_row & is_out)


def triton_linear(
    inputs: torch.Tensor,  # [..., rows, in]; at most one dimension before the rows
    weight: torch.Tensor,  # [..., out, in]; the same dimension before
    bias: torch.Tensor | None = None,  # [out], without such a dimension only
    *,
    peaks: tuple[torch.Tensor, torch.Tensor] | None = None,  # [rows] and [out] where both are in e4m3
    dtype: torch.dtype | None = None,  # of the result: else the inputs'
) -> torch.Tensor:  # [..., rows, out]
    """inputs @ weight^T + bias; a row has the same bits whichever other rows are there."""
    is_batched = inputs.dim() == 3
    if inputs.dim() not in (2, 3) or weight.dim() != inputs.dim() or inputs.shape[-1] != weight.shape[-1]:
        raise ValueError(f"a linear of {tuple(inputs.shape)} with {tuple(weight.shape)}")
    if is_batched and len(inputs) != len(weight):
        raise ValueError(f"{len(inputs)} batches of inputs for {len(weight)} of weights")
    inputs = inputs if inputs.stride(-1) == 1 else inputs.contiguous()
    num_rows, num_out = inputs.shape[-2], weight.shape[-2]
    out = torch.empty(*inputs.shape[:-1], num_out, dtype=dtype or inputs.dtype, device=inputs.device)
    if not out.numel():
        return out
    multiplied = torch.bfloat16 if peaks is not None else inputs.dtype
    is_full = multiplied == torch.float32
    # By the linear's own size alone: narrow ones need more programs than there are wide tiles.
    wide = 128 if num_out >= 128 * _PROCESSORS else 64
    block_m, block_n, block_k = (32, 32, 32) if is_full else (64, wide, 64)
    _linear[(cdiv(num_rows, block_m) * cdiv(num_out, block_n), len(inputs) if is_batched else 1)](
        inputs, weight, bias, peaks[0] if peaks else None, peaks[1] if peaks else None, out, num_rows,
        1 / MOST**2,
        inputs.stride(0) if is_batched else 0, inputs.stride(-2),
        weight.stride(0) if is_batched else 0, weight.stride(-2), weight.stride(-1),
        out.stride(0) if is_batched else 0, out.stride(-2),
        NUM_IN=inputs.shape[-1], NUM_OUT=num_out, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        GROUP_M=_GROUP_M, DOT=compute_type(multiplied), num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


def reference_linear(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The same in float64."""
    out = inputs.double() @ weight.double().transpose(-1, -2)
    return out if bias is None else out + bias.double()
