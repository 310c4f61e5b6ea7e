"""When an executor is given up, and when nobody gets on, judged from what is heard. Pure: changes no rows."""

import enum
from collections.abc import Iterable

from pagebus.scheduler.executors import ExecutorState

SILENCE_S = 3.0
"""An executor that was not heard for so long is given up."""
OWING_SILENCE_S = 2.0
"""The same for one that has work."""
HANG_S = 3.0
"""One that is heard, has work, and whose progress stands still for so long is given up too; or for five times
as long as a part of a step took there: one that gets on is slow, not stuck, however long its steps take."""
UNKNOWN_PART_S = 5.0
"""The same before it has shown how long a part (a layer) takes."""
IDLE_S = 2.5
"""Without work for so long, nobody is late: requesters that ask again pause for less."""
MAX_NO_RESPONDERS = 2
_EXPECTED_PARTS = 5
_PROBE_AFTER_S = 0.25
_PROBE_INTERVAL_S = 0.2


class Verdict(enum.Enum):
    """What to do about an executor."""

    FINE = "fine"
    PROBE = "probe"  # find out whether anybody listens for its plans
    SILENT = "silent"
    STUCK = "stuck"


def watch(executor: ExecutorState, now_s: float) -> Verdict:
    """Judge an executor that is not lost; call it often."""
    silent_s = now_s - executor.heard_s
    owes = executor.owes
    if not owes or executor.computing.phase == "compiling":
        executor.computing.progress_s = now_s
        if executor.is_ready:
            executor.computing.moved_s = now_s
    if silent_s > (OWING_SILENCE_S if owes else SILENCE_S):
        return Verdict.SILENT
    if now_s - executor.computing.progress_s > _longest_part_s(executor):
        return Verdict.STUCK
    if owes and silent_s > _PROBE_AFTER_S and now_s - executor.probed_s > _PROBE_INTERVAL_S:
        executor.probed_s = now_s
        return Verdict.PROBE
    return Verdict.FINE


def _longest_part_s(executor: ExecutorState) -> float:
    is_known = (
        executor.computing.slowest_s > 0.0 or executor.pace.step_s > 0.0 or executor.pace.prefill_s > 0.0
    )
    return max(HANG_S if is_known else UNKNOWN_PART_S, _EXPECTED_PARTS * executor.computing.slowest_s)


class Stall:
    """How long there has been work and nobody who gets on with it."""

    def __init__(self, now_s: float) -> None:
        self._moved_s = self._worked_s = now_s
        self.stalled_s = 0.0

    def note(
        self, executors: Iterable[ExecutorState], now_s: float, *, has_work: bool, is_excused: bool
    ) -> None:
        """Judge anew; call it often. `has_work`: rows run or wait. `is_excused`: one loads or compiles."""
        self.stalled_s = 0.0
        if has_work:
            self._worked_s = now_s
        if is_excused or now_s - self._worked_s > IDLE_S:
            self._moved_s = now_s
        if is_excused or not has_work:
            return
        is_moving = False
        for executor in executors:
            if not executor.is_lost and executor.owes:
                self._moved_s = max(self._moved_s, executor.computing.moved_s)
                is_moving |= now_s - executor.computing.moved_s <= _longest_part_s(executor)
        if not is_moving:
            self.stalled_s = now_s - self._moved_s

    def forgive(self, now_s: float) -> None:
        """Nobody could be heard until now."""
        self._moved_s = max(self._moved_s, now_s)
