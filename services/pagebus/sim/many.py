"""Many seeds, in one process or several, and what they were like together."""

import logging
import multiprocessing
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from pagebus.sim.world import run

CHUNK = 20


@dataclass
class Summary:
    """Of any number of seeds. Times are virtual seconds."""

    num_seeds: int = 0
    num_requests: int = 0
    num_attempts: int = 0
    num_preemptions: int = 0
    num_terms: int = 0
    num_moved: int = 0
    longest_end_s: float = 0.0
    longest_idle_s: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    failed: list[tuple[int, str]] = field(default_factory=list)

    def add(self, other: "Summary") -> None:
        """These were run too."""
        self.num_seeds += other.num_seeds
        self.num_requests += other.num_requests
        self.num_attempts += other.num_attempts
        self.num_preemptions += other.num_preemptions
        self.num_terms += other.num_terms
        self.num_moved += other.num_moved
        self.longest_end_s = max(self.longest_end_s, other.longest_end_s)
        self.longest_idle_s = max(self.longest_idle_s, other.longest_idle_s)
        self.faults += other.faults
        self.ends += other.ends
        self.failed += other.failed

    def text(self, wall_s: float) -> str:
        """For a person."""
        verdict = f"{len(self.failed)} seeds failed: {[seed for seed, _ in self.failed[:20]]}"
        if not self.failed:
            verdict = "every request ended once with its own ids"
        faults = ", ".join(f"{name} {num}" for name, num in sorted(self.faults.items()))
        ends = ", ".join(f"{name} {num}" for name, num in self.ends.most_common())
        return (
            f"{self.num_seeds} seeds in {wall_s:.0f} s: {verdict}\n"
            f"{self.num_requests} requests ({ends})\n"
            f"{self.num_attempts} attempts, {self.num_preemptions} preemptions, {self.num_terms} terms, "
            f"{self.num_moved} changes of owner; all ended {self.longest_end_s:.1f} s after all was well, "
            f"nothing held {self.longest_idle_s:.1f} s later, at the latest\n"
            f"{self.faults.total()} faults ({faults})"
        )


def run_seeds(seeds: Sequence[int], num_requests: int | None = None) -> Summary:
    """These, one after the other; a seed that breaks a rule is noted."""
    logging.disable(logging.CRITICAL)
    summary = Summary()
    for seed in seeds:
        summary.num_seeds += 1
        try:
            outcome = run(seed, num_requests)
        except Exception as error:  # of the services, whatever it is
            summary.failed.append((seed, f"{type(error).__name__}: {error}"))
            continue
        summary.num_requests += outcome.num_requests
        summary.num_attempts += outcome.num_attempts
        summary.num_preemptions += outcome.num_preemptions
        summary.num_terms += outcome.num_terms
        summary.num_moved += outcome.num_moved
        summary.longest_end_s = max(summary.longest_end_s, outcome.end_s)
        summary.longest_idle_s = max(summary.longest_idle_s, outcome.idle_s)
        summary.faults += outcome.faults
        summary.ends += outcome.ends
    return summary


def run_many(seeds: range, num_requests: int | None = None, *, num_jobs: int = 1) -> Iterator[Summary]:
    """The same in `num_jobs` processes: a summary of each few seeds, in any order."""
    chunks = [seeds[first : first + CHUNK] for first in range(0, len(seeds), CHUNK)]
    work = partial(run_seeds, num_requests=num_requests)
    if num_jobs <= 1:
        yield from map(work, chunks)
        return
    with multiprocessing.get_context("spawn").Pool(num_jobs) as pool:
        yield from pool.imap_unordered(work, chunks)
