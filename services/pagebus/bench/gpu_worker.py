"""A part of `pagebus bench gpu` in a process of its own: `python -m pagebus.bench.gpu_worker TASK`.

Each figure is a line of JSON on the standard output as soon as it is there; the last line is what went wrong.
"""

import asyncio
import os
import sys
import traceback
from collections.abc import AsyncIterator, Iterator
from typing import TextIO

import msgspec

from pagebus.bench.gpu_parts import Task
from pagebus.bench.gpu_results import Measured


class Line(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line: a figure, or why there is no other one."""

    measured: Measured | None = None
    error: str = ""


def measure(task: Task) -> Iterator[Measured] | AsyncIterator[Measured]:
    """The part's figures. Imports what only that kind of part needs."""
    match task.part.kind:
        case "ceilings":
            from pagebus.bench.gpu_alone import ceilings

            return ceilings(task)
        case "alone":
            from pagebus.bench.gpu_alone import alone

            return alone(task)
        case "linears":
            from pagebus.bench.gpu_linears import linears

            return linears(task)
        case "served":
            from pagebus.bench.gpu_served import served

            return served(task)
        case "ratio":
            from pagebus.bench.gpu_served import ratio

            return ratio(task)


def _say(out: TextIO, line: Line) -> None:
    out.write(msgspec.json.encode(line).decode() + "\n")
    out.flush()


async def _drain(found: AsyncIterator[Measured], out: TextIO) -> None:
    async for measured in found:
        _say(out, Line(measured))


def main() -> None:
    """Measure, and say so."""
    # What anything else prints goes beside it.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        found = measure(msgspec.json.decode(sys.argv[1], type=Task))
        if isinstance(found, Iterator):
            for measured in found:
                _say(out, Line(measured))
        else:
            asyncio.run(_drain(found, out))
    except BaseException as error:
        traceback.print_exc()
        _say(out, Line(error=f"{type(error).__name__}: {error}"[:2000]))
        sys.exit(1)


if __name__ == "__main__":
    main()
