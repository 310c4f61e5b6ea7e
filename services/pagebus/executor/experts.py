"""Experts and their routers, row-invariant on the CPU. Knows transformers' layout of experts, no family.

Each expert's linears are packed, and compute the rows that were sent to it, padded to few sizes. A row's
results are added in the order of the experts' numbers, in float32, whatever order the router named them in.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from pagebus.executor.linears import PackedLinear, padded_size

_log = logging.getLogger(__name__)


class SteadyOps(TorchFunctionMode):
    """Within it, sigmoid does not depend on an element's place, and linears are answered by `linear`."""

    def __init__(self, linear: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        super().__init__()
        self._linear = linear

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        match args:
            case (torch.Tensor() as inputs, *_) if func in _SIGMOIDS:
                return steady_sigmoid(inputs)
            case (torch.Tensor() as inputs, *_) if func is nn.functional.linear and self._linear is not None:
                return self._linear(inputs)
        return func(*args, **(kwargs or {}))


_SIGMOIDS = (torch.sigmoid, torch.Tensor.sigmoid, nn.functional.sigmoid)


def steady_sigmoid(inputs: torch.Tensor) -> torch.Tensor:
    """The sigmoid of operations that do not depend on an element's place."""
    return (1.0 / (1.0 + torch.exp(-inputs.float()))).to(inputs.dtype)


class SteadyRouter(nn.Module):
    """A router whose linear is row-invariant; what it makes of the logits stays its own."""

    def __init__(
        self,
        router: nn.Module,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        make_linear: Callable[[torch.Tensor, torch.Tensor | None], nn.Module] = PackedLinear,
    ) -> None:
        super().__init__()
        self.router = router
        self._weight = weight  # [experts, hidden]
        self._bias = bias
        self._make_linear = make_linear
        self._packed: dict[torch.dtype, nn.Module] = {}  # some families route in float32

    def forward(self, hidden: torch.Tensor) -> object:
        with SteadyOps(self._linear):
            return self.router(hidden)

    def _linear(self, inputs: torch.Tensor) -> torch.Tensor:
        dtype = inputs.dtype
        if dtype not in self._packed:
            bias = None if self._bias is None else self._bias.to(dtype)
            self._packed[dtype] = self._make_linear(self._weight.to(dtype), bias)
        packed: torch.Tensor = self._packed[dtype](inputs)
        return packed


class PackedExperts(nn.Module):
    """The experts of a layer, each a pair of packed linears. Takes the weights away from `source`."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.source = source  # for its gate between the linears
        # A gate with an activation module has a row-invariant one by now; another computes its own sigmoid.
        self._gating = nullcontext() if "act_fn" in source._modules else SteadyOps()
        self.up = _take(source, "gate_up_proj")
        self.down = _take(source, "down_proj")

    def forward(
        self,
        hidden: torch.Tensor,  # [tokens, hidden]
        experts: torch.Tensor,  # [tokens, k], int64
        weights: torch.Tensor,  # [tokens, k]
    ) -> torch.Tensor:
        num_chosen = experts.shape[1]
        flat = experts.reshape(-1)
        order = flat.argsort(stable=True)
        ends = flat.bincount(minlength=len(self.up)).cumsum(0).tolist()
        tokens, scales = order // num_chosen, weights.reshape(-1)[order].float()
        out = torch.zeros_like(hidden, dtype=torch.float32)
        for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            if start < end:
                rows = tokens[start:end]
                made = self._expert(expert, hidden[rows])
                out.index_add_(0, rows, made.float() * scales[start:end, None])
        return out.to(hidden.dtype)

    def _expert(self, expert: int, rows: torch.Tensor) -> torch.Tensor:  # [rows, hidden] -> [rows, hidden]
        padded = rows.new_zeros(padded_size(len(rows)), rows.shape[1])
        padded[: len(rows)] = rows
        with self._gating:
            gated = self.source._apply_gate(self.up[expert](padded))  # type: ignore[operator]
        made: torch.Tensor = self.down[expert](gated)
        return made[: len(rows)]


def _take(source: nn.Module, name: str) -> nn.ModuleList:
    """Pack the parameter `name`, one matrix an expert, and delete it (the two would double the memory)."""
    weight, bias = source.get_parameter(name).detach(), source._parameters.get(f"{name}_bias")
    packed = [
        PackedLinear(
            matrix.t() if source.is_transposed else matrix, None if bias is None else bias[expert].detach()
        )
        for expert, matrix in enumerate(weight)
    ]
    delattr(source, name)
    return nn.ModuleList(packed)


def steady_router(module: nn.Module) -> SteadyRouter | None:
    """A row-invariant stand-in for `module` on the CPU, if it is a router."""
    weights = router_weights(module)
    return None if weights is None else SteadyRouter(module, *weights)


def router_weights(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Weight and bias of a router: what has a matrix and names `top_k` experts."""
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if weight is None or weight.dim() != 2 or "top_k" not in vars(module):
        return None
    return weight.detach(), None if bias is None else bias.detach()


def packed_experts(module: nn.Module) -> PackedExperts | None:
    """A row-invariant stand-in for `module` if it holds experts in transformers' layout."""
    return PackedExperts(module) if are_experts(module) else None


def are_experts(module: nn.Module) -> bool:
    """Whether `module` holds a layer's experts in transformers' layout; warns of experts in another one."""
    up, down = module._parameters.get("gate_up_proj"), module._parameters.get("down_proj")
    if up is None or down is None or not up.dim() == down.dim() == 3:
        return False
    if not hasattr(module, "_apply_gate") or vars(module).get("has_post_expert_norm"):
        _log.warning("%s: experts of another layout, results depend on the batch", type(module).__name__)
        return False
    return True
