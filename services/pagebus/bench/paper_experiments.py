"""The experiments: which runs are made for each of the paper's figures. Prints nothing.

Every system sees the same requests. Runs are seeded: the same options give the same figures.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pagebus.bench import paper_figures
from pagebus.bench.paper_contiguous import BestFitAllocator, BuddyAllocator, ContiguousAllocator
from pagebus.bench.paper_contiguous_run import POLICIES, ContiguousRun, run_static
from pagebus.bench.paper_cost import MACHINES
from pagebus.bench.paper_figures import PAGING
from pagebus.bench.paper_lengths import (
    ALPACA,
    MAX_LEN,
    SHAREGPT,
    Distribution,
    Floats,
    Lengths,
    SimRequest,
    draw_lengths,
    to_requests,
    unit_gaps,
)
from pagebus.bench.paper_meter import Outcome
from pagebus.bench.paper_paging import PagingConfig, PagingRun
from pagebus.bench.paper_results import (
    BatchRow,
    BlockRow,
    MemoryRow,
    RateRow,
    Results,
    SharingRow,
    ThroughputRow,
)
from pagebus.bench.paper_trace import read_trace

ALLOCATORS: dict[str, Callable[[int], ContiguousAllocator]] = {
    "buddy": BuddyAllocator,
    "best-fit": BestFitAllocator,
}
NUM_CHOICES = (2, 4, 6)
WARM_UP_SHARE = 0.15
QUICK_DURATION_SHARE = 0.08
MAX_TRACE_REQUESTS = 20_000
TRACE_LOAD = 0.9
"""A trace's arrivals are scaled to this share of what paging serves under full load."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is simulated, and how much of it."""

    paging: PagingConfig
    allocator: str = "buddy"
    trace: Path | None = None
    latency_limit_s: float = 0.2  # seconds a token
    is_quick: bool = False
    seed: int = 0

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Those of the ablation."""
        return (1, 16, 256) if self.is_quick else (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Sample(NamedTuple):
    """Requests without a rate: `unit_s` are arrival times at one request a second on average."""

    lengths: Lengths
    unit_s: Floats

    def backlog(self) -> list[SimRequest]:
        """All requests at once."""
        return to_requests(self.lengths, np.zeros(len(self.unit_s)))

    def at(self, rate: float) -> list[SimRequest]:
        """The requests at `rate` a second."""
        return to_requests(self.lengths, self.unit_s / rate)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Where requests come from, and how many of them a run takes."""

    name: str
    draw: Callable[[int], Sample]
    num_requests: int
    duration_s: float  # of the runs that look for the highest rate
    rate: float | None  # the paper's, where it names one


def _drawn(distribution: Distribution, num_requests: int, duration_s: float, options: Options) -> Workload:
    """`num_requests` are enough to fill the paper's memory some times over; a larger one gets more."""
    machine, papers = options.paging.cost.machine, MACHINES[paper_figures.MACHINE]

    def draw(num: int) -> Sample:
        return Sample(draw_lengths(distribution, num, options.seed), unit_gaps(num, options.seed))

    return Workload(
        name=distribution.name,
        draw=draw,
        num_requests=round(num_requests * max(1.0, machine.num_slots / papers.num_slots)),
        duration_s=duration_s * (QUICK_DURATION_SHARE if options.is_quick else 1.0),
        rate=paper_figures.RATES[distribution.name] if machine is papers else None,
    )


def _traced(path: Path, options: Options) -> Workload:
    trace = read_trace(path, MAX_TRACE_REQUESTS, MAX_LEN)
    num_requests = len(trace.arrivals_s)

    def draw(num: int) -> Sample:
        num = min(max(2, num), num_requests)
        arrivals_s = trace.arrivals_s[:num]
        last_s = float(arrivals_s[-1])
        unit_s = arrivals_s * ((num - 1) / last_s) if last_s > 0 else np.arange(num, dtype=np.float64)
        return Sample(Lengths(trace.lengths.prompts[:num], trace.lengths.outputs[:num]), unit_s)

    return Workload(
        name=path.stem,
        draw=draw,
        num_requests=min(num_requests, 120 if options.is_quick else 500),
        duration_s=300.0 * (QUICK_DURATION_SHARE if options.is_quick else 1.0),
        rate=None,
    )


