"""Ties a process to the launcher that started it: when the launcher dies, however, so does the process."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping

LAUNCHER_VARIABLE = "PAGEBUS_LAUNCHER_PID"
LOWER_PRIORITY = 5
"""What every service but the executor adds to its nice value: a barrier of the executor's threads waits for
whoever has the core."""
_PR_SET_PDEATHSIG = 1


def is_launched(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher started this process."""
    return environ.get(LAUNCHER_VARIABLE, "").isdigit()


def die_with_launcher() -> None:
    """From now on the launcher's death kills this process; does nothing where no launcher started it."""
    if not is_launched():
        return
    launcher = int(os.environ[LAUNCHER_VARIABLE])
    if not _set_parent_death_signal():
        threading.Thread(target=_watch, args=(launcher,), name="lifeline", daemon=True).start()
    if os.getppid() != launcher:  # it died before the line above
        os._exit(1)


def before_exec() -> Callable[[], None] | None:
    """A `preexec_fn` that ties a foreign program (nats-server) to this process, at the services' priority;
    None where Linux is not."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)  # loaded before the fork: between fork and exec as little as possible

    def tie() -> None:
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        library.nice(LOWER_PRIORITY)

    return tie


def _set_parent_death_signal() -> bool:
    if not sys.platform.startswith("linux"):
        return False
    with contextlib.suppress(OSError, AttributeError):
        return int(ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)) == 0
    return False


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(0.5)
    os._exit(1)
