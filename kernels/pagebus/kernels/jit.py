"""Triton where there is one, and a stand-in where there is none. Knows no operation.

A kernel's file imports `kernel`, `tl` and `cdiv` from here, so that its plain-torch reference works on
machines that have no Triton (macOS). There, launching a kernel raises `RuntimeError`.
"""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch

__all__ = [
    "HAS_TRITON",
    "IS_INTERPRETED",
    "cdiv",
    "compute_type",
    "kernel",
    "kernel_with",
    "num_multiprocessors",
    "on_compiling",
    "power_of_2",
    "tl",
]

if TYPE_CHECKING:
    import triton
    import triton.language as tl

    HAS_TRITON: bool
else:
    try:
        import triton
        import triton.language as tl

        HAS_TRITON = True
    except ImportError:
        HAS_TRITON = False

        class tl:  # noqa: N801
            """What kernels name outside their bodies."""

            tensor = object

            class constexpr:  # noqa: N801
                def __init__(self, value: int | float) -> None:
                    self.value = value


IS_INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Kernels run on the CPU, a program after the other, for tests: set before the first import of triton."""


class Kernel(Protocol):
    """A compiled function: `kernel[grid](arguments, num_warps=..., ...)`."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]: ...


class _Missing:
    def __init__(self, name: str) -> None:
        self._name = name

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        raise RuntimeError(f"{self._name} needs Triton, which this machine does not have")


def kernel(function: Callable[..., object]) -> Kernel:
    """Compile a function of Triton's language at its first launch."""
    return kernel_with()(function)


def kernel_with(
    *, counts: tuple[str, ...] = (), loose: tuple[str, ...] = ()
) -> Callable[[Callable[..., object]], Kernel]:
    """The same for arguments that change from step to step, which would have a kernel compiled anew.

    Triton compiles apart for numbers that are 1 or multiples of 16 and for pointers to multiples of 16 bytes;
    not for the numbers named in `counts`, nor for the pointers in `loose`.
    """

    def of(function: Callable[..., object]) -> Kernel:
        if not HAS_TRITON:
            return _Missing(function.__name__)
        compiled: Kernel = triton.jit(
            function, do_not_specialize=list(counts), do_not_specialize_on_alignment=list(loose)
        )
        return compiled

    return of


def on_compiling(tell: Callable[[bool], None]) -> None:
    """From now on call `tell(True)` before a kernel is compiled at its launch, and `tell(False)` after it."""
    if not HAS_TRITON or IS_INTERPRETED:
        return

    def before(**_: object) -> bool:
        tell(True)
        return False  # go on and compile it

    def after(**_: object) -> bool:
        tell(False)
        return False

    triton.knobs.runtime.jit_cache_hook = before
    triton.knobs.runtime.jit_post_compile_hook = after


def cdiv(value: int, divisor: int) -> int:
    """Divide, rounding up."""
    return -(-value // divisor)


def power_of_2(value: int) -> int:
    """The least power of two that is not below `value` (at least 1)."""
    return 1 << max(0, value - 1).bit_length()


def compute_type(dtype: torch.dtype) -> "tl.dtype":
    """What matrix products of such values are computed in: the interpreter's bfloat16 is silently wrong."""
    match dtype:
        case torch.bfloat16:
            return tl.float32 if IS_INTERPRETED else tl.bfloat16
        case torch.float16:
            return tl.float16
        case torch.float32:
            return tl.float32
    raise ValueError(f"no kernel computes in {dtype}")


def num_multiprocessors(device: torch.device) -> int:
    """How many programs the device runs at least at once; 1 without a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
