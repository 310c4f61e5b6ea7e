"""`pagebus bench gpu`: how near an accelerator's floors the executor comes, alone and over the bus.

Each measurement stands alone: one that fails is noted, and the next begins. The cheapest and most telling
come first, and the results file is rewritten after each, so that a run cut short still counts.
"""

import asyncio
import gc
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from pagebus.bench.gpu_results import Measured, Report, heading, line, new_report, save
from pagebus.bench.gpu_shapes import cost_of, write_config
from pagebus.bench.stack import stack
from pagebus.bus.messages import Sampling
from pagebus.executor.batch import RowInput
from pagebus.executor.kv_cache import needs_of
from pagebus.executor.loader import load_model
from pagebus.executor.memory import share_blocks
from pagebus.executor.model_runner import ModelRunner, on_device
from pagebus.requester.events import NewTokens, RequestFailed, RequestSpec
from pagebus.settings.structs import KvCacheDtype, Quantization, ServeSettings

RESULTS_FILE = "gpu.json"
CONTEXT = 1024
ROOM = 256  # tokens that rows may go on for
_GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True, kw_only=True)
class GpuRequest:
    """What the command line asks for."""

    out: Path = Path()
    device: Literal["cuda", "cpu"] = "cuda"
    shapes: Sequence[str] = ("qwen3-0.6b", "llama-3.1-8b")
    is_quick: bool = False
    has_bus: bool = True


@dataclass(frozen=True, slots=True)
class Variant:
    """Another way to run a model, measured beside the plain one."""

    name: str
    kv_cache_dtype: KvCacheDtype = "auto"
    quantization: Quantization = "none"
    is_batch_invariant: bool = False


_PLAIN = Variant("plain")
_VARIANTS = (
    Variant("fp8 KV", kv_cache_dtype="fp8"),
    Variant("fp8 weights and KV", kv_cache_dtype="fp8", quantization="fp8"),
    Variant("batch-invariant", is_batch_invariant=True),
)

Measurement = Callable[[], Iterator[Measured]]


def run(request: GpuRequest) -> Report:
    """Measure all, print the table line by line, and keep the results file. Nothing is raised."""
    device = torch.device(request.device)
    report = new_report(device)
    path = request.out / RESULTS_FILE
    print(heading(report), flush=True)
    machine = _Machine(device, request.is_quick)
    with tempfile.TemporaryDirectory(prefix="pagebus-bench-") as folder:
        for name, measurement in _measurements(request, machine, Path(folder)):
            try:
                for measured in measurement():
                    report.measured.append(measured)
                    print(line(measured), flush=True)
                    save(report, path)
            except Exception as error:
                report.failed[name] = f"{type(error).__name__}: {error}"[:2000]
                print(f"{name}: {report.failed[name]}", file=sys.stderr, flush=True)
                save(report, path)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return report


def _measurements(
    request: GpuRequest, machine: "_Machine", folder: Path
) -> Iterator[tuple[str, Measurement]]:
    yield "ceilings", machine.ceilings
    for shape in request.shapes:
        model = _Model(shape, machine, folder, is_quick=request.is_quick)
        yield f"{shape}, decode", model.decode
        yield f"{shape}, prefill", model.prefill
        yield f"{shape}, free", model.free
    for variant in _VARIANTS if machine.device.type == "cuda" else ():
        for shape in request.shapes:
            model = _Model(shape, machine, folder, is_quick=request.is_quick, variant=variant)
            yield f"{shape}, {variant.name}", model.decode
            yield f"{shape}, {variant.name}, free", model.free
    for shape in request.shapes if request.has_bus else ():
        yield f"{shape}, over the bus", _OverTheBus(shape, machine, folder, is_quick=request.is_quick).measure


