"""The same engine as services, with random weights: NATS, scheduler, executor, and a requester here.

`served` measures one stream, a mixed batch, prompts, and as many rows as fit; `ratio` the same load in one
process, over NATS, and over NATS with a delay in every message.
"""

import asyncio
import contextlib
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

from pagebus.bench.gpu_alone import CONTEXT, IDLE_BARS, device_time_name
from pagebus.bench.gpu_parts import Task
from pagebus.bench.gpu_results import Measured
from pagebus.bench.gpu_shapes import cost_of, write_config
from pagebus.bench.offline import Apart, Batch, Timed, run_batch
from pagebus.bench.stack import stack
from pagebus.bus.messages import Sampling
from pagebus.requester.client import Requester
from pagebus.requester.events import NewTokens, RequestFailed, RequestSpec
from pagebus.settings.structs import ServeSettings

_GREEDY = Sampling(temperature=0.0)
_STREAM_BARS = {"llama-3.1-8b": 3.9, "qwen3-0.6b": 0.65}  # ms
_MIXED_BARS = {("qwen3-0.6b", ""): 29_000.0, ("qwen3-0.6b", "fp8 KV"): 45_000.0}  # output tok/s
_SATURATED_BARS = {("llama-3.1-8b", ""): 10_300.0, ("llama-3.1-8b", "fp8 weights and KV"): 18_500.0}
_PREFILL_BARS = {("llama-3.1-8b", 2048): 42_000.0, ("llama-3.1-8b", 8192): 36_000.0}  # tok/s
_RATIO_BAR = 0.99
_DELAY_S = 0.002
_MAX_ROWS = 256


def settings_of(
    task: Task, folder: Path, *, share: float = 0.9, kv_cache_memory: str = "256MiB"
) -> ServeSettings:
    """Settings of all services; `share` of a GPU's memory, or so much for keys and values on a CPU."""
    is_cuda, variant = task.device == "cuda", task.part.variant
    return ServeSettings(
        model=str(write_config(task.part.shape, folder)),
        load_format="dummy",
        device=task.device,
        max_model_len=8 * CONTEXT + 256 if is_cuda else 2 * CONTEXT,
        max_num_seqs=_MAX_ROWS if is_cuda else 16,
        max_num_batched_tokens=8192 if is_cuda else 512,
        gpu_memory_utilization=share,
        kv_cache_memory="auto" if is_cuda else kv_cache_memory,
        kv_cache_dtype=variant.kv_cache_dtype,
        quantization=variant.quantization,
        batch_invariant=variant.is_batch_invariant,
        drain_timeout_s=0.0,
    )


async def served(task: Task) -> AsyncIterator[Measured]:
    """The part's loads, one after the other, on the same services."""
    with tempfile.TemporaryDirectory(prefix="pagebus-bench-") as folder:
        settings = settings_of(task, Path(folder))
        log = Path(folder) / "services.log"
        began_s = time.perf_counter()
        async with stack(settings, log) as requester:
            load = _Load(task, requester)
            yield load.named("services up", time.perf_counter() - began_s, "s", note=_graphs_of(log))
            await load.warm_up()
            for name in task.part.loads:
                async for measured in _of(load, name):
                    yield measured


def _of(load: "_Load", name: str) -> AsyncIterator[Measured]:
    """The measurement of that name."""
    match name:
        case "stream":
            return load.stream()
        case "mixed":
            return load.mixed()
        case "prefill":
            return load.prefill()
        case "saturated":
            return load.saturated()
    raise ValueError(f"there is no load {name}")


