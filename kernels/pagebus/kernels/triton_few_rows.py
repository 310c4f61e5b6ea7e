"""Linears of few rows, as fast as their weights come from memory. Knows no layer.

One idea: with up to 16 rows a product is a walk over the weights. Every program takes a few outputs and all
of their inputs, so that each weight is read once, in pieces of 16 bytes, with many of them under way.

```
one row      [BLOCK_N, BLOCK_K] products added in registers, summed over the inputs once at the end
2..16 rows   tensor cores over tiles of 16 rows, the weights' next tiles being on their way
gated        outputs n and n + width in one program: activation(gate) * up, and no [rows, 2 * width] between
```

Whether this or the library's product is faster depends on sizes: whoever starts a model measures both.
"""
# ruff: noqa: ANN001, ANN202, N803 - kernels: arguments without types, constants in capitals

from dataclasses import dataclass
from typing import no_type_check

import torch

from pagebus.kernels.jit import cdiv, compute_type, kernel, kernel_with, tl
from pagebus.kernels.triton_gated import Activation, activated

MAX_ROWS = 16


@dataclass(frozen=True, slots=True)
class FewRowsConfig:
    """How a launch is cut."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


ONE_ROW = (FewRowsConfig(4, 1024, 4, 1), FewRowsConfig(8, 512, 4, 1), FewRowsConfig(2, 2048, 4, 1))
MANY_ROWS = (FewRowsConfig(16, 256, 4, 4), FewRowsConfig(32, 128, 4, 5), FewRowsConfig(64, 128, 4, 4))


@kernel
@no_type_check
def _one_row(
    inputs, weight, outs, num_in, num_out, weight_stride,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, HAS_TAIL: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N] sums of one row."""
    places = tl.arange(0, BLOCK_K)
    weight_at = weight + outs.to(tl.int64)[:, None] * weight_stride
    is_out = (outs < num_out)[:, None]
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in range(0, num_in, BLOCK_K):
        at = start + places
        if HAS_TAIL:
            is_in = at < num_in
            left = tl.load(inputs + at, mask=is_in, other=0.0)
            right = tl.load(weight_at + at[None, :], mask=is_out & is_in[None, :], other=0.0)
        else:
            left = tl.load(inputs + at)
            right = tl.load(weight_at + at[None, :], mask=is_out, other=0.0)
        total += right.to(tl.float32) * left.to(tl.float32)[None, :]
    return tl.sum(total, 1)


@kernel
@no_type_check
def _many_rows(
    inputs, weight, rows, outs, num_rows, num_in, num_out, in_stride, weight_stride,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, HAS_TAIL: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """[16, BLOCK_N] sums."""
    places = tl.arange(0, BLOCK_K)
    in_at = inputs + rows.to(tl.int64)[:, None] * in_stride
    weight_at = weight + outs.to(tl.int64)[None, :] * weight_stride
    is_row, is_out = (rows < num_rows)[:, None], (outs < num_out)[None, :]
    total = tl.zeros([16, BLOCK_N], tl.float32)
    for start in range(0, num_in, BLOCK_K):
        at = start + places
        if HAS_TAIL:
            is_in = at < num_in
            left = tl.load(in_at + at[None, :], mask=is_row & is_in[None, :], other=0.0)
            right = tl.load(weight_at + at[:, None], mask=is_out & is_in[:, None], other=0.0)
        else:
            left = tl.load(in_at + at[None, :], mask=is_row, other=0.0)
            right = tl.load(weight_at + at[:, None], mask=is_out, other=0.0)
        total = tl.dot(left.to(DOT), right.to(DOT), total, input_precision="ieee")
    return total


@kernel_with(counts=("num_rows",))
@no_type_check
def _few_rows(
    inputs, weight, bias, out, num_rows, num_in, num_out, in_stride, weight_stride, out_stride,
    IS_ONE: tl.constexpr, IS_GATED: tl.constexpr, IS_SILU: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, HAS_TAIL: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    outs, rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, 16)
    up = weight + num_out.to(tl.int64) * weight_stride if IS_GATED else weight
    if IS_ONE:
        total = _one_row(inputs, weight, outs, num_in, num_out, weight_stride, BLOCK_N, BLOCK_K, HAS_TAIL)
        if IS_GATED:
            more = _one_row(inputs, up, outs, num_in, num_out, weight_stride, BLOCK_N, BLOCK_K, HAS_TAIL)
            total = _rounded(total, out)
            total = activated(total, IS_SILU) * _rounded(more, out)
        if bias is not None:
            total += tl.load(bias + outs, mask=outs < num_out, other=0.0).to(tl.float32)
        tl.store(out + outs, total.to(out.dtype.element_ty), mask=outs < num_out)
    else:
        total = _many_rows(inputs, weight, rows, outs, num_rows, num_in, num_out, in_stride, weight_stride,
                           BLOCK_N, BLOCK_K, HAS_TAIL, DOT)  # fmt: skip
        if IS_GATED:
            more = _many_rows(inputs, up, rows, outs, num_rows, num_in, num_out, in_stride, weight_stride,
                              BLOCK_N, BLOCK_K, HAS_TAIL, DOT)  # fmt: skip
            total = _rounded(total, out)
            total = activated(total, IS_SILU) * _rounded(more, out)
        if bias is not None:
            total += tl.load(bias + outs, mask=outs < num_out, other=0.0).to(tl.float32)[None, :]
        out_at = out + rows.to(tl.int64)[:, None] * out_stride + outs[None, :]
        is_stored = (rows < num_rows)[:, None] & (outs < num_out)[None, :]
        tl.store(out_at, total.to(out.dtype.element_ty), mask=is_stored)


@kernel
@no_type_check
def _rounded(values, out):
    """As a product that is stored, and then gated, is rounded."""
    return values.to(out.dtype.element_ty).to(tl.float32)


def triton_few_rows(
    inputs: torch.Tensor,  # [rows, in], at most 16 rows; any row stride
    weight: torch.Tensor,  # [out, in], or [2 * out, in] where it is gated; any row stride
    bias: torch.Tensor | None,  # [out]; not where it is gated
    config: FewRowsConfig,
    activation: Activation | None = None,
) -> torch.Tensor:  # [rows, out]
    """inputs @ weight^T + bias, or activation(first half) * second half of inputs @ weight^T."""
    num_rows, num_in = inputs.shape
    if not 0 < num_rows <= MAX_ROWS or weight.shape[1] != num_in:
        raise ValueError(f"a linear of {tuple(inputs.shape)} with {tuple(weight.shape)} for few rows")
    if activation is not None and bias is not None:
        raise ValueError("a gated product with a bias")
    if weight.stride(1) != 1:
        raise ValueError("the weights of an output must lie side by side")
    inputs = inputs if inputs.stride(1) == 1 else inputs.contiguous()
    num_out = len(weight) if activation is None else len(weight) // 2
    out = torch.empty(num_rows, num_out, dtype=inputs.dtype, device=inputs.device)
    _few_rows[(cdiv(num_out, config.block_n),)](
        inputs, weight, bias, out, num_rows, num_in, num_out, inputs.stride(0), weight.stride(0), num_out,
        IS_ONE=num_rows == 1, IS_GATED=activation is not None, IS_SILU=activation == "silu",
        BLOCK_N=config.block_n, BLOCK_K=config.block_k, HAS_TAIL=num_in % config.block_k != 0,
        DOT=compute_type(inputs.dtype), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out


def configs_for(num_rows: int) -> tuple[FewRowsConfig, ...]:
    """What is worth trying for so many rows."""
    return ONE_ROW if num_rows == 1 else MANY_ROWS
