"""`pagebus bench gateway`: what a token costs the gateway process, and how late it comes, with many streams.

Real gateway processes and a real bus; executors and clients are one cheap process each (`token_source.py`,
`stream_reader.py`), so that a machine of two cores measures the gateway and not them.
"""

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec

from pagebus.bench.gateway_figures import GatewayFigures, Stage, Variant, table
from pagebus.bench.processes import cpu_s, machine, percentile, rss_bytes
from pagebus.bench.stream_reader import Counts, Mark, Nap, ReaderConfig, Sampled, Take
from pagebus.bench.token_source import Command, Finish, Made, Run, SourceConfig
from pagebus.cli.launcher import service_environment
from pagebus.cli.nats_server import EmbeddedNats
from pagebus.cli.port import LISTEN_VARIABLE, SharedListener
from pagebus.cli.processes import READY_VARIABLE, service_command
from pagebus.settings.model_files import resolve_model
from pagebus.settings.structs import ServeSettings

_READY_TIMEOUT_S = 30.0
_SETTLE_S = 20.0
_LINE_LIMIT = 1 << 28
_LOG_TAIL = 1000
_NAP_S = 0.002  # of the clients while the gateway is saturated
_SHORT_NAP_S = 0.0002  # while latencies are measured: they contain it


class GatewayBenchError(Exception):
    """The parts did not come up, or tokens went missing."""


@dataclass(frozen=True, kw_only=True)
class GatewayRequest:
    """What the command line asks for. `intervals`: the gateway's `--stream-interval` of each variant; `tree`:
    another source tree, whose gateway is measured instead of this one's."""

    num_streams: int = 1024
    num_executors: int = 16
    num_gateways: int = 1
    seconds: float = 6.0
    window: int = 128
    rounds: int = 1
    intervals: tuple[int, ...] = (1, 0)
    half_rate: float = 0.0  # tokens a second of `half_load`; 0: half of the first variant's most
    stores: bool = True
    tree: Path | None = None
    json_file: Path | None = None
    is_json: bool = False


class _Child:
    """A process that answers JSON lines."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        if process.stdin is None or process.stdout is None:
            raise ValueError("the process has no pipes")
        self.process = process
        self._stdin, self._stdout = process.stdin, process.stdout

    @classmethod
    async def start(cls, module: str, config: msgspec.Struct) -> "_Child":
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            module,
            msgspec.json.encode(config).decode(),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_LINE_LIMIT,
        )
        return cls(process)

    async def line(self) -> bytes:
        """Its next answer."""
        line = await self._stdout.readline()
        if not line:
            raise GatewayBenchError("a helper process of the benchmark ended")
        return line

    async def ask(self, command: msgspec.Struct) -> bytes:
        """Its answer to a command."""
        self._stdin.write(msgspec.json.encode(command) + b"\n")
        await self._stdin.drain()
        return await self.line()


class _Bed:
    """The running parts of one variant."""

    def __init__(self, nats: EmbeddedNats, gateways: list[asyncio.subprocess.Process]) -> None:
        self.nats = nats
        self.gateways = gateways
        self.children: list[_Child] = []

    @property
    def source(self) -> _Child:
        """Executors and scheduler."""
        return self.children[0]

    @property
    def reader(self) -> _Child:
        """Clients."""
        return self.children[1]

    def gateway_cpu_s(self) -> float:
        """Of all gateways."""
        return sum(cpu_s(gateway.pid) for gateway in self.gateways)

    async def counts(self) -> Counts:
        """What the clients have read."""
        return msgspec.json.decode(await self.reader.ask(Mark()), type=Counts)

    async def run(self, command: Command) -> Made:
        """What the source made."""
        return msgspec.json.decode(await self.source.ask(command), type=Made)

    async def until_read(self, num_tokens: int, num_ended: int = 0) -> Counts:
        """Wait until the clients have all that was made. Raises `GatewayBenchError`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SETTLE_S):
                while True:
                    counts = await self.counts()
                    if counts.num_tokens >= num_tokens and counts.num_ended >= num_ended:
                        return counts
                    await asyncio.sleep(0.02)
        raise GatewayBenchError(
            f"clients have {counts.num_tokens} tokens of {num_tokens}, {counts.num_ended} whole streams, "
            f"{counts.num_broken} broken ones"
        )


