"""The flags of `pagebus bench idle`."""

import argparse
from collections.abc import Sequence

from pagebus.cli.errors import CommandError, ExitCode


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pagebus bench idle",
        description="How long a simulated device waits for its host, with scheduler, executor and NATS as "
        "processes: steps launched ahead, and one after the other.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--step-ms", type=float, nargs="+", default=[1.5, 4.0, 8.0], metavar="MS", help="(default: 1.5 4 8)")
    add(
        "--delay-ms",
        type=float,
        nargs="+",
        default=[0.0, 2.0],
        metavar="MS",
        help="added to every message (default: 0 2)",
    )
    add("--rows", type=int, default=16, metavar="N", help="requests at a time (default: %(default)s)")
    add("--input-len", type=int, default=128, metavar="N", help="prompt tokens (default: %(default)s)")
    add("--output-len", type=int, default=256, metavar="N", help="generated tokens (default: %(default)s)")
    add("--seconds", type=float, default=5.0, metavar="S", help="each measurement (default: %(default)s)")
    add("--repetitions", type=int, default=1, metavar="N", help="of the whole table (default: %(default)s)")
    add("--no-in-turn", action="store_true", help="only with steps launched ahead")
    add("--json", action="store_true", help="figures as JSON")
    return parser


def bench_idle(arguments: Sequence[str]) -> int:
    """`pagebus bench idle`."""
    try:
        given = _parser().parse_args(list(arguments))
    except SystemExit as ended:
        return int(ended.code or 0)
    for flag, low in (("rows", 1), ("input_len", 1), ("output_len", 1), ("repetitions", 1), ("seconds", 0.5)):
        if not low <= vars(given)[flag] < 1e6:
            raise CommandError(
                f"--{flag.replace('_', '-')} is {vars(given)[flag]}; at least {low} is needed", ExitCode.USAGE
            )
    if not all(0.0 < step_ms < 1e4 for step_ms in given.step_ms):
        raise CommandError("--step-ms: steps take more than 0 ms", ExitCode.USAGE)
    if not all(0.0 <= delay_ms < 1e4 for delay_ms in given.delay_ms):
        raise CommandError("--delay-ms: a delay is 0 ms or more", ExitCode.USAGE)
    from pagebus.bench.idle import IdleError, IdleRequest, run
    from pagebus.bench.stack import StackError

    request = IdleRequest(
        steps_ms=tuple(given.step_ms),
        delays_ms=tuple(given.delay_ms),
        num_rows=given.rows,
        num_prompt=given.input_len,
        num_output=given.output_len,
        duration_s=given.seconds,
        num_repetitions=given.repetitions,
        is_in_turn=not given.no_in_turn,
        is_json=given.json,
    )
    try:
        run(request)
    except (IdleError, StackError) as error:
        raise CommandError(str(error)) from error
    return ExitCode.OK
