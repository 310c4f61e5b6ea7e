"""`python -m tests.chaos`: the chaos suite on real processes, its table, one results file."""

import argparse
import asyncio
import random
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.chaos.beds import Beds
from tests.chaos.report import Row, reached, table, write
from tests.chaos.scenarios import SCENARIOS, Scenario, run
from tests.chaos.speed import tokens_a_second


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; 1 where a bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--repetitions", type=int, default=100, help="of each scenario")
    parser.add_argument("--streams", type=int, default=50, help="that are live at once")
    parser.add_argument("--seed", type=int, default=0, help="0: a random one, which is printed")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="of " + ", ".join(_names()))
    parser.add_argument("--json", type=Path, help="results file, rewritten after every repetition")
    parser.add_argument("--logs", type=Path, help="directory for the services' logs")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # ends what runs, as Ctrl-C
    unknown = set(options.only) - set(_names())
    if unknown:
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}; there are {', '.join(_names())}")
    seed = options.seed or random.SystemRandom().randrange(1, 1 << 31)
    chosen = [scenario for scenario in SCENARIOS if not options.only or scenario.name in options.only]
    print(
        f"{len(chosen)} scenarios, {options.repetitions} repetitions, {options.streams} streams, seed {seed}"
    )
    rows: list[Row] = []
    with asyncio.Runner() as runner:
        if not options.only:
            rate = runner.run(tokens_a_second())
            print(f"the fake model gives {rate:.0f} tokens a second through the whole path", flush=True)
        beds = Beds(options.logs)
        try:
            for scenario in chosen:
                row = Row(scenario.name, scenario.words, scenario.bars)
                rows.append(row)
                _run(runner, beds, scenario, row, rows, seed, options)
                verdict = "MISSED" if row.missed else "passed"
                print(f"{scenario.name}: {verdict} in {row.seconds:.0f} s: {reached(row)}", flush=True)
        finally:
            runner.run(beds.close())
    print("\n" + table(rows))
    return int(any(row.missed for row in rows))


def _run(
    runner: asyncio.Runner,
    beds: Beds,
    scenario: Scenario,
    row: Row,
    rows: Sequence[Row],
    seed: int,
    options: argparse.Namespace,
) -> None:
    def keep() -> None:
        if options.json is not None:
            write(rows, options.json)

    work = run(
        scenario,
        row,
        beds,
        repetitions=options.repetitions,
        num_streams=options.streams,
        seed=seed,
        on_repetition=keep,
    )
    try:
        runner.run(work)
    except Exception as error:  # one scenario that cannot run must not hide the others
        row.error = f"{type(error).__name__}: {error}"
    keep()


def _names() -> list[str]:
    return [scenario.name for scenario in SCENARIOS]


if __name__ == "__main__":
    sys.exit(main())
