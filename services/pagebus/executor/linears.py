"""Row-invariant linears and activations for the CPU. Knows no family, and not where they go.

Row-invariant: a row's result has the same bits whichever other rows are computed with it. Measured on
AVX-512 with torch 2.13: oneDNN's packed linear is from two rows on, F.linear in float32 is not; exp and tanh
are, SiLU and GELU are not (the last elements of an array take a scalar routine that rounds differently).
"""

import logging
import math

import torch
from torch import nn

_log = logging.getLogger(__name__)

MIN_ROWS = 2
"""A lone row takes another kernel (a matrix-vector product), so it is computed twice."""


class PackedLinear(nn.Module):
    """A linear whose weight lies in oneDNN's own layout. Fast for few rows, and row-invariant."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:  # [out, in], [out]
        super().__init__()
        self.out_features, self.in_features = weight.shape
        # A plain attribute: an opaque tensor is no state that could be moved or saved.
        self._packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        # Models ask their weights for the data type; this one has the type and no memory.
        self.weight = weight.detach().new_empty(0)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:  # [..., in] -> [..., out]
        rows = inputs.reshape(-1, self.in_features)
        num_rows = len(rows)
        if num_rows < MIN_ROWS:
            rows = (
                rows.expand(MIN_ROWS, -1).contiguous()
                if num_rows
                else rows.new_zeros(MIN_ROWS, self.in_features)
            )
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._packed, self.bias, "none", [], "")
        return out[:num_rows].view(*inputs.shape[:-1], self.out_features)


class StableSiLU(nn.Module):
    """x * sigmoid(x) of operations that do not depend on an element's place."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        wide = inputs.float()
        return (wide / (1.0 + torch.exp(-wide))).to(inputs.dtype)


class StableTanhGELU(nn.Module):
    """GELU's tanh approximation of operations that do not depend on an element's place."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        wide = inputs.float()
        inner = math.sqrt(2.0 / math.pi) * (wide + 0.044715 * (wide * wide * wide))
        return (0.5 * wide * (1.0 + torch.tanh(inner))).to(inputs.dtype)


def padded_size(num_rows: int) -> int:
    """Rows computed for `num_rows`: few sizes, as oneDNN compiles a kernel for each (about 1 ms).

    Steps of 2 up to 16, then about an eighth more at most.
    """
    step = 2
    while step * 16 < num_rows and step < 64:
        step *= 2
    return max(2, -(-num_rows // step) * step)


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this machine and this torch have the packed linear for `dtype`, and it computes rightly."""
    linear = nn.Linear(32, 48, dtype=dtype)
    inputs = torch.linspace(-1, 1, 64, dtype=dtype).view(2, 32)
    try:
        difference = (PackedLinear(linear.weight, linear.bias)(inputs) - linear(inputs)).abs().max()
    except (RuntimeError, AttributeError) as error:
        _log.warning(
            "no packed linears for %s here, results depend on the batch: %s", dtype, str(error)[:100]
        )
        return False
    return bool(difference < 0.05)


def stable_activation(module: nn.Module) -> nn.Module | None:
    """A row-invariant stand-in for `module`, if it is an activation that needs one."""
    kind = type(module).__name__
    if kind in ("SiLU", "SiLUActivation"):
        return StableSiLU()
    is_tanh_gelu = kind in ("GELUTanh", "PytorchGELUTanh", "NewGELUActivation")
    return StableTanhGELU() if is_tanh_gelu else None
