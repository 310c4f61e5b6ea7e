"""`pagebus bench latency` and `throughput`: batches without HTTP, over the bus or in one process.

Both ways run the same requester, scheduler and executor; only the bus between them differs.
"""

import asyncio
import contextlib
import os
import random
import secrets
import statistics
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import msgspec

from pagebus.bench.processes import Machine, machine, percentile
from pagebus.bench.stack import stack
from pagebus.bus.memory import MemoryBus
from pagebus.bus.messages import Sampling
from pagebus.executor import service as executor_service
from pagebus.requester.client import Requester
from pagebus.requester.events import NewTokens, RequestSpec
from pagebus.scheduler import service as scheduler_service
from pagebus.settings.model_files import resolve_model
from pagebus.settings.structs import ServeSettings

Way = Literal["bus", "one-process"]
_READY_TIMEOUT_S = 300.0
# Ids that are ordinary tokens in about every vocabulary.
_LOWEST_ID, _HIGHEST_ID = 32, 250


class OfflineError(Exception):
    """A request failed, or the services did not come up."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Requests sent at once. `seed`: of prompts, which differ from batch to batch."""

    num_requests: int
    input_len: int
    output_len: int
    seed: int = 0

    def specs(self) -> list[RequestSpec]:
        """The requests, greedy."""
        rng = random.Random(self.seed)  # noqa: S311
        return [
            RequestSpec(
                request_id=f"bench-{secrets.token_hex(12)}",
                prompt=[rng.randint(_LOWEST_ID, _HIGHEST_ID) for _ in range(self.input_len)],
                sampling=Sampling(temperature=0.0),
                max_tokens=self.output_len,
            )
            for _ in range(self.num_requests)
        ]


class Timed(msgspec.Struct, frozen=True):
    """One batch: seconds until its last token, and all its ids, to compare them."""

    seconds: float
    ids: list[list[int]]


async def run_batch(requester: Requester, batch: Batch) -> Timed:
    """Send all requests and wait for the last one. Raises `OfflineError`."""

    async def one(spec: RequestSpec) -> list[int]:
        made: list[int] = []
        async for event in requester.generate(spec):
            if isinstance(event, NewTokens):
                made += event.ids
        if len(made) != spec.max_tokens:
            raise OfflineError(f"a request ended after {len(made)} tokens of {spec.max_tokens}")
        return made

    specs = batch.specs()
    began_s = time.perf_counter()
    ids = await asyncio.gather(*(one(spec) for spec in specs))
    return Timed(time.perf_counter() - began_s, list(ids))


@contextlib.asynccontextmanager
async def one_process(settings: ServeSettings) -> AsyncIterator[Requester]:
    """Requester, scheduler and executor in this process, on a bus in its memory."""
    bus, stop = MemoryBus(), asyncio.Event()
    path = await asyncio.to_thread(resolve_model, settings)
    tasks = [
        asyncio.create_task(scheduler_service.run(settings, bus, "scheduler", stop)),
        asyncio.create_task(executor_service.run(settings, bus, path, "executor", stop)),
    ]
    requester = Requester(bus, model=settings.model_name, instance="bench")
    await requester.start()
    try:
        async with asyncio.timeout(_READY_TIMEOUT_S):
            while requester.heartbeat is None or requester.heartbeat.num_executors < 1:
                if any(task.done() for task in tasks):
                    raise OfflineError("a service ended at its start")
                await asyncio.sleep(0.05)
        yield requester
    finally:
        await requester.close()
        stop.set()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def engine(settings: ServeSettings, way: Way) -> AsyncIterator[Requester]:
    """A requester with everything behind it."""
    if way == "one-process":
        async with one_process(settings) as requester:
            yield requester
        return
    with TemporaryDirectory() as folder:
        async with stack(settings, Path(folder) / "services.log") as requester:
            yield requester


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of a batch; `percentiles` by percent, as vLLM's file has them."""

    machine: Machine
    model: str
    batch_size: int
    input_len: int
    output_len: int
    avg_latency: float
    latencies: list[float]
    percentiles: dict[str, float]


async def measure_latency(settings: ServeSettings, batch: Batch, num_warm: int, num_runs: int) -> Latency:
    """The same size of batch again and again, with prompts that no cache knows."""
    async with engine(settings, "bus") as requester:
        found = []
        for number in range(num_warm + num_runs):
            timed = await run_batch(requester, with_seed(batch, number))
            if number >= num_warm:
                found.append(timed.seconds)
    return Latency(
        machine=machine(),
        model=settings.model_name,
        batch_size=batch.num_requests,
        input_len=batch.input_len,
        output_len=batch.output_len,
        avg_latency=statistics.fmean(found),
        latencies=found,
        percentiles={str(share): percentile(found, share / 100) for share in (10, 25, 50, 75, 90, 99)},
    )


def with_seed(batch: Batch, seed: int) -> Batch:
    """The batch with other prompts."""
    return Batch(
        num_requests=batch.num_requests, input_len=batch.input_len, output_len=batch.output_len, seed=seed
    )


class Throughput(msgspec.Struct, frozen=True, kw_only=True):
    """Requests and tokens a second of one batch sent at once."""

    machine: Machine
    model: str
    way: str
    elapsed_time: float
    num_requests: int
    requests_per_second: float
    tokens_per_second: float
    output_tokens_per_second: float


