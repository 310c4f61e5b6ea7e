"""The parts of `pagebus bench gpu` in the order in which they run, and what each takes. Knows no device.

A part runs in a process of its own, so that a fault of the device, a hang or memory that is not given back
ends that part alone.
"""

from collections.abc import Sequence
from typing import Literal

import msgspec

from pagebus.settings.structs import KvCacheDtype, Quantization

Kind = Literal["ceilings", "linears", "alone", "served", "ratio"]
Load = Literal["stream", "mixed", "prefill", "saturated"]


class Variant(msgspec.Struct, frozen=True, kw_only=True):
    """Another way to run a model, measured beside the plain one."""

    name: str = ""
    kv_cache_dtype: KvCacheDtype = "auto"
    quantization: Quantization = "none"
    is_batch_invariant: bool = False


PLAIN = Variant()
FP8_KV = Variant(name="fp8 KV", kv_cache_dtype="fp8")
FP8 = Variant(name="fp8 weights and KV", kv_cache_dtype="fp8", quantization="fp8")
INVARIANT = Variant(name="batch-invariant", is_batch_invariant=True)


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """What one process measures."""

    kind: Kind
    about_s: float  # seconds that it takes on a GPU, loading included
    shape: str = ""
    variant: Variant = PLAIN
    loads: tuple[Load, ...] = ()  # of "served"
    num_rows: tuple[int, ...] = ()  # of "alone"

    @property
    def name(self) -> str:
        """No two parts' are the same."""
        words = (self.shape, self.kind, self.variant.name)
        return ", ".join(word for word in words if word)


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """A part, and what it must know of the run; travels to the part's process."""

    part: Part
    device: Literal["cuda", "cpu"]
    is_quick: bool
    bytes_per_s: float
    flops: float
    known: dict[str, float]  # figures that were measured before, by name


_ALL_ROWS, _SOME_ROWS = (1, 8, 32, 64, 128, 256), (1, 32, 256)


def parts_of(shapes: Sequence[str], *, is_quick: bool, has_bus: bool, is_cpu: bool) -> list[Part]:
    """Cheapest and most telling first: alone, then over NATS, then other ways to run."""
    rows, some = ((1, 4), (1,)) if is_quick else (_ALL_ROWS, _SOME_ROWS)
    parts = [Part(kind="ceilings", about_s=15)]
    large = [shape for shape in shapes if shape.endswith("8b")]
    parts += [Part(kind="alone", shape=shape, num_rows=rows, about_s=45) for shape in reversed(shapes)]
    if has_bus:
        for shape in shapes:
            loads: tuple[Load, ...] = ("stream", "mixed")
            if shape in large:
                loads = ("stream", "prefill", "saturated")
            elif shape == "tiny":
                loads = ("stream", "prefill", "mixed", "saturated")
            about_s = 170 if shape in large else 75
            parts.append(Part(kind="served", shape=shape, loads=loads, about_s=about_s))
        if not is_cpu:
            for shape in shapes:
                about_s, variant = (140, FP8) if shape in large else (70, FP8_KV)
                load: Load = "saturated" if shape in large else "mixed"
                parts.append(
                    Part(kind="served", shape=shape, variant=variant, loads=(load,), about_s=about_s)
                )
        parts.append(Part(kind="ratio", shape=shapes[0], about_s=130))
    if not is_cpu:
        parts += [Part(kind="linears", shape=shape, about_s=40) for shape in shapes]
        for variant in (INVARIANT, FP8_KV, FP8):
            for shape in reversed(shapes):
                parts.append(Part(kind="alone", shape=shape, variant=variant, num_rows=some, about_s=45))
    return parts
