"""`pagebus bench NAME`: finds the benchmark that is asked for and reads its flags."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from pagebus.cli.bench_gpu import bench_gpu
from pagebus.cli.bench_host import (
    bench_bus,
    bench_gateway,
    bench_hops,
    bench_latency,
    bench_memory,
    bench_scheduler,
    bench_throughput,
)
from pagebus.cli.bench_idle import bench_idle
from pagebus.cli.bench_serve import bench_serve
from pagebus.cli.errors import CommandError, ExitCode


class Benchmark(NamedTuple):
    """One benchmark: what --help says of it, and its function from arguments to exit code."""

    help: str
    run: Callable[[Sequence[str]], int]


def bench(arguments: Sequence[str]) -> int:
    """Run one benchmark; its exit code."""
    words = list(arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_usage(), file=sys.stdout if words else sys.stderr)
        return ExitCode.OK if words else ExitCode.USAGE
    benchmark = BENCHMARKS.get(words[0])
    if benchmark is None:
        raise CommandError(
            f"{words[0]!r} is no benchmark; pagebus bench --help lists them", exit_code=ExitCode.USAGE
        )
    return benchmark.run(words[1:])


def _usage() -> str:
    lines = [f"  {name:<11}{benchmark.help}" for name, benchmark in BENCHMARKS.items()]
    return "\n".join(
        [
            "usage: pagebus bench NAME [arguments]",
            "",
            *lines,
            "",
            "pagebus bench NAME --help shows a benchmark's flags.",
        ]
    )


def _paper_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pagebus bench paper",
        description="The memory and batching figures of the PagedAttention paper, made again with pagebus's "
        "own scheduler and a cost model of a GPU. No GPU is used.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model",
        default="opt-13b",
        choices=("opt-13b", "opt-66b", "opt-175b"),
        help="model and GPUs of the cost model, as in the paper's table 1 (default: %(default)s)",
    )
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="also requests from a CSV file with TIMESTAMP,ContextTokens,GeneratedTokens",
    )
    parser.add_argument(
        "--horizon", type=int, default=0, metavar="N", help="steps of a plan (default: from the step time)"
    )
    parser.add_argument(
        "--allocator",
        default="buddy",
        choices=("buddy", "best-fit"),
        help="how Orca's policies find contiguous memory (default: %(default)s, as in the paper)",
    )
    parser.add_argument(
        "--latency-limit",
        type=float,
        default=0.2,
        metavar="S",
        help="seconds a token, for the highest request rates (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of lengths and arrivals (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="few requests: seconds, and rough figures")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="also draw the figures")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    return parser


def _paper(arguments: Sequence[str]) -> int:
    parser = _paper_parser()
    try:
        given = parser.parse_args(list(arguments))
    except SystemExit as ended:
        return int(ended.code or 0)
    if not 0 <= given.horizon <= 64:
        raise CommandError(f"--horizon is {given.horizon}; from 0 to 64 is possible", ExitCode.USAGE)
    if not 0.0 < given.latency_limit < float("inf"):
        raise CommandError(
            f"--latency-limit is {given.latency_limit}; a positive number is needed", ExitCode.USAGE
        )
    if given.seed < 0:
        raise CommandError(f"--seed is {given.seed}; 0 or more is needed", ExitCode.USAGE)
    if given.plot is not None and given.plot.suffix.lower() != ".svg":
        raise CommandError(
            f"--plot draws SVG: name the file {given.plot.stem}.svg, not {given.plot.name}", ExitCode.USAGE
        )
    if given.plot is not None and not given.plot.parent.is_dir():
        raise CommandError(f"--plot: {given.plot.parent} is no folder", ExitCode.USAGE)
    from pagebus.bench.paper import Request, run
    from pagebus.bench.paper_meter import NoBacklogError
    from pagebus.bench.paper_paging import SimulationError
    from pagebus.bench.paper_trace import TraceError

    request = Request(
        machine=given.model,
        allocator=given.allocator,
        horizon=given.horizon,
        trace=given.trace,
        latency_limit_s=given.latency_limit,
        plot=given.plot,
        is_quick=given.quick,
        is_json=given.json,
        seed=given.seed,
    )
    try:
        run(request)
    except (TraceError, NoBacklogError) as error:
        raise CommandError(str(error), ExitCode.USAGE) from error
    except (SimulationError, OSError) as error:
        raise CommandError(str(error)) from error
    return ExitCode.OK


BENCHMARKS = {
    "serve": Benchmark("a load on any OpenAI-compatible server, and its latencies", bench_serve),
    "latency": Benchmark("seconds of a batch, repeated", bench_latency),
    "throughput": Benchmark("tokens a second of many requests, over the bus or not", bench_throughput),
    "gateway": Benchmark("what a streamed token costs a gateway process", bench_gateway),
    "scheduler": Benchmark("microseconds of a scheduler's step", bench_scheduler),
    "bus": Benchmark("one way's latency, messages a second", bench_bus),
    "hops": Benchmark("a token's way through all services, hop by hop", bench_hops),
    "memory": Benchmark("what a million tokens leave in each process's memory", bench_memory),
    "gpu": Benchmark("how near a GPU's floors the executor comes, alone and over the bus", bench_gpu),
    "idle": Benchmark("how long a simulated device waits for its host, over the bus", bench_idle),
    "paper": Benchmark("the PagedAttention paper's memory and batching figures, simulated", _paper),
}
