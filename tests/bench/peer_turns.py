"""One server has the machine at a time: what the others burn meanwhile, and how they are stopped."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.support.serve import descendants

_SETTLE_S = 1.0
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int) -> float:
    """CPU seconds that a process and all below it have taken so far; 0 for one that is gone."""
    total = 0
    for each in (pid, *(child for child, _ in descendants(pid))):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{each}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
            total += int(fields[11]) + int(fields[12])
    return total / _TICKS_PER_S


class Turns:
    """Servers by name with the process id of each whose processes may be stopped."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._pids = dict(pids)
        self.idle_cores: dict[str, list[float]] = {name: [] for name in pids}
        """CPU seconds a second that a server took while another one was measured and none was stopped."""
        self._stopped: set[str] = set()

    @contextlib.contextmanager
    def watching(self, name: str) -> Iterator[None]:
        """It is the turn of `name`; the others go on, and what they take is noted."""
        began_s = time.monotonic()
        before = {other: cpu_s(pid) for other, pid in self._pids.items() if other != name}
        yield
        took_s = max(time.monotonic() - began_s, 1e-9)
        for other, its_s in before.items():
            self.idle_cores[other].append((cpu_s(self._pids[other]) - its_s) / took_s)

    @contextlib.contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """It is the turn of `name`; the others are stopped (SIGSTOP) as long."""
        for other in self._pids:
            if other != name:
                self._send(other, signal.SIGSTOP)
        if name in self._stopped:
            self._send(name, signal.SIGCONT)
            time.sleep(_SETTLE_S)  # clocks jumped: let it find out that all its parts live
        yield

    def end(self) -> None:
        """All go on."""
        for name in self._pids:
            self._send(name, signal.SIGCONT)

    def _send(self, name: str, what: signal.Signals) -> None:
        pid = self._pids[name]
        for each in (pid, *(child for child, _ in descendants(pid))):
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, what)
        (self._stopped.add if what is signal.SIGSTOP else self._stopped.discard)(name)