async def measure(request: GatewayRequest) -> GatewayFigures:
    """All variants, one after the other, as often as asked for. Raises `GatewayBenchError`."""
    variants: list[Variant] = []
    for _ in range(request.rounds):
        for interval in request.intervals:
            first = variants[0].saturated.tokens_per_s / 2 if variants else 0.0
            variants.append(await _measure_variant(request, interval, request.half_rate or first))
    return GatewayFigures(
        machine=machine(),
        num_streams=request.num_streams,
        num_executors=request.num_executors,
        num_gateways=request.num_gateways,
        is_stored=request.stores,
        is_cpu_count_exhausted=len(os.sched_getaffinity(0)) < request.num_gateways + 3,
        variants=variants,
    )


async def _measure_variant(request: GatewayRequest, interval: int, half_rate: float) -> Variant:
    async with _bed(request, interval) as bed:
        num_streams = request.num_streams
        first = await bed.run(Run(seconds=0.2, rate=num_streams * 5))  # everybody's first tokens
        num_made = first.num_tokens
        await bed.until_read(num_made)
        await bed.reader.ask(Nap(_NAP_S))
        saturated, num_made = await _stage(bed, Run(seconds=request.seconds, window=request.window), num_made)
        await bed.reader.ask(Nap(_SHORT_NAP_S))
        own_rate = saturated.tokens_per_s / 2
        rate = half_rate or own_rate
        half_load, num_made = await _stage(bed, Run(seconds=request.seconds, rate=rate), num_made)
        half_of_own = None
        if interval != 1 and own_rate > rate:
            half_of_own, num_made = await _stage(bed, Run(seconds=request.seconds, rate=own_rate), num_made)
        by_gateway = [_num_connections(gateway.pid) for gateway in bed.gateways]
        last = await bed.run(Finish())
        counts = await bed.until_read(num_made + last.num_tokens, num_streams)
        if counts.num_tokens != num_made + last.num_tokens or counts.num_broken:
            raise GatewayBenchError(
                f"{num_made + last.num_tokens} tokens were made, {counts.num_tokens} arrived, "
                f"{counts.num_broken} streams broke"
            )
    return Variant(
        stream_interval=interval,
        saturated=saturated,
        half_load=half_load,
        half_of_own=half_of_own,
        streams_by_gateway=by_gateway,
    )


async def _stage(bed: _Bed, command: Run, num_before: int) -> tuple[Stage, int]:
    await bed.reader.ask(Take())
    before, gateway_s, nats_s = await bed.counts(), bed.gateway_cpu_s(), cpu_s(bed.nats.pid)
    made = await bed.run(command)
    num_made = num_before + made.num_tokens
    counts = await bed.until_read(num_made)
    gateway_s, nats_s = bed.gateway_cpu_s() - gateway_s, cpu_s(bed.nats.pid) - nats_s
    sampled = msgspec.json.decode(await bed.reader.ask(Take()), type=Sampled)
    latencies = _latencies(sampled, made)
    num_tokens, num_events = counts.num_tokens - before.num_tokens, counts.num_events - before.num_events
    stage = Stage(
        tokens=num_tokens,
        seconds=round(made.seconds, 3),
        gateway_cpu_s=round(gateway_s, 2),
        tokens_per_cpu_s=round(num_tokens / max(gateway_s, 0.01)),
        tokens_per_s=round(num_tokens / made.seconds),
        events=num_events,
        events_per_s=round(num_events / made.seconds),
        tokens_per_event=round(num_tokens / max(num_events, 1), 2),
        bytes_per_token=round((counts.num_bytes - before.num_bytes) / max(num_tokens, 1), 1),
        latency_p50_ms=round(percentile(latencies, 0.5) * 1000, 3),
        latency_p99_ms=round(percentile(latencies, 0.99) * 1000, 3),
        client_cpu_s=round(counts.cpu_s - before.cpu_s, 2),
        source_cpu_s=round(made.cpu_s, 2),
        nats_cpu_s=round(nats_s, 2),
        gateway_rss_mib=round(sum(rss_bytes(gateway.pid) for gateway in bed.gateways) / (1 << 20), 1),
    )
    return stage, num_made


