"""`python -m pagebus.sim --seeds 100000 [--first 0] [--jobs 2] [--requests 30]`: that many seeded runs.

`--seed 17 -v` is one run, and what happened in it; the same each time. Exit code 1 where a rule was broken.
"""

import argparse
import logging
import sys
import time
import traceback

from pagebus.sim.many import Summary, run_many
from pagebus.sim.world import run


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--jobs", type=int, default=1, help="processes that run seeds at the same time")
    parser.add_argument("--requests", type=int, help="requests a run, instead of what the seed says")
    parser.add_argument("--seed", type=int, help="this one only")
    parser.add_argument("-v", "--verbose", action="store_true", help="with --seed: tell what happens")
    arguments = parser.parse_args()
    if arguments.seed is not None:
        return _run_one(arguments.seed, arguments.requests, is_told=arguments.verbose)
    logging.disable(logging.CRITICAL)
    began_s = time.perf_counter()
    total = Summary()
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    for summary in run_many(seeds, arguments.requests, num_jobs=arguments.jobs):
        for seed, error in summary.failed:
            print(f"seed {seed}: {error}", file=sys.stderr, flush=True)
        total.add(summary)
        if total.num_seeds % max(100, len(seeds) // 20) < summary.num_seeds:
            print(f"{total.num_seeds} of {len(seeds)} seeds, {len(total.failed)} failed", file=sys.stderr)
    print(total.text(time.perf_counter() - began_s))
    return 1 if total.failed else 0


def _run_one(seed: int, num_requests: int | None, *, is_told: bool) -> int:
    if is_told:
        logging.basicConfig(format="           %(name)s: %(message)s", stream=sys.stdout, level=logging.INFO)
    else:
        logging.disable(logging.CRITICAL)
    try:
        outcome = run(seed, num_requests, is_told=is_told)
    except Exception:
        traceback.print_exc(limit=-8)
        return 1
    print(outcome)
    return 0


if __name__ == "__main__":
    sys.exit(main())