def workloads(options: Options) -> list[Workload]:
    """ShareGPT- and Alpaca-like requests and, where it is given, the trace. Raises `TraceError`."""
    found = [
        _drawn(SHAREGPT, 120 if options.is_quick else 700, 300.0, options),
        _drawn(ALPACA, 700 if options.is_quick else 2000, 60.0, options),
    ]
    if options.trace is not None:
        found.append(_traced(options.trace, options))
    return found


class Experiments:
    """Makes the runs of all sections."""

    def __init__(self, options: Options, tell: Callable[[str], None] = lambda what: None) -> None:
        """`tell` hears what begins now."""
        self._options = options
        self._tell = tell
        self._cost = options.paging.cost

    def run(self) -> Results:
        """All sections.

        Raises `TraceError` for a bad trace, `NoBacklogError` for one whose requests never fill the memory,
        and `SimulationError` for a fault of the scheduler.
        """
        options = self._options
        results = Results(
            machine=self._cost.machine.name,
            seed=options.seed,
            is_quick=options.is_quick,
            horizon=options.paging.horizon,
            latency_limit_s=options.latency_limit_s,
        )
        found = workloads(options)
        backlogs = [self._backlog(workload, results) for workload in found]  # what cannot be used ends here
        for workload, full in zip(found, backlogs, strict=True):
            sample = workload.draw(workload.num_requests)
            capacities = {
                system: outcome.tokens_per_s / float(sample.lengths.outputs.mean())
                for system, outcome in full.items()
            }
            rate = workload.rate or TRACE_LOAD * capacities[PAGING]
            self._tell(f"{workload.name}: running requests at {rate:.3g} requests/s")
            results.batches.extend(self._batches(workload, sample.at(rate), rate))
            self._tell(f"{workload.name}: highest rates")
            results.rates.extend(self._rates(workload, capacities))
            self._tell(f"{workload.name}: block sizes")
            results.blocks.extend(self._blocks(workload, rate))
            self._tell(f"{workload.name}: sharing")
            results.sharing.extend(self._sharing(workload, rate))
        return results

    def _backlog(self, workload: Workload, results: Results) -> dict[str, Outcome]:
        """All requests at once, on every system: memory and throughput."""
        self._tell(f"{workload.name}: memory under a backlog")
        requests = workload.draw(workload.num_requests).backlog()
        full = {system: run(requests) for system, run in self._systems()}
        is_papers = workload.name == "ShareGPT" and workload.rate is not None
        for system, outcome in full.items():
            paper = paper_figures.MEMORY.get(system) if is_papers else None
            results.memory.append(MemoryRow.of(workload.name, system, outcome, paper))
        static = run_static(requests, self._cost.machine.num_slots, self._cost)
        for system, outcome in {"static batches": static, **full}.items():
            ratio = outcome.tokens_per_s / static.tokens_per_s
            results.throughputs.append(ThroughputRow(workload.name, system, outcome.tokens_per_s, ratio))
        return full

    # -- systems ---------------------------------------------------------------------------------------------

    def _systems(self) -> Iterator[tuple[str, Callable[[Sequence[SimRequest]], Outcome]]]:
        """Every system by name: requests in, outcome out."""
        make_allocator = ALLOCATORS[self._options.allocator]
        for name, reservation in POLICIES.items():

            def contiguous(
                requests: Sequence[SimRequest], reservation: Callable[[SimRequest], int] = reservation
            ) -> Outcome:
                allocator = make_allocator(self._cost.machine.num_slots)
                warm_up_s = self._warm_up_s(requests)
                return ContiguousRun(requests, reservation, allocator, self._cost, warm_up_s).run()

            yield name, contiguous
        yield PAGING, self._paged

    def _paged(self, requests: Sequence[SimRequest], block_size: int = 16) -> Outcome:
        config = replace(self._options.paging, block_size=block_size, seed=self._options.seed)
        return PagingRun(requests, config, self._warm_up_s(requests)).run()

    def _warm_up_s(self, requests: Sequence[SimRequest]) -> float:
        """A share of the arrivals; for a backlog, of the time that it takes if all memory is used."""
        if requests[-1].arrival_s > 0:
            return WARM_UP_SHARE * requests[-1].arrival_s
        num_outputs = sum(sum(request.outputs) for request in requests)
        mean_len = num_outputs / len(requests) + sum(r.num_prompt for r in requests) / len(requests)
        num_slots = self._cost.machine.num_slots
        num_rows = max(1, min(self._options.paging.max_num_seqs, int(num_slots / mean_len)))
        return WARM_UP_SHARE * num_outputs / num_rows * self._cost.step_s(num_rows, num_rows, num_slots)

    # -- sections --------------------------------------------------------------------------------------------

    def _batches(self, workload: Workload, requests: list[SimRequest], rate: float) -> list[BatchRow]:
        paper = paper_figures.BATCHES.get(workload.name, {}) if workload.rate is not None else {}
        rows = []
        for system, run in self._systems():
            num_running = run(requests).num_running
            rows.append(BatchRow(workload.name, rate, system, num_running, paper.get(system)))
        return rows

    def _rates(self, workload: Workload, capacities: dict[str, float]) -> list[RateRow]:
        """Runs of equal duration: with equally many requests the faster system would have less of a queue."""
        rates = {}
        for system, run in self._systems():

            def latency_s(rate: float, run: Callable[[Sequence[SimRequest]], Outcome] = run) -> float:
                num_requests = max(20, round(rate * workload.duration_s))
                return run(workload.draw(num_requests).at(rate)).normalized_latency_s

            num_probes = 3 if self._options.is_quick else 4
            limit_s = self._options.latency_limit_s
            rates[system] = highest_rate(latency_s, limit_s, capacities[system], num_probes)
        paper = paper_figures.RATE_RATIOS if workload.name == "ShareGPT" else {}
        return [
            RateRow(workload.name, system, rate, rates[PAGING] / rate, paper.get(system))
            for system, rate in rates.items()
        ]

    def _blocks(self, workload: Workload, rate: float) -> list[BlockRow]:
        requests = workload.draw(workload.num_requests // 3).at(rate)
        rows = []
        for block_size in self._options.block_sizes:
            outcome = self._paged(requests, block_size)
            rows.append(
                BlockRow(workload.name, block_size, outcome.normalized_latency_s, outcome.num_running)
            )
        return rows

    def _sharing(self, workload: Workload, rate: float) -> list[SharingRow]:
        """Rows at half the rate, so that none is preempted; a request's choices are equally long.

        The paper's are too: its data sets tell one output length for each request.
        """
        rows = []
        for num_choices in NUM_CHOICES:
            sample = workload.draw(max(20, workload.num_requests // (2 * num_choices)))
            requests = [
                SimRequest(request.arrival_s, request.num_prompt, request.outputs * num_choices)
                for request in sample.at(rate / (2 * num_choices))
            ]
            rows.append(SharingRow(workload.name, num_choices, self._paged(requests).sharing_saved))
        return rows


def highest_rate(
    latency_s: Callable[[float], float], limit_s: float, capacity: float, num_probes: int
) -> float:
    """The highest rate whose mean latency is within the limit; with four probes to about 4 %.

    Halves a range around `capacity`, the rate served under a backlog, in its logarithm.
    """
    low, high = 0.7 * capacity, 2.1 * capacity
    for _ in range(num_probes):
        rate = math.sqrt(low * high)
        if latency_s(rate) <= limit_s:
            low = rate
        else:
            high = rate
    return math.sqrt(low * high)
