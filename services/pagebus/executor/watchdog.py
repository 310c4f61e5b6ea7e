"""When a step will never end: the process gives itself up, so that whoever watches it starts it again.

`Watchdog` judges, purely; `end_process` is what follows.
"""

import faulthandler
import logging
import os
import sys

from pagebus.executor.pulse import Pulse

_log = logging.getLogger(__name__)

INTERVAL_S = 0.5
EXIT_CODE = 1
_SLOWER = 5.0  # times the slowest part seen so far: that long, a part is slow and not stuck
_UNKNOWN = 3.0  # times the bound, until a first step was seen to end
_LONGEST_TICK_S = 2 * INTERVAL_S


class Watchdog:
    """Judges a pulse, looked at every `INTERVAL_S`: while a step runs, it must not stand still for `bound_s`.

    Only time in which the watchdog itself ran counts: a stopped process or a sleeping machine is not hung.
    """

    def __init__(self, bound_s: float) -> None:
        """`bound_s` 0: never hung."""
        self._bound_s = bound_s
        self._seen = (-1, False)
        self._still_s = 0.0
        self._looked_s: float | None = None

    def is_hung(self, pulse: Pulse, now_s: float) -> bool:
        """Whether to give up, as of now."""
        passed_s = 0.0 if self._looked_s is None else min(now_s - self._looked_s, _LONGEST_TICK_S)
        self._looked_s = now_s
        seen = (pulse.count, pulse.is_busy)
        if seen != self._seen or not pulse.is_busy or pulse.is_compiling:
            self._seen, self._still_s = seen, 0.0
            return False
        self._still_s += passed_s
        bound_s = self._bound_s if pulse.count else _UNKNOWN * self._bound_s
        return self._bound_s > 0.0 and self._still_s >= max(bound_s, _SLOWER * pulse.slowest_s)


def end_process() -> None:
    """Say where every thread is, and end at once: what hangs cannot be asked to stop."""
    _log.error("a step makes no progress: the process ends, so that it is started again; its threads:")
    sys.stderr.flush()
    faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr, all_threads=True)
    os._exit(EXIT_CODE)
