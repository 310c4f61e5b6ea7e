"""SiLU or GeLU of the gate, times the rest, after a merged product. Knows no layer.

```
gate_up [rows, width | width] ──▶ activation(gate) * up [rows, width]
```
"""
# ruff: noqa: ANN001, ANN202, N803 - kernels: arguments without types, constants in capitals

from typing import Literal, no_type_check

import torch

from pagebus.kernels.jit import cdiv, kernel, tl

Activation = Literal["silu", "gelu_tanh"]

_BLOCK = 1024
_LOG2E = tl.constexpr(1.4426950408889634)
_GELU_1 = tl.constexpr(0.7978845608028654)  # sqrt(2 / pi)
_GELU_3 = tl.constexpr(0.044715)


@kernel
@no_type_check
def activated(gate, IS_SILU: tl.constexpr):  # noqa: ANN201 - called by kernels only
    """The gate in float32. Both are gate * sigmoid(inner): (1 + tanh(z)) / 2 = sigmoid(2 z)."""
    inner = gate if IS_SILU else 2 * _GELU_1 * (gate + _GELU_3 * gate * gate * gate)
    return gate / (1 + tl.exp2(-inner * _LOG2E))


@kernel
@no_type_check
def _gated(
    gate_up, out, stride,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, IS_SILU: tl.constexpr,
):  # fmt: skip
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_there = at < WIDTH
    gate = tl.load(gate_up + row * stride + at, mask=is_there, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + WIDTH + at, mask=is_there, other=0.0).to(tl.float32)
    gated = activated(gate, IS_SILU) * up
    tl.store(out + row * WIDTH + at, gated.to(out.dtype.element_ty), mask=is_there)


def triton_gated(
    gate_up: torch.Tensor,  # [rows, 2 * width]; any row stride
    activation: Activation,
) -> torch.Tensor:  # [rows, width]
    """activation(gate) * up, computed in float32."""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(num_rows, width, dtype=gate_up.dtype, device=gate_up.device)
    if num_rows:
        _gated[(num_rows, cdiv(width, _BLOCK))](
            gate_up, out, gate_up.stride(0), WIDTH=width, BLOCK=_BLOCK, IS_SILU=activation == "silu",
            num_warps=4,
        )  # fmt: skip
    return out


def reference_gated(gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """The same in float64."""
    gate, up = gate_up.double().chunk(2, -1)
    if activation == "silu":
        return torch.nn.functional.silu(gate) * up
    return torch.nn.functional.gelu(gate, approximate="tanh") * up
