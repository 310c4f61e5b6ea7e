"""Linears for a GPU: row-invariant ones, also for routers and latents' matrices, and ones in fp8. Knows no
family.

They go where a model's own stood, after it was merged and fused, so that a merged product is one of them.
"""

import torch
from torch import nn

from pagebus.executor.experts import SteadyRouter, router_weights
from pagebus.executor.latent import HeadLinears
from pagebus.kernels import fp8
from pagebus.kernels.triton_fp8 import MULTIPLE, fp8_linear, product_scales, triton_quantize
from pagebus.kernels.triton_linear import triton_linear


class FixedLinear(nn.Module):
    """A linear that is cut and added in one way for any number of rows."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:  # [out, in], [out]
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)  # the same memory, tied or not
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:  # [..., in] -> [..., out]
        rows = inputs.reshape(-1, self.in_features)
        return triton_linear(rows, self.weight, self.bias).view(*inputs.shape[:-1], self.out_features)


class FixedHeadLinears(nn.Module):
    """One matrix a head: [heads, tokens, in] -> [heads, tokens, out]."""

    def __init__(self, weight: torch.Tensor) -> None:  # [heads, in, out]
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return triton_linear(inputs.to(self.weight.dtype), self.weight.transpose(1, 2))


class Fp8Linear(nn.Module):
    """A linear whose weight is in e4m3, a peak for each output, and whose inputs become so row by row."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, is_fixed: bool = False
    ) -> None:
        """`is_fixed`: cut and added in one way for any number of rows."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        stored, peaks = fp8.quantize(weight.detach())
        self.stored = nn.Parameter(stored, requires_grad=False)
        self.peaks = nn.Parameter(peaks, requires_grad=False)
        self.scales = nn.Parameter(product_scales(peaks), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        # Models ask their weights for the data type; this one has the type and no memory.
        self.weight = weight.detach().new_empty(0)
        self._is_fixed = is_fixed

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:  # [..., in] -> [..., out]
        rows = inputs.reshape(-1, self.in_features)
        if self._is_fixed:
            stored, peaks = triton_quantize(rows)
            out = triton_linear(stored, self.stored, self.bias, peaks=(peaks, self.peaks), dtype=inputs.dtype)
        else:
            out = fp8_linear(rows, self.stored, self.peaks, self.bias, scales=self.scales)
        return out.view(*inputs.shape[:-1], self.out_features)


def quantize_linears(model: nn.Module, head: nn.Module | None, *, is_fixed: bool = False) -> int:
    """Put the weights of a model's linears in e4m3, in place, one by one; how many.

    `head` stays as it is: what it makes decides between ids. So do linears of odd sizes, and those whose
    weight is somebody else's too.
    """
    shared = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    num_swapped = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear or child is head or id(child.weight) in shared:
                continue
            if child.in_features % MULTIPLE or child.out_features % MULTIPLE:
                continue
            parent.add_module(name, Fp8Linear(child.weight, child.bias, is_fixed=is_fixed))
            num_swapped += 1
    return num_swapped


def make_batch_invariant(model: nn.Module) -> dict[str, int]:
    """Swap every product of a model in place; how many of each kind."""
    counts = {"linear": 0, "router": 0, "heads": 0}
    _swap(model, counts)
    return counts


def _swap(parent: nn.Module, counts: dict[str, int]) -> None:
    for name, child in list(parent.named_children()):
        found = _stand_in(child)
        if found is None:
            _swap(child, counts)
        else:
            kind, module = found
            counts[kind] += 1
            parent.add_module(name, module)


def _stand_in(module: nn.Module) -> tuple[str, nn.Module] | None:
    if type(module) is nn.Linear:
        return "linear", FixedLinear(module.weight, module.bias)
    if isinstance(module, HeadLinears):
        return "heads", FixedHeadLinears(module.weight)
    weights = router_weights(module)
    return None if weights is None else ("router", SteadyRouter(module, *weights, make_linear=FixedLinear))