def _latencies(sampled: Sampled, made: Made) -> list[float]:
    """Seconds from an executor's publish to a client's receipt, of each token of the sampled streams."""
    found = []
    have: dict[int, int] = {}
    for arrival in sampled.arrivals:
        times_s = made.times_s[arrival.stream % len(made.times_s)]
        start = have.get(arrival.stream, made.first_step)
        for index in range(start - made.first_step, arrival.num_tokens - made.first_step):
            if 0 <= index < len(times_s):
                found.append(arrival.at_s - times_s[index])
        have[arrival.stream] = arrival.num_tokens
    return found


def _num_connections(pid: int) -> int:
    """Open sockets of a process, beside the few that each gateway has."""
    links = []
    for entry in (Path("/proc") / str(pid) / "fd").iterdir():
        with contextlib.suppress(OSError):
            links.append(entry.readlink().name)
    return sum(name.startswith("socket:") for name in links)


@contextlib.asynccontextmanager
async def _bed(request: GatewayRequest, interval: int) -> AsyncIterator[_Bed]:
    settings = ServeSettings(resume=request.stores)
    path = resolve_model(settings)
    nats = EmbeddedNats()
    await nats.start()
    listener = SharedListener("127.0.0.1", 0)
    bed = _Bed(nats, [])
    with TemporaryDirectory() as folder:
        log = Path(folder) / "gateways.log"
        ready_files = [Path(folder) / f"{number}.ready" for number in range(request.num_gateways)]
        try:
            source = SourceConfig(
                model=settings.model_name,
                scheduler_url=nats.url("scheduler"),
                executor_url=nats.url("executor"),
                tokenizer=str(path / "tokenizer.json"),
                num_executors=request.num_executors,
                num_streams=request.num_streams,
            )
            bed.children.append(await _Child.start("pagebus.bench.token_source", source))
            await bed.source.line()
            with log.open("ab") as out:
                for number, ready_file in enumerate(ready_files):
                    environment = service_environment("gateway", number + 1, settings, nats.url("gateway"))
                    environment |= {
                        LISTEN_VARIABLE: str(listener.fd),
                        READY_VARIABLE: str(ready_file),
                        "PAGEBUS_STREAM_INTERVAL": str(interval),
                    }
                    if request.tree is not None:
                        roots = (request.tree / root for root in ("services", "shared", "kernels"))
                        environment["PYTHONPATH"] = os.pathsep.join(map(str, roots))
                    gateway = await asyncio.create_subprocess_exec(
                        *service_command("gateway"),
                        env=environment,
                        stdout=out,
                        stderr=out,
                        pass_fds=(listener.fd,),
                    )
                    bed.gateways.append(gateway)
            await _until_ready(bed, ready_files, log)
            reader = ReaderConfig(
                host=listener.host,
                port=listener.port,
                model=settings.model_name,
                num_streams=request.num_streams,
                max_tokens=1 << 19,
            )
            bed.children.append(await _Child.start("pagebus.bench.stream_reader", reader))
            yield bed
        finally:
            await _stop(bed)
            listener.close()


async def _stop(bed: _Bed) -> None:
    for child in bed.children:
        with contextlib.suppress(ProcessLookupError):
            child.process.kill()
        await child.process.wait()
    for gateway in bed.gateways:
        with contextlib.suppress(ProcessLookupError):
            gateway.kill()
        await gateway.wait()
    await bed.nats.stop()


async def _until_ready(bed: _Bed, ready_files: list[Path], log: Path) -> None:
    """Until every gateway accepts connections."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_READY_TIMEOUT_S):
            while not all(file.exists() for file in ready_files):
                if any(gateway.returncode is not None for gateway in bed.gateways):
                    break
                await asyncio.sleep(0.05)
            else:
                return
    raise GatewayBenchError(f"no gateway: {_last_words(log)}")


def _last_words(log: Path) -> str:
    return log.read_text(errors="replace")[-_LOG_TAIL:]


def run(request: GatewayRequest) -> GatewayFigures:
    """Measure, print, and write the file that is asked for. Raises `GatewayBenchError`, `OSError`."""
    found = asyncio.run(measure(request))
    encoded = msgspec.json.format(msgspec.json.encode(found), indent=2).decode()
    print(encoded if request.is_json else table(found))
    if request.json_file is not None:
        request.json_file.write_text(encoded + "\n", encoding="utf-8")
    return found
