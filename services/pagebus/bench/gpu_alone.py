"""The executor's runner alone on a device, with random weights: decoding steps, prompts, and the device's own
ceilings. Knows no bus.
"""

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from pagebus.bench.gpu_parts import PLAIN, Task
from pagebus.bench.gpu_results import Measured
from pagebus.bench.gpu_shapes import cost_of, write_config
from pagebus.bus.messages import Sampling
from pagebus.executor.batch import RowInput
from pagebus.executor.kv_cache import needs_of
from pagebus.executor.loader import load_model
from pagebus.executor.memory import share_blocks
from pagebus.executor.model_runner import ModelRunner, on_device

CONTEXT = 1024
IDLE_BARS = {"llama-3.1-8b": 0.5, "qwen3-8b": 0.5, "qwen3-0.6b": 2.0}  # % of the time
COPY, PRODUCT = "copy, bytes read and written", "matrix product"
_ROOM = 256  # tokens that rows may go on for
_GREEDY = Sampling(temperature=0.0)


def device_time_name(shape: str, num_rows: int) -> str:
    """Of a figure that other parts look up: a step's time on the device, nothing in between."""
    return f"{shape}, decode, {num_rows} rows, the graph alone"


def decode_name(shape: str, num_rows: int) -> str:
    """Of a plain decoding step's figure."""
    return f"{shape}, decode, {num_rows} rows"


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_s(device: torch.device, work: Callable[[], object], repeats: int) -> float:
    """Median seconds of `work`, after two runs that do not count."""
    times = []
    for i in range(repeats + 2):
        synchronize(device)
        began_s = time.perf_counter()
        work()
        synchronize(device)
        if i >= 2:
            times.append(time.perf_counter() - began_s)
    return statistics.median(times)


def ceilings(task: Task) -> Iterator[Measured]:
    """Memory bandwidth of a copy, and a large product, both of random numbers."""
    device, is_large = torch.device(task.device), task.device == "cuda" and not task.is_quick
    num_bytes = 4 << 30 if is_large else 64 << 20
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bytes_per_s = 2 * num_bytes / time_s(device, lambda: target.copy_(source), 10)
    yield Measured(name=COPY, value=bytes_per_s / 1e9, unit="GB/s", is_less_better=False)
    size, dtype = (8192, torch.bfloat16) if is_large else (512, torch.float32)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    flops = 2 * size**3 / time_s(device, lambda: left @ right, 10)
    yield Measured(
        name=PRODUCT, value=flops / 1e12, unit="TFLOP/s", is_less_better=False,
        note=f"{size}, {str(dtype).removeprefix('torch.')}",
    )  # fmt: skip


def alone(task: Task) -> Iterator[Measured]:
    """Decoding steps of each number of rows; of the plain model also prompts."""
    with tempfile.TemporaryDirectory(prefix="pagebus-bench-") as folder:
        began_s = time.perf_counter()
        model = _Model(task, Path(folder))
        yield model.started(time.perf_counter() - began_s)
        for num_rows in task.part.num_rows:
            yield from model.decode(num_rows)
        if task.part.variant == PLAIN:
            yield from model.prefill()


