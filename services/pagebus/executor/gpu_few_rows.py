"""Linears that run few rows by whichever product is faster on this device, as measured when a model starts.

Streams alone on a GPU wait for weights: a library's product leaves some of the memory's bandwidth, ours is
made for that. Which is better depends on sizes and on the device, so both are timed, for each size of linear
and each number of rows up to 16, over the weights of several layers: no cache holds them. Knows no family.
"""

import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from pagebus.executor.device import Device, Work
from pagebus.executor.fusing import FusedGated
from pagebus.kernels.triton_few_rows import MAX_ROWS, FewRowsConfig, configs_for, triton_few_rows
from pagebus.kernels.triton_gated import Activation, triton_gated

_log = logging.getLogger(__name__)

ROWS = (1, 2, 4, 8, 16)
CACHE_BYTES = 256 << 20  # of weights that are timed at once: several times a GPU's second cache
_TOLERANCE = 0.1  # of the results' standard deviation: what half precision rounds
_GAIN = 0.98  # of the library's time at most: less is noise

Choices = dict[int, FewRowsConfig]
"""By the number in `ROWS` that holds a step's rows: how ours is cut; missing: the library's product."""


def bucket_of(num_rows: int) -> int:
    """The number in `ROWS` that holds so many rows."""
    return next(most for most in ROWS if most >= num_rows)


class FewRowsLinear(nn.Module):
    """A linear, the same memory."""

    def __init__(self, linear: nn.Linear, choices: Choices) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.weight, self.bias = linear.weight, linear.bias
        self.choices = choices

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:  # [..., in] -> [..., out]
        num_rows = inputs.numel() // self.in_features
        config = self.choices.get(bucket_of(num_rows)) if 0 < num_rows <= MAX_ROWS else None
        if config is None:
            return functional.linear(inputs, self.weight, self.bias)
        rows = inputs.reshape(num_rows, self.in_features)
        return triton_few_rows(rows, self.weight, self.bias, config).view(
            *inputs.shape[:-1], self.out_features
        )


class FewRowsGated(nn.Module):
    """The merged gate and up with their activation as one kernel, and the way down."""

    def __init__(self, source: FusedGated, wide: nn.Linear, choices: Choices) -> None:
        super().__init__()
        self.source, self.wide, self.choices = source, wide, choices

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        num_in = self.wide.in_features
        num_rows = hidden_states.numel() // num_in
        config = self.choices.get(bucket_of(num_rows)) if 0 < num_rows <= MAX_ROWS else None
        if config is None:
            given: torch.Tensor = self.source(hidden_states)
            return given
        gated = triton_few_rows(
            hidden_states.reshape(num_rows, num_in), self.wide.weight, None, config, self.source.activation
        )
        down: torch.Tensor = self.source.down(gated.view(*hidden_states.shape[:-1], gated.shape[-1]))
        return down


def tune(model: nn.Module, device: Device, beat: Callable[[], None]) -> dict[str, int]:
    """Swap, in place, the linears for which ours is the faster product at some number of rows; how many of
    each kind. `beat` is told after each size."""
    began_s = time.monotonic()
    counts = {"gated": 0, "linear": 0}
    gated = _by_size(
        ((parent, name, child), wide)
        for parent, name, child in _children(model)
        if isinstance(child, FusedGated) and isinstance(wide := child.wide, nn.Linear) and wide.bias is None
    )
    for places in gated.values():
        modules = [child for _, _, child in places if isinstance(child, FusedGated)]
        choices = _choices(device, modules)
        beat()
        for parent, name, child in places:
            if choices and isinstance(child, FusedGated) and isinstance(child.wide, nn.Linear):
                parent.add_module(name, FewRowsGated(child, child.wide, choices))
                counts["gated"] += 1
    linears = _by_size(
        ((parent, name, child), child) for parent, name, child in _children(model) if type(child) is nn.Linear
    )
    for places in linears.values():
        choices = _choices(device, [child for _, _, child in places if isinstance(child, nn.Linear)])
        beat()
        for parent, name, child in places:
            if choices and isinstance(child, nn.Linear) and not isinstance(parent, FewRowsGated):
                parent.add_module(name, FewRowsLinear(child, choices))
                counts["linear"] += 1
    _log.info(
        "few rows: %d linears and %d gated ones by kernels of ours, chosen in %.1f s",
        counts["linear"], counts["gated"], time.monotonic() - began_s,
    )  # fmt: skip
    return counts


