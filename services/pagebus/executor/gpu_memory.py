"""How much of a device's memory keys and values may take, found by running the largest step. Knows no model.

```
total * --gpu-memory-utilization
├── in use: weights, other programs, the driver's share      read from the device
├── the largest step's temporaries                           measured, and a twentieth for fragments
├── CUDA graphs                                              set aside
└── keys and values                                          the rest
```
"""

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from pagebus.executor.errors import ModelError
from pagebus.executor.memory import GroupNeed, bytes_of_longest, longest_that_fits

_log = logging.getLogger(__name__)

_FRAGMENTS = 20  # of the measured temporaries, one part more: freed pieces do not fit every request
_GRAPH_BYTES = 512 << 20
_GRAPH_SHARE = 20  # at most such a part of the device: what graphs keep grows with the model


class DeviceMemory(Protocol):
    """A device's memory, in bytes."""

    def total(self) -> int:
        """All there is."""

    def free(self) -> int:
        """What nobody has taken; torch's own reserve of freed memory is given back first."""

    def start(self) -> None:
        """From here on `peak` counts."""

    def peak(self) -> int:
        """The most that was allocated at once since `start`, beyond what was allocated then."""


class CudaMemory:
    """A CUDA device's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0

    def total(self) -> int:
        return torch.cuda.mem_get_info(self._device)[1]

    def free(self) -> int:
        gc.collect()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self._device)[0]

    def start(self) -> None:
        self.free()
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = torch.cuda.memory_allocated(self._device)

    def peak(self) -> int:
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - self._before


@dataclass(frozen=True, slots=True)
class Share:
    """What a device allows us, and what we do with it, in bytes."""

    allowed: int  # of the whole device, by --gpu-memory-utilization
    used: int  # by weights, other programs, the driver

    @property
    def left(self) -> int:
        return self.allowed - self.used


def share_of(memory: DeviceMemory, utilization: float) -> Share:
    """What the device allows now."""
    total = memory.total()
    return Share(int(total * utilization), total - memory.free())


def gib(num_bytes: int) -> str:
    """Bytes as people say them."""
    return f"{num_bytes / 2**30:.1f} GiB" if abs(num_bytes) >= 1 << 30 else f"{num_bytes / 2**20:.1f} MiB"


def check_fits(
    name: str,
    weight_bytes: int,
    groups: Sequence[GroupNeed],  # empty where it is not known what a token stores
    *,
    max_model_len: int,  # asked for, or what the model has
    is_asked: bool,
    left: int,
) -> None:
    """Refuse before anything is loaded what cannot fit. Raises `ModelError`."""
    rest = left - weight_bytes
    kv_bytes = bytes_of_longest(groups, max_model_len)
    least = kv_bytes if is_asked else bytes_of_longest(groups, 1)
    if rest >= least:
        return
    needs = f"{name} needs {gib(weight_bytes + least)} ({gib(weight_bytes)} weights"
    needs += f", {gib(least)} for a context of {max_model_len if is_asked else 1}), {gib(left)} are free"
    fits = longest_that_fits(groups, rest, max_model_len) if groups else 0
    if fits:
        raise ModelError(f"{needs}; --max-model-len {fits} would fit")
    raise ModelError(f"{needs}; no context would fit: take a smaller model or a narrower data type")


def budget_for_kv(
    memory: DeviceMemory,
    run_step: Callable[[int], None],
    *,
    num_tokens: int,
    utilization: float,
) -> int:
    """Bytes for keys and values, after `run_step(num_tokens)` has run the largest step once.

    Raises `ModelError` where the step does not fit, with the number of tokens that would.
    """
    peak = _measured(memory, run_step, num_tokens)
    if peak is None:
        fits = _largest_that_fits(memory, run_step, num_tokens // 2)
        raise ModelError(f"a step of {num_tokens} tokens does not fit beside the weights; {_advice(fits)}")
    share = share_of(memory, utilization)
    temporaries = peak + peak // _FRAGMENTS
    graphs = min(_GRAPH_BYTES, memory.total() // _GRAPH_SHARE)
    budget = share.left - temporaries - graphs
    _log.info(
        "memory: %s allowed, %s in use, %s for a step of %d tokens, %s for graphs, %s for keys and values",
        gib(share.allowed), gib(share.used), gib(temporaries), num_tokens, gib(graphs), gib(max(0, budget)),
    )  # fmt: skip
    if budget <= 0:
        fits = num_tokens * (share.left - graphs) // max(1, temporaries) // 2
        raise ModelError(
            f"{gib(share.used)} in use and {gib(temporaries + graphs)} for a step of {num_tokens} tokens"
            f" leave nothing of {gib(share.allowed)} for keys and values; " + _advice(fits)
        )
    return budget


def _measured(memory: DeviceMemory, run_step: Callable[[int], None], num_tokens: int) -> int | None:
    """The step's temporaries, or None where they do not fit."""
    memory.start()
    try:
        run_step(num_tokens)
    except torch.OutOfMemoryError:
        return None
    return memory.peak()


def _largest_that_fits(memory: DeviceMemory, run_step: Callable[[int], None], num_tokens: int) -> int:
    """Halve the step until it fits; 0: none does."""
    while num_tokens and _measured(memory, run_step, num_tokens) is None:
        num_tokens //= 2
    return num_tokens


def _advice(num_tokens: int) -> str:
    if num_tokens > 0:
        return f"--max-num-batched-tokens {num_tokens} would fit"
    return "take a smaller model, or raise --gpu-memory-utilization"


def check_context(groups: Sequence[GroupNeed], budget: int, max_model_len: int, *, is_asked: bool) -> None:
    """Refuse a context that was asked for and does not fit the pool. Raises `ModelError`.

    One that was not asked for is the model's own, and the scheduler lowers it.
    """
    longest = bytes_of_longest(groups, max_model_len)
    if longest <= budget:
        return
    fits = longest_that_fits(groups, budget, max_model_len)
    said = f"a context of {max_model_len} needs {gib(longest)} of keys and values, {gib(budget)} are free"
    if is_asked:
        raise ModelError(f"{said}; " + (f"--max-model-len {fits} would fit" if fits else "none would fit"))
    _log.info("%s: requests may be %d tokens long", said, fits)
