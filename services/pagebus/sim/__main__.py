"""`python -m pagebus.sim [--seeds 100] [--first 0] [--requests 30]`: run seeds one after the other, and stop
at the first that breaks a rule. The same seed breaks it again.
"""

import argparse
import logging
import sys
import time

from pagebus.sim.world import ViolationError, run


def main() -> int:
    """The exit code: 1 where a seed broke a rule."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--requests", type=int, default=30)
    arguments = parser.parse_args()
    logging.disable(logging.ERROR)
    began_s = time.perf_counter()
    num_faults = 0
    longest_s = 0.0
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        try:
            outcome = run(seed, arguments.requests)
        except ViolationError as error:
            print(f"seed {seed}: {error}", file=sys.stderr)
            return 1
        num_faults += outcome.num_faults
        longest_s = max(longest_s, outcome.end_s)
    print(
        f"{arguments.seeds} seeds, {arguments.seeds * arguments.requests} requests, {num_faults} faults: "
        f"every request ended once with its own ids, at the latest after {longest_s:.1f} s "
        f"({time.perf_counter() - began_s:.0f} s)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