class _Model:
    """A shape with random weights and pages for the most rows at the context."""

    def __init__(self, task: Task, folder: Path) -> None:
        self._task, self._shape, variant = task, task.part.shape, task.part.variant
        self._device = torch.device(task.device)
        self._cost = cost_of(
            self._shape,
            is_fp8=variant.quantization == "fp8",
            has_fp8_kv=variant.kv_cache_dtype != "auto",
        )
        loaded = load_model(
            write_config(self._shape, folder),
            device=task.device,
            load_format="dummy",
            max_model_len=4 * CONTEXT,
            kv_cache_dtype=variant.kv_cache_dtype,
            quantization=variant.quantization,
            is_batch_invariant=variant.is_batch_invariant,
        )
        needs, most = needs_of(loaded.specs, loaded.page_dtype), max(task.part.num_rows)
        num_blocks = (most + 1) * ((CONTEXT + 2 * _ROOM) // 16)
        budget = num_blocks * sum(need.bytes_a_block for need in needs)
        self.runner: ModelRunner = on_device(
            loaded, share_blocks(needs, budget, loaded.max_model_len), max_rows=most
        )

    @property
    def _suffix(self) -> str:
        name = self._task.part.variant.name
        return f", {name}" if name else ""

    def started(self, took_s: float) -> Measured:
        """Seconds until the first step could run, and whether decoding is captured."""
        note = ""
        if self._device.type == "cuda":
            from pagebus.executor.device_runner import DeviceRunner

            if isinstance(self.runner, DeviceRunner):
                note = f"{self.runner.num_graphs} graphs"
                if not self.runner.num_graphs:
                    note = "NO GRAPHS: decoding is launched kernel by kernel"
        return Measured(name=f"{self._shape}, start{self._suffix}", value=took_s, unit="s", note=note)

    def decode(self, num_rows: int) -> Iterator[Measured]:
        """Milliseconds of a step in which every row decodes, launched ahead as the executor does."""
        rows, name = self._rows(num_rows, num_ids=1, start=CONTEXT), decode_name(self._shape, num_rows)
        floor_s = self._cost.decode_floor_s(num_rows, CONTEXT, self._task.bytes_per_s, self._task.flops)
        plain_ms = self._task.known.get(name)
        if self._device.type == "cpu":
            step_s = time_s(self._device, partial(self.runner.step, rows), 5 if self._task.is_quick else 30)
            note, more = "", list[Measured]()
        else:
            step_s, note, more = self._paced(rows)
        note = f"{num_rows / step_s:,.0f} tok/s{note}"
        if self._suffix and plain_ms:
            note += f", {step_s * 1e3 / plain_ms:.2f} x the plain model's time"
        yield Measured(
            name=name + self._suffix, value=step_s * 1e3, unit="ms", floor=floor_s * 1e3, note=note
        )  # fmt: skip
        yield from more

    def _paced(self, rows: Sequence[RowInput]) -> tuple[float, str, list[Measured]]:
        from pagebus.bench.gpu_decode import paced  # Triton: not on a CPU
        from pagebus.executor.device_runner import DeviceRunner

        if not isinstance(self.runner, DeviceRunner):
            raise TypeError("a GPU without Triton")
        found = paced(self.runner, rows, 40)
        more = []
        if not self._suffix:
            name = device_time_name(self._shape, len(rows))
            more = [
                Measured(name=name, value=found.device_s * 1e3, unit="ms"),
                Measured(
                    name=f"{self._shape}, GPU idle between steps of {len(rows)} rows",
                    value=100 * found.idle_share, unit="%", bar=IDLE_BARS.get(self._shape),
                ),
            ]  # fmt: skip
        return found.step_s, f", launched in {found.launch_s * 1e6:.0f} us", more

    def prefill(self) -> Iterator[Measured]:
        """Prompt tokens a second, two prompts of the context a step."""
        num_rows = 1 if self._task.is_quick else 2
        rows = self._rows(num_rows, num_ids=CONTEXT, start=0)
        step_s = time_s(self._device, lambda: self.runner.step(rows), 3 if self._task.is_quick else 10)
        yield Measured(
            name=f"{self._shape}, prefill, {num_rows} x {CONTEXT}",
            value=num_rows * CONTEXT / step_s, unit="tok/s",
            floor=self._cost.prefill_floor(self._task.flops, CONTEXT), is_less_better=False,
        )  # fmt: skip

    def _rows(self, num_rows: int, num_ids: int, start: int) -> list[RowInput]:
        num_blocks = -(-(start + num_ids + _ROOM) // 16)
        rng = random.Random(7)  # noqa: S311
        return [
            RowInput(
                ids=[rng.randrange(5, 500) for _ in range(num_ids)],
                start=start,
                tables=[
                    [at % group.num_blocks for at in range(row * num_blocks, (row + 1) * num_blocks)]
                    for group in self.runner.pool
                ],
                sampling=_GREEDY,
            )
            for row in range(num_rows)
        ]