def _graphs_of(log: Path) -> str:
    """What the executor said about its graphs."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if "CUDA graphs" in line]
    return lines[-1][-120:] if lines else ""


class _Load:
    """Requests of one shape on services that are up."""

    def __init__(self, task: Task, requester: Requester) -> None:
        self._task, self._requester, variant = task, requester, task.part.variant
        self._shape, self._variant = task.part.shape, variant.name
        self._cost = cost_of(
            self._shape, is_fp8=variant.quantization == "fp8", has_fp8_kv=variant.kv_cache_dtype != "auto"
        )
        self._rng, self._num_sent = random.Random(0), 0  # noqa: S311
        self._is_small = task.is_quick or task.device == "cpu"

    def named(self, what: str, value: float, unit: str, *, note: str = "") -> Measured:
        """A figure without a floor."""
        return Measured(name=self._name(what), value=value, unit=unit, note=note)

    def _name(self, what: str) -> str:
        variant = f", {self._variant}" if self._variant else ""
        return f"{self._shape}, over NATS{variant}, {what}"

    async def _one(self, num_prompt: int, num_output: int) -> list[float]:
        """When each token came."""
        self._num_sent += 1
        spec = RequestSpec(
            request_id=f"r{self._num_sent}-{time.monotonic_ns()}",
            prompt=[self._rng.randrange(5, 500) for _ in range(num_prompt)],
            max_tokens=num_output,
            sampling=_GREEDY,
        )
        times: list[float] = []
        async for event in self._requester.generate(spec):
            if isinstance(event, RequestFailed):
                raise RuntimeError(f"{event.code}: {event.message}")
            if isinstance(event, NewTokens):
                times += [time.perf_counter()] * len(event.ids)
        return times

    async def _all(self, lengths: Sequence[tuple[int, int]]) -> tuple[float, int]:
        """Seconds of requests sent at once, and the tokens made."""
        began_s = time.perf_counter()
        made = await asyncio.gather(*(self._one(*pair) for pair in lengths))
        return time.perf_counter() - began_s, sum(map(len, made))

    async def warm_up(self) -> None:
        """What is compiled at the first requests: prompts alone, among rows that decode, of odd lengths."""
        await self._one(8, 16)
        await asyncio.gather(*(self._one(length, 12) for length in (1, 5, 16, 33, 64, 100)))

    async def stream(self) -> AsyncIterator[Measured]:
        """Time a token of one stream, the median of three; and for what of them the device was idle."""
        context, num = (16, 32) if self._is_small else (CONTEXT, 256)
        found = []
        for _ in range(3):
            times = await self._one(context, num)
            first = len(times) // 4
            found.append((times[-1] - times[first]) / (len(times) - 1 - first))
        step_s = statistics.median(found)
        floor_s = self._cost.decode_floor_s(1, context + num / 2, self._task.bytes_per_s, self._task.flops)
        yield Measured(
            name=self._name(f"one stream, context {context}"),
            value=step_s * 1e3, unit="ms", floor=floor_s * 1e3,
            bar=None if self._is_small or self._variant else _STREAM_BARS.get(self._shape),
            note=f"{1 / step_s:.0f} tok/s",
        )  # fmt: skip
        device_ms = self._task.known.get(device_time_name(self._shape, 1))
        if device_ms is not None and not self._variant:
            yield Measured(
                name=self._name("GPU idle between one stream's steps"),
                value=100 * max(0.0, 1 - device_ms / (step_s * 1e3)), unit="%",
                bar=None if self._is_small else IDLE_BARS.get(self._shape),
            )  # fmt: skip

    async def mixed(self) -> AsyncIterator[Measured]:
        """nano-vllm's benchmark: lengths of prompts and outputs spread evenly, all sent at once."""
        low, high, num_requests = (10, 40, 6) if self._is_small else (100, 1024, 256)
        lengths = [(self._rng.randint(low, high), self._rng.randint(low, high)) for _ in range(num_requests)]
        yield await self._rate(
            f"{num_requests} requests of {low} to {high} tokens",
            lengths,
            None if self._is_small else _MIXED_BARS.get((self._shape, self._variant)),
        )

    async def saturated(self) -> AsyncIterator[Measured]:
        """Two requests for each row that fits at once, 1000 tokens in and out."""
        num_requests, length = (8, 16) if self._is_small else (2 * _MAX_ROWS, 1000)
        yield await self._rate(
            f"{num_requests} requests of {length} and {length} tokens",
            [(length, length)] * num_requests,
            None if self._is_small else _SATURATED_BARS.get((self._shape, self._variant)),
        )

    async def _rate(self, what: str, lengths: Sequence[tuple[int, int]], bar: float | None) -> Measured:
        took_s, num_made = await self._all(lengths)
        floor_s = self._cost.batch_floor_s(lengths, _MAX_ROWS, self._task.bytes_per_s, self._task.flops)
        return Measured(
            name=self._name(what), value=num_made / took_s, unit="tok/s",
            floor=sum(output for _, output in lengths) / floor_s, bar=bar, is_less_better=False,
            note=f"{num_made:,} tokens in {took_s:.1f} s",
        )  # fmt: skip

    async def prefill(self) -> AsyncIterator[Measured]:
        """Prompt tokens a second, one token made of each."""
        for length, num_requests in ((64, 3), (128, 2)) if self._is_small else ((2048, 24), (8192, 8)):
            await self._all([(length, 1)])  # of that length for the first time
            took_s, _ = await self._all([(length, 1)] * num_requests)
            yield Measured(
                name=self._name(f"prefill of {length} tokens"),
                value=num_requests * length / took_s, unit="tok/s",
                floor=self._cost.prefill_floor(self._task.flops, length),
                bar=None if self._is_small else _PREFILL_BARS.get((self._shape, length)),
                is_less_better=False,
            )  # fmt: skip


