"""`pagebus bench serve`: a load on any OpenAI-compatible server, and what it measured."""

import asyncio
import contextlib
import gc
import json
import random
import sys
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from pagebus.bench.load import Load, LoadConfig, LoadError, Outcome, Wanted, arrivals
from pagebus.bench.load_figures import LoadFigures, Slo, figures, table
from pagebus.bench.load_plot import draw
from pagebus.bench.paper_trace import read_trace

_MODELS_TIMEOUT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class ServeRequest:
    """What the command line asks for. `trace` replaces lengths and rate."""

    load: LoadConfig
    num_requests: int = 200
    rate: float = float("inf")
    input_len: int = 128
    output_len: int = 64
    range_ratio: float = 0.0  # lengths are drawn from (1 - ratio) to (1 + ratio) of these
    trace: Path | None = None
    rate_scale: float = 1.0
    length_scale: float = 1.0
    slo: Slo = field(default_factory=Slo)
    json_file: Path | None = None
    plot: Path | None = None
    is_json: bool = False


def plan(request: ServeRequest) -> list[Wanted]:
    """The requests and their times. Raises `TraceError`, `LoadError`."""
    if request.trace is None:
        rng = random.Random(request.load.seed)  # noqa: S311

        def length(mean: int) -> int:
            spread = int(mean * request.range_ratio)
            return max(1, rng.randint(mean - spread, mean + spread))

        times_s = arrivals(request.num_requests, request.rate, request.load.seed)
        return [Wanted(at_s, length(request.input_len), length(request.output_len)) for at_s in times_s]
    trace = read_trace(request.trace, request.num_requests, 1 << 30)
    lengths = zip(trace.lengths.prompts, trace.lengths.outputs, strict=True)
    return [
        Wanted(
            float(at_s) / request.rate_scale,
            max(1, round(int(num_prompt) * request.length_scale)),
            max(1, round(int(num_out) * request.length_scale)),
        )
        for at_s, (num_prompt, num_out) in zip(trace.arrivals_s, lengths, strict=True)
    ]


def measure(load: LoadConfig, wanted: Sequence[Wanted]) -> list[Outcome]:
    """Run a load in a loop of its own, told on a terminal's stderr. Raises `LoadError`."""
    num_done = 0

    def tell(outcome: Outcome) -> None:
        nonlocal num_done
        num_done += 1
        if sys.stderr.isatty():
            print(f"\r{num_done}/{len(wanted)} requests", end="", file=sys.stderr, flush=True)

    config = load if load.model else replace(load, model=first_model(load))
    runner = asyncio.run
    with contextlib.suppress(ImportError):
        import uvloop

        runner = uvloop.run
    gc.collect()
    gc.freeze()  # a collection in the middle of a run would be measured as the server's
    try:
        return runner(Load(config).run(wanted, tell))
    finally:
        gc.unfreeze()
        if sys.stderr.isatty():
            print(file=sys.stderr)


def first_model(load: LoadConfig) -> str:
    """The first model that the server lists. Raises `LoadError`."""
    url = f"{load.url.rstrip('/')}/v1/models"
    headers = {"authorization": f"Bearer {load.api_key}"} if load.api_key else {}
    try:
        request = urllib.request.Request(url if "://" in url else f"http://{url}", headers=headers)  # noqa: S310
        with urllib.request.urlopen(request, timeout=_MODELS_TIMEOUT_S) as answer:  # noqa: S310
            return str(json.loads(answer.read())["data"][0]["id"])
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise LoadError(f"{url} names no model ({error}); name one with --model") from error


def run(request: ServeRequest) -> LoadFigures:
    """Measure, print, and write the files that are asked for.

    Raises `LoadError`, `TraceError`, and `OSError` where a file cannot be written.
    """
    wanted = plan(request)
    outcomes = measure(request.load, wanted)
    found = figures(outcomes, request.slo)
    encoded = msgspec.json.format(msgspec.json.encode(found), indent=2).decode()
    print(encoded if request.is_json else table(found, request.slo))
    if request.json_file is not None:
        request.json_file.write_text(encoded + "\n", encoding="utf-8")
    if request.plot is not None:
        request.plot.write_text(draw(outcomes, found), encoding="utf-8")
    return found
