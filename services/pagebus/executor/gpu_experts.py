"""A layer's experts on a GPU: two grouped products over rows sorted by expert. Knows transformers' layout of
experts, no family.

Nothing waits for the device or depends on values there, so that a step can be one CUDA graph; and a row's
result does not depend on the rows beside it.
"""

import torch
from torch import nn

from pagebus.executor.experts import are_experts
from pagebus.kernels.triton_experts import triton_combine, triton_grouped_linear


class GroupedExperts(nn.Module):
    """The experts of `source`, whose weights stay where they are."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.source = source

    def forward(
        self,
        hidden: torch.Tensor,  # [tokens, hidden]
        experts: torch.Tensor,  # [tokens, chosen], int64
        weights: torch.Tensor,  # [tokens, chosen]
    ) -> torch.Tensor:
        # 1. Pairs of token and expert, sorted by expert.
        flat = experts.reshape(-1)
        order = flat.argsort(stable=True)
        num_experts = self._weight("gate_up_proj").shape[0]
        bounds = torch.arange(num_experts + 1, device=flat.device, dtype=flat.dtype)
        offsets = torch.searchsorted(flat[order], bounds).int()
        # 2. Through both linears.
        up = self._linear("gate_up_proj", hidden, order // experts.shape[1], offsets)
        gated = self.source._apply_gate(up)  # type: ignore[operator]
        down = self._linear("down_proj", gated, None, offsets)
        # 3. Back to the tokens.
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order), device=order.device)
        return triton_combine(down, places.view(experts.shape), weights)

    def _weight(self, name: str) -> torch.Tensor:  # [experts, out, in]
        weight = self.source.get_parameter(name)
        return weight.transpose(1, 2) if self.source.is_transposed else weight

    def _linear(
        self, name: str, inputs: torch.Tensor, rows: torch.Tensor | None, offsets: torch.Tensor
    ) -> torch.Tensor:
        bias = self.source._parameters.get(f"{name}_bias")
        return triton_grouped_linear(inputs, rows, self._weight(name), bias, offsets)


def group_experts(model: nn.Module) -> int:
    """Put grouped products in the place of every layer's experts, where they have a layout that is known."""
    num_swapped = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(parent, GroupedExperts) and are_experts(child):
                parent.add_module(name, GroupedExperts(child))
                num_swapped += 1
    return num_swapped