def _throughput(settings: ServeSettings, way: Way, batch: Batch, seconds: float) -> Throughput:
    return Throughput(
        machine=machine(),
        model=settings.model_name,
        way=way,
        elapsed_time=seconds,
        num_requests=batch.num_requests,
        requests_per_second=batch.num_requests / seconds,
        tokens_per_second=batch.num_requests * (batch.input_len + batch.output_len) / seconds,
        output_tokens_per_second=batch.num_requests * batch.output_len / seconds,
    )


async def measure_throughput(settings: ServeSettings, batch: Batch, way: Way = "bus") -> Throughput:
    """One batch, after a short one."""
    async with engine(settings, way) as requester:
        await run_batch(requester, Batch(num_requests=4, input_len=8, output_len=8, seed=1 << 20))
        timed = await run_batch(requester, batch)
    return _throughput(settings, way, batch, timed.seconds)


class Ratio(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens a second over the bus against in one process, each between two of the other; and whether both
    made the same tokens."""

    machine: Machine
    model: str
    num_requests: int
    input_len: int
    output_len: int
    over_bus: list[float]
    in_one_process: list[float]
    ratio: float
    is_same: bool


async def measure_ratio(settings: ServeSettings, batch: Batch, num_rounds: int) -> Ratio:
    """Both ways at once in memory, in turn at work: A B A B ... with the same prompts in each pair."""
    rates: dict[Way, list[float]] = {"bus": [], "one-process": []}
    is_same = True
    ways: tuple[Way, Way] = ("bus", "one-process")
    async with Apart(settings) as apart, engine(settings, "bus") as requester:
        for number in range(-1, num_rounds):
            one = with_seed(batch, number)
            made = {}
            for way in ways if number % 2 else reversed(ways):
                made[way] = await run_batch(requester, one) if way == "bus" else await apart.run(one)
                if number >= 0:
                    rates[way].append(batch.num_requests * batch.output_len / made[way].seconds)
            is_same = is_same and made["bus"].ids == made["one-process"].ids
    return Ratio(
        machine=machine(),
        model=settings.model_name,
        num_requests=batch.num_requests,
        input_len=batch.input_len,
        output_len=batch.output_len,
        over_bus=rates["bus"],
        in_one_process=rates["one-process"],
        ratio=statistics.median(a / b for a, b in zip(rates["bus"], rates["one-process"], strict=True)),
        is_same=is_same,
    )


class Apart:
    """The engine of one process, in a process of its own, so that this one is the same beside both."""

    def __init__(self, settings: ServeSettings) -> None:
        self._settings = settings

    async def __aenter__(self) -> "Apart":
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "pagebus.bench.offline",
            msgspec.json.encode(self._settings).decode(),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=1 << 28,
        )
        if self._process.stdin is None or self._process.stdout is None:
            raise OfflineError("no pipes to the other process")
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        if not await self._stdout.readline():
            raise OfflineError("the engine of one process did not come up")
        return self

    async def __aexit__(self, *error: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()

    async def run(self, batch: Batch) -> Timed:
        """One batch there."""
        self._stdin.write(msgspec.json.encode(batch) + b"\n")
        await self._stdin.drain()
        line = await self._stdout.readline()
        if not line:
            raise OfflineError("the engine of one process ended")
        return msgspec.json.decode(line, type=Timed)


async def _serve_batches(settings: ServeSettings) -> None:
    async with engine(settings, "one-process") as requester:
        print("{}", flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            timed = await run_batch(requester, msgspec.json.decode(line, type=Batch))
            print(msgspec.json.encode(timed).decode(), flush=True)
        os._exit(0)


def show_latency(found: Latency, json_file: Path | None) -> None:
    """Print, and write the file that is asked for."""
    print(
        f"{found.model}: {found.batch_size} requests of {found.input_len} tokens in, {found.output_len} out; "
        f"{len(found.latencies)} batches, {found.avg_latency:.3f} s on average"
    )
    for share, seconds in found.percentiles.items():
        print(f"{share:>3} % of the batches within {seconds:.3f} s")
    _write(found, json_file)


def show_throughput(found: Throughput, json_file: Path | None) -> None:
    """The same."""
    print(
        f"{found.model} ({found.way}): {found.requests_per_second:.2f} requests/s, "
        f"{found.tokens_per_second:.1f} tokens/s, of them {found.output_tokens_per_second:.1f} made"
    )
    _write(found, json_file)


def show_ratio(found: Ratio, json_file: Path | None) -> None:
    """The same."""
    bus, one = statistics.median(found.over_bus), statistics.median(found.in_one_process)
    print(
        f"{found.model}: {bus:.1f} tokens/s over NATS, {one:.1f} in one process (medians of "
        f"{len(found.over_bus)}); median ratio of the pairs {found.ratio:.3f}; "
        f"{'the same tokens' if found.is_same else 'NOT the same tokens'}; load {found.machine.load_1min}"
    )
    _write(found, json_file)


def _write(found: msgspec.Struct, json_file: Path | None) -> None:
    if json_file is not None:
        json_file.write_text(msgspec.json.format(msgspec.json.encode(found), indent=2).decode() + "\n")


if __name__ == "__main__":
    asyncio.run(_serve_batches(msgspec.json.decode(sys.argv[1], type=ServeSettings)))
