"""Computes linears that read the same input as one: query, key and value, or gate and up. Knows no family.

Which ones do is found by watching a forward pass, not by their names. One product with a wide weight costs
less than several with narrow ones: fewer launches, and the input is read once.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass(slots=True)
class Siblings:
    """Linears below one module that read the same tensor, in the order in which they are called."""

    parent: nn.Module
    names: list[str] = field(default_factory=list)


class Merged(nn.Module):
    """The product of all siblings. Each takes its part of it; the first that is called computes it."""

    def __init__(self, inner: nn.Module, num_parts: int) -> None:
        super().__init__()
        self.inner = inner
        self._num_parts = num_parts
        self._num_left = 0
        self._input: torch.Tensor | None = None
        self._output: torch.Tensor | None = None

    def take(self, inputs: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Features [start, stop) of the product with `inputs`; forgotten once every part has asked."""
        output = self._output
        if output is None or self._input is not inputs:
            output = self.inner(inputs)
            self._input, self._output, self._num_left = inputs, output, self._num_parts
        self._num_left -= 1
        if self._num_left == 0:
            self._input = self._output = None
        return output[..., start:stop]


class LinearPart(nn.Module):
    """Stands where one of the siblings stood."""

    def __init__(self, linear: nn.Linear, merged: Merged, start: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # Models ask their weights for the data type; this one has the type and no memory.
        self.weight = linear.weight.detach().new_empty(0)
        self.bias = None
        self._start = start
        self._take = merged.take  # no submodule: it would be counted, swapped and moved once for every part

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:  # [..., in] -> [..., out]
        return self._take(inputs, self._start, self._start + self.out_features)


def find_siblings(model: nn.Module, run: Callable[[], object]) -> list[Siblings]:
    """Two or more plain linears with one parent that read the same tensor while `run` runs `model`."""
    found: dict[tuple[int, int, bool, torch.dtype], Siblings] = {}
    kept: list[torch.Tensor] = []  # so that no two tensors have the same id

    def watch(parent: nn.Module, name: str) -> Callable[[nn.Linear, tuple[torch.Tensor, ...]], None]:
        def note(linear: nn.Linear, inputs: tuple[torch.Tensor, ...]) -> None:
            kept.append(inputs[0])
            key = (id(parent), id(inputs[0]), linear.bias is None, linear.weight.dtype)
            group = found.setdefault(key, Siblings(parent))
            if name not in group.names:
                group.names.append(name)

        return note

    with ExitStack() as stack:
        for parent in model.modules():
            for name, child in parent.named_children():
                if type(child) is nn.Linear:
                    stack.callback(child.register_forward_pre_hook(watch(parent, name)).remove)
        run()
    return [group for group in found.values() if len(group.names) > 1]


def _linears(group: Siblings) -> list[nn.Linear]:
    return [child for name in group.names if isinstance(child := group.parent._modules[name], nn.Linear)]


def merge(group: Siblings) -> None:
    """Put one wide linear in the place of a group, which frees the narrow ones' weights."""
    linears = _linears(group)
    first = linears[0]
    weight = torch.cat([one.weight.detach() for one in linears])
    biases = [one.bias.detach() for one in linears if one.bias is not None]
    wide = nn.Linear(first.in_features, len(weight), bias=bool(biases), device="meta")
    wide.weight = nn.Parameter(weight, requires_grad=False)
    if biases:
        wide.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    merged = Merged(wide, len(linears))
    start = 0
    for name, linear in zip(group.names, linears, strict=True):
        group.parent._modules[name] = LinearPart(linear, merged, start)
        start += linear.out_features
    group.parent.add_module("merged_" + "_".join(group.names), merged)
