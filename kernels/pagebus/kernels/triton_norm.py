"""RMSNorm, with the residual's addition before it, in one kernel. Knows no layer.

The sum is rounded to the residual's type before it is normed, as the layers do that add first; the rest is
float32, rounded once. One program has a whole row, so a row's bits do not depend on its batch.
"""
# ruff: noqa: ANN001, ANN202, N803 - kernels: arguments without types, constants in capitals

from typing import no_type_check

import torch

from pagebus.kernels.jit import kernel, power_of_2, tl


@kernel
@no_type_check
def _rms_norm(
    x, residual, weight, out, new_residual, eps, x_stride, residual_stride,
    DIM: tl.constexpr, PAD: tl.constexpr, IS_OFFSET: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, PAD)
    is_there = at < DIM
    values = tl.load(x + row * x_stride + at, mask=is_there, other=0.0).to(tl.float32)
    if residual is not None:
        values += tl.load(residual + row * residual_stride + at, mask=is_there, other=0.0).to(tl.float32)
        rounded = values.to(new_residual.dtype.element_ty)
        tl.store(new_residual + row * DIM + at, rounded, mask=is_there)
        values = rounded.to(tl.float32)
    weights = tl.load(weight + at, mask=is_there, other=0.0).to(tl.float32)
    if IS_OFFSET:
        weights += 1.0
    normed = values * tl.rsqrt(tl.sum(values * values, 0) / DIM + eps) * weights
    tl.store(out + row * DIM + at, normed.to(out.dtype.element_ty), mask=is_there)


def triton_add_rms_norm(
    x: torch.Tensor,  # [rows, dim]; any row stride
    residual: torch.Tensor | None,  # [rows, dim]
    weight: torch.Tensor,  # [dim]
    eps: float,
    *,
    is_offset: bool = False,  # times (1 + weight): Gemma
) -> tuple[torch.Tensor, torch.Tensor]:
    """norm(x + residual) and x + residual, both new; without a residual the second is `x` itself."""
    num_rows, dim = x.shape
    out = torch.empty(num_rows, dim, dtype=x.dtype, device=x.device)
    new_residual = x if residual is None else torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    if num_rows:
        pad = power_of_2(dim)
        _rms_norm[(num_rows,)](
            x, residual, weight, out, new_residual, eps,
            x.stride(0), 0 if residual is None else residual.stride(0),
            DIM=dim, PAD=pad, IS_OFFSET=is_offset, num_warps=min(16, max(1, pad // 512)),
        )  # fmt: skip
    return out, new_residual


def reference_rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, is_offset: bool = False
) -> torch.Tensor:
    """The norm over the last dimension, in float64."""
    values, weights = x.double(), weight.double()
    if is_offset:
        weights = weights + 1
    return values * (values.square().mean(-1, keepdim=True) + eps).rsqrt() * weights