_Place = tuple[nn.Module, str, nn.Module]


def _children(model: nn.Module) -> Iterator[_Place]:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            yield parent, name, child


def _by_size(found: Iterator[tuple[_Place, nn.Module]]) -> dict[tuple[object, ...], list[_Place]]:
    sizes: dict[tuple[object, ...], list[_Place]] = defaultdict(list)
    for place, linear in found:
        if isinstance(linear, nn.Linear) and linear.weight.dtype in (torch.bfloat16, torch.float16):
            has_bias = linear.bias is not None
            sizes[(*linear.weight.shape, linear.weight.stride(), linear.weight.dtype, has_bias)].append(place)
    return sizes


@dataclass(frozen=True, slots=True)
class Comparison:
    """Seconds for so many rows through all that was timed; `config` None: the library's product it is."""

    num_rows: int
    library_s: float
    least_s: float
    config: FewRowsConfig | None


def _choices(device: Device, modules: Sequence[FusedGated | nn.Linear]) -> Choices:
    """What is the fastest for each number of rows."""
    found = compare(device, modules)
    return {one.num_rows: one.config for one in found if one.config is not None}


def compare(device: Device, modules: Sequence[FusedGated | nn.Linear]) -> list[Comparison]:
    """Both products of linears of one size, for each of `ROWS`."""
    linears = [module if isinstance(module, nn.Linear) else module.wide for module in modules]
    some = [linear for linear in linears if isinstance(linear, nn.Linear)]
    num = max(1, -(-CACHE_BYTES // (some[0].weight.numel() * some[0].weight.itemsize)))
    activation = None if isinstance(modules[0], nn.Linear) else modules[0].activation
    some, compared = some[:num], []
    for num_rows in ROWS:
        inputs = torch.randn(num_rows, some[0].in_features, device=device.device).to(some[0].weight.dtype)

        def library(inputs: torch.Tensor = inputs) -> None:
            for linear in some:
                out = functional.linear(inputs, linear.weight, linear.bias)
                if activation is not None:
                    triton_gated(out, activation)

        library_s = device.time_s(library)
        least_s, chosen = _GAIN * library_s, None
        for config in configs_for(num_rows):

            def ours(inputs: torch.Tensor = inputs, config: FewRowsConfig = config) -> None:
                for linear in some:
                    triton_few_rows(inputs, linear.weight, linear.bias, config, activation)

            took_s = _time_s(device, ours)
            if took_s < least_s and _agrees(some[0], inputs, config, activation):
                least_s, chosen = took_s, config
        least_s = library_s if chosen is None else least_s
        compared.append(Comparison(num_rows, library_s, least_s, chosen))
    return compared


def _time_s(device: Device, work: Work) -> float:
    """As `Device.time_s`; for ever where the device refuses a cut, which ends no start."""
    try:
        return device.time_s(work)
    except Exception as error:
        _log.warning("a product for few rows does not run here: %s", str(error).partition("\n")[0])
        return math.inf


def _agrees(
    linear: nn.Linear, inputs: torch.Tensor, config: FewRowsConfig, activation: Activation | None
) -> bool:
    """Whether both products are the same as far as rounding goes."""
    wanted = functional.linear(inputs, linear.weight, linear.bias)
    wanted = wanted if activation is None else triton_gated(wanted, activation)
    found = triton_few_rows(inputs, linear.weight, linear.bias, config, activation)
    far = (found.float() - wanted.float()).abs().max() - _TOLERANCE * wanted.float().std().nan_to_num()
    if bool(far <= 0):
        return True
    _log.warning("a product of %s for %d rows is wrong here", list(linear.weight.shape), len(inputs))
    return False
