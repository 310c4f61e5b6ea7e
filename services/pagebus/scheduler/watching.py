"""When an executor is given up, judged from what is heard of it. Pure: knows no bus and changes no rows."""

import enum

from pagebus.scheduler.executors import ExecutorState

SILENCE_S = 3.0
"""An executor that was not heard for so long is given up."""
OWING_SILENCE_S = 2.0
"""The same for one that has work."""
HANG_S = 3.0
"""One that is heard, has work, and reports no step for so long (or some expected steps) is given up too."""
UNKNOWN_STEP_S = 60.0
"""The same before it has shown how long its steps take: it may be compiling."""
MAX_NO_RESPONDERS = 2
_EXPECTED_STEPS = 5
_PROBE_AFTER_S = 0.25
_PROBE_INTERVAL_S = 0.2


class Verdict(enum.Enum):
    """What to do about an executor."""

    FINE = "fine"
    PROBE = "probe"  # find out whether anybody listens for its plans
    SILENT = "silent"
    STUCK = "stuck"


def watch(executor: ExecutorState, num_step_tokens: int, now_s: float) -> Verdict:
    """Judge an executor that is not lost; call it often. A step has `num_step_tokens` at most."""
    silent_s = now_s - executor.heard_s
    owes = executor.owes
    if not owes:
        executor.progress_s = now_s
    if silent_s > (OWING_SILENCE_S if owes else SILENCE_S):
        return Verdict.SILENT
    if now_s - executor.progress_s > _longest_step_s(executor, num_step_tokens):
        return Verdict.STUCK
    if owes and silent_s > _PROBE_AFTER_S and now_s - executor.probed_s > _PROBE_INTERVAL_S:
        executor.probed_s = now_s
        return Verdict.PROBE
    return Verdict.FINE


def _longest_step_s(executor: ExecutorState, num_step_tokens: int) -> float:
    expected_s = executor.pace.step_s
    if executor.prefilling or executor.pace.step_s == 0.0:
        if executor.pace.prefill_s == 0.0:
            return UNKNOWN_STEP_S
        expected_s += executor.pace.prefill_s * num_step_tokens
    return max(HANG_S, _EXPECTED_STEPS * expected_s)
