"""`pagebus bench paper`: the PagedAttention paper's figures, made again with pagebus's own scheduler."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from pagebus.bench.paper_cost import MACHINES, CostModel
from pagebus.bench.paper_experiments import Experiments, Options
from pagebus.bench.paper_paging import PagingConfig
from pagebus.bench.paper_plot import draw
from pagebus.bench.paper_results import Results
from pagebus.bench.paper_table import tables


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asks for."""

    machine: str = "opt-13b"
    allocator: str = "buddy"
    horizon: int = 0
    trace: Path | None = None
    latency_limit_s: float = 0.2
    plot: Path | None = None
    is_quick: bool = False
    is_json: bool = False
    seed: int = 0


def find(request: Request) -> Results:
    """Run the experiments, telling on a terminal's stderr what begins."""
    start_s = time.monotonic()

    def tell(what: str) -> None:
        if sys.stderr.isatty():
            print(f"[{time.monotonic() - start_s:5.1f} s] {what}", file=sys.stderr)

    options = Options(
        paging=PagingConfig(cost=CostModel(machine=MACHINES[request.machine]), horizon=request.horizon),
        allocator=request.allocator,
        trace=request.trace,
        latency_limit_s=request.latency_limit_s,
        is_quick=request.is_quick,
        seed=request.seed,
    )
    return Experiments(options, tell).run()


def run(request: Request) -> None:
    """Print tables or JSON, and draw the plot that is asked for.

    Raises `TraceError`, `SimulationError`, and `OSError` where the plot cannot be written.
    """
    results = find(request)
    if request.is_json:
        print(msgspec.json.format(msgspec.json.encode(results), indent=2).decode())
    else:
        print(tables(results))
    if request.plot is not None:
        request.plot.write_text(draw(results), encoding="utf-8")