class _Machine:
    """The device and what it can do at most, as measured."""

    def __init__(self, device: torch.device, is_quick: bool) -> None:
        self.device = device
        self._is_quick = is_quick
        self.bytes_per_s = 1.0
        self.flops = 1.0
        self.plain_s: dict[str, float] = {}  # a plain step's, by the name of what was measured

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def time_s(self, work: Callable[[], object], repeats: int) -> float:
        """Median seconds of `work`, after two runs that do not count."""
        times = []
        for i in range(repeats + 2):
            self.synchronize()
            began_s = time.perf_counter()
            work()
            self.synchronize()
            if i >= 2:
                times.append(time.perf_counter() - began_s)
        return statistics.median(times)

    def ceilings(self) -> Iterator[Measured]:
        """Memory bandwidth of a copy, and a large product."""
        is_cuda = self.device.type == "cuda"
        num_bytes = 4 << 30 if is_cuda and not self._is_quick else 64 << 20
        source = torch.zeros(num_bytes, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        self.bytes_per_s = 2 * num_bytes / self.time_s(lambda: target.copy_(source), 10)
        yield Measured(
            name="copy, bytes read and written",
            value=self.bytes_per_s / 1e9,
            unit="GB/s",
            is_less_better=False,
        )
        size, dtype = (8192, torch.bfloat16) if is_cuda and not self._is_quick else (512, torch.float32)
        left, right = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
        self.flops = 2 * size**3 / self.time_s(lambda: left @ right, 10)
        yield Measured(
            name=f"matrix product, {size}, {str(dtype).removeprefix('torch.')}",
            value=self.flops / 1e12, unit="TFLOP/s", is_less_better=False,
        )  # fmt: skip


class _Model:
    """A shape with random weights, loaded when it is first measured."""

    def __init__(
        self, shape: str, machine: _Machine, folder: Path, *, is_quick: bool, variant: Variant = _PLAIN
    ) -> None:
        self._shape, self._machine, self._folder = shape, machine, folder
        self._is_quick, self._variant = is_quick, variant
        self._cost = cost_of(shape)
        self._runner: ModelRunner | None = None
        self._num_rows = (1, 4) if is_quick else (1, 8, 32, 64, 128, 256)

    @property
    def runner(self) -> ModelRunner:
        """With pages for the most rows at the context."""
        if self._runner is None:
            device: Literal["cuda", "cpu"] = "cuda" if self._machine.device.type == "cuda" else "cpu"
            path = write_config(self._shape, self._folder)
            loaded = load_model(
                path,
                device=device,
                load_format="dummy",
                max_model_len=4 * CONTEXT,
                kv_cache_dtype=self._variant.kv_cache_dtype,
                quantization=self._variant.quantization,
                is_batch_invariant=self._variant.is_batch_invariant,
            )
            needs = needs_of(loaded.specs, loaded.page_dtype)
            num_blocks = (max(self._num_rows) + 1) * (2 * CONTEXT // 16)
            budget = num_blocks * sum(need.bytes_a_block for need in needs)
            self._runner = on_device(
                loaded,
                share_blocks(needs, budget, loaded.max_model_len),
                max_rows=max(self._num_rows),
            )
        return self._runner

    def free(self) -> Iterator[Measured]:
        """Give the memory back."""
        self._runner = None
        yield from ()

    def decode(self) -> Iterator[Measured]:
        """Milliseconds of a step in which every row decodes."""
        for num_rows in self._num_rows:
            rows = self._rows(num_rows, num_ids=1, start=CONTEXT)
            step_s, note = self._step_s(rows)
            name, note = f"{self._shape}, decode, {num_rows} rows", f"{num_rows / step_s:,.0f} tok/s{note}"
            if self._variant is not _PLAIN:
                plain_s = self._machine.plain_s.get(name)
                note += "" if plain_s is None else f", {step_s / plain_s:.2f} x plain"
                yield Measured(
                    name=f"{name}, {self._variant.name}", value=step_s * 1e3, unit="ms", note=note
                )  # fmt: skip
                continue
            self._machine.plain_s[name] = step_s
            floor_s = self._cost.decode_floor_s(
                num_rows, CONTEXT, self._machine.bytes_per_s, self._machine.flops
            )
            yield Measured(
                name=f"{name}, context {CONTEXT}",
                value=step_s * 1e3, unit="ms", floor=floor_s * 1e3, note=note,
            )  # fmt: skip

    def _step_s(self, rows: Sequence[RowInput]) -> tuple[float, str]:
        """Seconds of a step as the executor launches it, and more about it."""
        if self._machine.device.type == "cpu":
            return self._machine.time_s(partial(self.runner.step, rows), 5 if self._is_quick else 30), ""
        from pagebus.bench.gpu_decode import paced  # Triton: not on a CPU
        from pagebus.executor.device_runner import DeviceRunner

        if not isinstance(self.runner, DeviceRunner):
            raise TypeError("a GPU without Triton")
        found = paced(self.runner, rows, 40)
        note = f", idle {100 * found.idle_share:.1f} %, launched in {found.launch_s * 1e6:.0f} us"
        return found.step_s, note

    def prefill(self) -> Iterator[Measured]:
        """Prompt tokens a second, two prompts of the context a step."""
        num_rows = 1 if self._is_quick else 2
        rows = self._rows(num_rows, num_ids=CONTEXT, start=0)
        step_s = self._machine.time_s(lambda: self.runner.step(rows), 3 if self._is_quick else 10)
        yield Measured(
            name=f"{self._shape}, prefill, {num_rows} x {CONTEXT}",
            value=num_rows * CONTEXT / step_s, unit="tok/s",
            floor=self._cost.prefill_floor(self._machine.flops), is_less_better=False,
        )  # fmt: skip

    def _rows(self, num_rows: int, num_ids: int, start: int) -> list[RowInput]:
        num_blocks = -(-(start + num_ids + ROOM) // 16)
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


class _OverTheBus:
    """The same engine as services: NATS, scheduler, executor, and a requester in this process."""

    def __init__(self, shape: str, machine: _Machine, folder: Path, *, is_quick: bool) -> None:
        self._shape, self._machine, self._folder = shape, machine, folder
        self._is_quick = is_quick

    def measure(self) -> Iterator[Measured]:
        """One stream, and the mixed lengths of nano-vllm's benchmark."""
        path = write_config(self._shape, self._folder)
        settings = ServeSettings(
            model=str(path),
            load_format="dummy",
            device="cuda" if self._machine.device.type == "cuda" else "cpu",
            max_model_len=4 * CONTEXT,
            max_num_batched_tokens=8192 if self._machine.device.type == "cuda" else 512,
            kv_cache_memory="auto" if self._machine.device.type == "cuda" else "256MiB",
        )
        return iter(asyncio.run(self._all(settings)))

    async def _all(self, settings: ServeSettings) -> list[Measured]:
        low, high, num_requests = (10, 40, 6) if self._is_quick else (100, 1024, 256)
        rng = random.Random(0)  # noqa: S311
        async with stack(settings, self._folder / "services.log") as requester:

            async def one(number: int, num_prompt: int, num_output: int) -> list[float]:
                spec = RequestSpec(
                    request_id=f"r{number}-{time.monotonic_ns()}",
                    prompt=[rng.randrange(5, 500) for _ in range(num_prompt)],
                    max_tokens=num_output,
                    sampling=_GREEDY,
                )
                times: list[float] = []
                async for event in requester.generate(spec):
                    if isinstance(event, RequestFailed):
                        raise RuntimeError(f"{event.code}: {event.message}")
                    if isinstance(event, NewTokens):
                        times += [time.perf_counter()] * len(event.ids)
                return times

            await one(-1, 8, 16)  # what is compiled at the first request
            context = 16 if self._is_quick else CONTEXT
            alone = await one(0, context, 32 if self._is_quick else 256)
            step_s = (alone[-1] - alone[len(alone) // 4]) / (len(alone) - 1 - len(alone) // 4)
            floor_s = cost_of(self._shape).decode_floor_s(
                1, context, self._machine.bytes_per_s, self._machine.flops
            )
            found = [
                Measured(
                    name=f"{self._shape}, over NATS, one stream, context {context}",
                    value=step_s * 1e3, unit="ms", floor=floor_s * 1e3,
                )
            ]  # fmt: skip
            lengths = [(rng.randint(low, high), rng.randint(low, high)) for _ in range(num_requests)]
            began_s = time.perf_counter()
            made = await asyncio.gather(*(one(i, *pair) for i, pair in enumerate(lengths, 1)))
            rate = sum(map(len, made)) / (time.perf_counter() - began_s)
            name = f"{self._shape}, over NATS, {num_requests} requests of {low} to {high} tokens"
            found.append(Measured(name=name, value=rate, unit="tok/s", is_less_better=False))
        return found
