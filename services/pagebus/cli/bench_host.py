"""The flags of the benchmarks of bus, gateway and engine: `gateway`, `bus`, `hops`, `memory`, `latency`,
`throughput`, `scheduler`."""

import argparse
import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pagebus.cli.errors import CommandError, ExitCode

if TYPE_CHECKING:
    from pagebus.settings.structs import ServeSettings


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"pagebus bench {name}", description=description, allow_abbrev=False
    )
    parser.add_argument(
        "--json", "--output-json", dest="json_file", type=Path, metavar="FILE", help="write the figures"
    )
    return parser


def _given(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace | int:
    try:
        given = parser.parse_args(list(arguments))
    except SystemExit as ended:
        return int(ended.code or 0)
    path: Path | None = given.json_file
    if path is not None and not path.parent.is_dir():
        raise CommandError(f"--json: {path.parent} is no folder", ExitCode.USAGE)
    return given


def _count(lowest: int) -> Callable[[str], int]:
    """An argument's type: a whole number of at least `lowest`."""

    def count(text: str) -> int:
        value = int(text)
        if value < lowest:
            raise argparse.ArgumentTypeError(f"{value} is below {lowest}")
        return value

    return count


def bench_gateway(arguments: Sequence[str]) -> int:
    """`pagebus bench gateway`."""
    parser = _parser(
        "gateway",
        "What a streamed token costs a gateway process, and how late it comes. Gateways and bus are real; "
        "executors and clients are imitated by one cheap process each.",
    )
    add = parser.add_argument
    add("--streams", type=_count(1), default=1024, metavar="N", help="at once (default: %(default)s)")
    add("--executors", type=_count(1), default=16, metavar="N", help="(default: %(default)s)")
    add("--gateways", type=_count(1), default=1, metavar="N", help="processes, one port (default: 1)")
    add("--seconds", type=float, default=6.0, metavar="S", help="of each run (default: %(default)s)")
    add("--rounds", type=_count(1), default=1, metavar="N", help="of all variants (default: %(default)s)")
    add(
        "--stream-interval",
        type=_count(0),
        nargs="+",
        default=[1, 0],
        metavar="N",
        help="variants: 1: one event a token, 0: adaptive (default: both)",
    )
    add("--rate", type=float, default=0.0, help="tokens/s of the latency runs (default: half the most)")
    add("--window", type=_count(8), default=128, metavar="N", help="messages a saturated gateway is behind")
    add("--no-resume", action="store_true", help="streams are not stored")
    add("--tree", type=Path, metavar="DIR", help="measure the gateway of another source tree")
    given = _given(parser, arguments)
    if isinstance(given, int):
        return given
    if not 0.1 <= given.seconds <= 600 or given.rate < 0 or given.streams > 6000:
        raise CommandError(
            "--seconds is from 0.1 to 600, --rate at least 0, --streams at most 6000", ExitCode.USAGE
        )
    from pagebus.bench.gateway import GatewayBenchError, GatewayRequest, run

    request = GatewayRequest(
        num_streams=given.streams,
        num_executors=given.executors,
        num_gateways=given.gateways,
        seconds=given.seconds,
        window=given.window,
        rounds=given.rounds,
        intervals=tuple(given.stream_interval),
        half_rate=given.rate,
        stores=not given.no_resume,
        tree=given.tree,
        json_file=given.json_file,
    )
    try:
        run(request)
    except (GatewayBenchError, OSError) as error:
        raise CommandError(str(error)) from error
    return ExitCode.OK


def bench_bus(arguments: Sequence[str]) -> int:
    """`pagebus bench bus`."""
    parser = _parser("bus", "One way's latency and messages a second on a bus of its own, by payload size.")
    add = parser.add_argument
    add("--sizes", type=_count(0), nargs="+", default=[64, 512, 4096, 65536], metavar="BYTES")
    add("--messages", type=_count(100), default=20_000, metavar="N", help="of a burst (default: %(default)s)")
    given = _given(parser, arguments)
    if isinstance(given, int):
        return given
    if max(given.sizes) > 1 << 22:
        raise CommandError("--sizes: at most 4194304 bytes", ExitCode.USAGE)
    from pagebus.bench.bus import run_bus

    run_bus(given.sizes, given.messages, given.json_file)
    return ExitCode.OK


def bench_hops(arguments: Sequence[str]) -> int:
    """`pagebus bench hops`."""
    parser = _parser("hops", "A token's way hop by hop: real services, a fake model, one stream at a time.")
    parser.add_argument("--num-prompts", type=_count(1), default=300, metavar="N")
    given = _given(parser, arguments)
    if isinstance(given, int):
        return given
    from pagebus.bench.fake_stack import FakeStackError
    from pagebus.bench.hops import HopsError, run_hops

    try:
        run_hops(given.num_prompts, given.json_file)
    except (FakeStackError, HopsError, OSError) as error:
        raise CommandError(str(error)) from error
    return ExitCode.OK


def bench_memory(arguments: Sequence[str]) -> int:
    """`pagebus bench memory`; exit code 1 where a process of ours grew by more than allowed."""
    parser = _parser("memory", "Many tokens through all services, and what it leaves in their memory.")
    add = parser.add_argument
    add("--tokens", type=_count(1000), default=1_000_000, metavar="N", help="(default: %(default)s)")
    add("--max-concurrency", type=_count(1), default=64, metavar="N", help="(default: %(default)s)")
    add("--limit", type=float, default=0.0, metavar="MIB", help="fail where a service grew by more")
    given = _given(parser, arguments)
    if isinstance(given, int):
        return given
    from pagebus.bench.fake_stack import FakeStackError
    from pagebus.bench.flatness import run_flatness
    from pagebus.bench.load import LoadError

    try:
        found = run_flatness(given.tokens, given.max_concurrency, given.json_file)
    except (FakeStackError, LoadError, OSError) as error:
        raise CommandError(str(error)) from error
    own = (memory.growth for role, memory in found.memory.items() if role != "nats-server")
    return 1 if given.limit and max(own) > given.limit else ExitCode.OK


def _engine_flags(parser: argparse.ArgumentParser, input_len: int, output_len: int) -> None:
    add = parser.add_argument
    add("--model", default="", help="directory or hub id (default: the bundled model)")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--load-format", default="auto", choices=("auto", "safetensors", "dummy"))
    add("--max-model-len", type=_count(0), default=0, metavar="N")
    add("--max-num-seqs", type=_count(1), default=256, metavar="N")
    add("--max-num-batched-tokens", type=_count(1), default=2048, metavar="N")
    add("--fake", action="store_true", help="a fake model: no compute")
    add("--input-len", type=_count(1), default=input_len, metavar="N", help="(default: %(default)s)")
    add("--output-len", type=_count(1), default=output_len, metavar="N", help="(default: %(default)s)")


def bench_latency(arguments: Sequence[str]) -> int:
    """`pagebus bench latency`."""
    parser = _parser("latency", "Seconds of one batch, sent at once and repeated.")
    _engine_flags(parser, 32, 128)
    add = parser.add_argument
    add("--batch-size", type=_count(1), default=8, metavar="N", help="(default: %(default)s)")
    add("--num-iters-warmup", type=_count(0), default=10, metavar="N", help="(default: %(default)s)")
    add("--num-iters", type=_count(1), default=30, metavar="N", help="(default: %(default)s)")
    given = _given(parser, arguments)
    if isinstance(given, int):
        return given
    from pagebus.bench.offline import Batch, measure_latency, show_latency

    batch = Batch(num_requests=given.batch_size, input_len=given.input_len, output_len=given.output_len)

    def measure(given: argparse.Namespace) -> None:
        settings = _settings(given)
        found = asyncio.run(measure_latency(settings, batch, given.num_iters_warmup, given.num_iters))
        show_latency(found, given.json_file)

    return _offline(measure, given)


def bench_throughput(arguments: Sequence[str]) -> int:
    """`pagebus bench throughput`."""
    parser = _parser("throughput", "Requests and tokens a second of many requests sent at once.")
    _engine_flags(parser, 128, 128)
    add = parser.add_argument
    add("--num-prompts", type=_count(1), default=100, metavar="N", help="(default: %(default)s)")
    add("--in-one-process", action="store_true", help="all services in one process, without NATS")
    add("--ratio", action="store_true", help="both ways in turn, and their ratio")
    add("--rounds", type=_count(1), default=5, metavar="N", help="of --ratio (default: %(default)s)")
    given = _given(parser, arguments)
    if isinstance(given, int):
        return given
    from pagebus.bench import offline

    batch = offline.Batch(
        num_requests=given.num_prompts, input_len=given.input_len, output_len=given.output_len
    )

    def measure(given: argparse.Namespace) -> None:
        settings = _settings(given)
        if given.ratio:
            found = asyncio.run(offline.measure_ratio(settings, batch, given.rounds))
            offline.show_ratio(found, given.json_file)
            return
        way: offline.Way = "one-process" if given.in_one_process else "bus"
        offline.show_throughput(
            asyncio.run(offline.measure_throughput(settings, batch, way)), given.json_file
        )

    return _offline(measure, given)


def _settings(given: argparse.Namespace) -> "ServeSettings":
    from pagebus.settings.structs import ServeSettings

    return ServeSettings(
        model=given.model,
        dtype=given.dtype,
        device=given.device,
        load_format=given.load_format,
        max_model_len=given.max_model_len,
        max_num_seqs=given.max_num_seqs,
        max_num_batched_tokens=given.max_num_batched_tokens,
        fake=given.fake,
        log_level="warning",
    )


def _offline(measure: Callable[[argparse.Namespace], None], given: argparse.Namespace) -> int:
    from pagebus.bench.offline import OfflineError
    from pagebus.bench.stack import StackError
    from pagebus.settings.model_files import ModelFilesError

    try:
        measure(given)
    except (OfflineError, StackError, ModelFilesError, OSError, TimeoutError) as error:
        raise CommandError(str(error)) from error
    return ExitCode.OK


def bench_scheduler(arguments: Sequence[str]) -> int:
    """`pagebus bench scheduler`."""
    from pagebus.bench import scheduler

    try:
        scheduler.main(arguments)
    except SystemExit as ended:
        return int(ended.code or 0)
    return ExitCode.OK
