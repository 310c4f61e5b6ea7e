"""A step that raises is computed again in parts, so that only the row at fault fails. Knows rows, no plans.

Computing a row again gives the same: it writes the same KV to the same places, and its noise depends on seed
and index alone.
"""

import logging
from collections.abc import Sequence

from pagebus.executor.batch import RowInput, RowOutput, Runner
from pagebus.executor.errors import BrokenModelError

_log = logging.getLogger(__name__)

_OUT_OF_MEMORY = "OutOfMemoryError"  # torch's, which this module does not import


def compute(runner: Runner, rows: Sequence[RowInput]) -> list[RowOutput]:
    """One output a row. A row that raises by itself, twice, fails alone.

    Raises what the step raised where it is nobody's fault in particular: no row could be computed, or a lone
    one found no memory.
    """
    try:
        return runner.step(rows)
    except BrokenModelError:
        raise
    except Exception as error:
        return compute_again(runner, rows, error)


def compute_again(runner: Runner, rows: Sequence[RowInput], first: Exception) -> list[RowOutput]:
    """The same, where the whole step has raised `first` already."""
    _log.error("a step of %d rows failed; it is tried again in parts", len(rows), exc_info=first)
    found = _in_parts(runner, rows)
    is_nobody_right = all(isinstance(each, Exception) for each in found)
    if is_nobody_right and (len(rows) > 1 or is_out_of_memory(first)):
        raise first
    return [RowOutput(error=_words(each)) if isinstance(each, Exception) else each for each in found]


def _in_parts(runner: Runner, rows: Sequence[RowInput]) -> list[RowOutput | Exception]:
    """Outputs of rows that were just seen to raise together; what a row raises that raises alone."""
    if len(rows) == 1:
        return _once(runner, rows)
    found: list[RowOutput | Exception] = []
    half = len(rows) // 2
    for part in (rows[:half], rows[half:]):
        outputs = _once(runner, part)
        # A lone row has its second chance here, alone.
        found += _in_parts(runner, part) if isinstance(outputs[0], Exception) else outputs
    return found


def _once(runner: Runner, rows: Sequence[RowInput]) -> list[RowOutput | Exception]:
    try:
        return list(runner.step(rows))
    except BrokenModelError:
        raise
    except Exception as error:
        return [error] * len(rows)


def _words(error: Exception) -> str:
    return f"the step failed: {type(error).__name__}: {error}"[:500]


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory was short, on the host or on the device."""
    return isinstance(error, MemoryError) or type(error).__name__ == _OUT_OF_MEMORY