async def ratio(task: Task) -> AsyncIterator[Measured]:
    """Tokens a second over NATS, and with a delay in every message, against in one process: all three stand
    at the same time, and work in turn."""
    is_small = task.is_quick or task.device == "cpu"
    batch = Batch(
        num_requests=4 if is_small else 64,
        input_len=8 if is_small else 64,
        output_len=32 if is_small else 2048,
    )
    shares = (0.28, 0.56, 0.84)  # of the device, what the others have taken included
    with tempfile.TemporaryDirectory(prefix="pagebus-bench-") as folder:
        log = Path(folder) / "services.log"
        first, second, third = (
            settings_of(task, Path(folder), share=share, kv_cache_memory="32MiB") for share in shares
        )
        async with contextlib.AsyncExitStack() as ways:
            apart = await ways.enter_async_context(Apart(first))
            near = await ways.enter_async_context(stack(second, log))
            far = await ways.enter_async_context(stack(third, log, message_delay_s=_DELAY_S))
            rates: dict[str, list[float]] = {"one": [], "near": [], "far": []}
            is_same = True
            for number in range(-1, 1 if is_small else 3):
                one = replace(batch, seed=number)
                made: dict[str, Timed] = {}
                for way in rates if number % 2 else reversed(rates):
                    made[way] = (
                        await apart.run(one) if way == "one"
                        else await run_batch(near if way == "near" else far, one)
                    )  # fmt: skip
                    if number >= 0:
                        rates[way].append(one.num_requests * one.output_len / made[way].seconds)
                is_same = is_same and made["one"].ids == made["near"].ids == made["far"].ids
        for way, what in (("near", "over NATS"), ("far", f"over NATS with {_DELAY_S * 1e3:g} ms a message")):
            found = [other / own for other, own in zip(rates[way], rates["one"], strict=True)]
            both = f"{statistics.median(rates[way]):,.0f} and {statistics.median(rates['one']):,.0f} tok/s"
            yield Measured(
                name=f"{task.part.shape}, {what} / in one process",
                value=statistics.median(found), unit="", floor=1.0, is_less_better=False,
                bar=None if is_small else _RATIO_BAR,
                note=f"{both}, {'the same' if is_same else 'other'} tokens",
            )  # fmt: skip
