"""What running processes have used, from /proc, and the machine in words; no host names, no paths."""

import os
import platform
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_NUM_TRIES, _NUM_TURNS = 5, 100_000
_PACKAGES = ("pagebus", "nats-py", "msgspec", "uvicorn", "uvloop", "torch", "transformers")


def cpu_s(pid: int) -> float:
    """CPU seconds that a process has used, its threads' included, in steps of about 10 ms.

    Raises `OSError` where there is no such process.
    """
    fields = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def rss_bytes(pid: int) -> int:
    """Memory that a process has resident. Raises `OSError` where there is no such process."""
    return int((Path("/proc") / str(pid) / "statm").read_text().split()[1]) * _PAGE


class Machine(msgspec.Struct, frozen=True):
    """Where something was measured, when, and how busy that machine was."""

    cpu: str
    num_cpus: int
    memory_gib: float
    python: str
    versions: dict[str, str]
    load_1min: float
    loop_ns: float  # CPU time of one turn of a small Python loop: it doubles where others share the cores
    date: str


def machine() -> Machine:
    """This machine now."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    memory = os.sysconf("SC_PHYS_PAGES") * _PAGE / (1 << 30)
    return Machine(
        cpu=_cpu_name(),
        num_cpus=len(os.sched_getaffinity(0)),
        memory_gib=round(memory, 1),
        python=platform.python_version(),
        versions=found,
        load_1min=round(os.getloadavg()[0], 2),
        loop_ns=round(_loop_ns(), 1),
        date=datetime.now(UTC).date().isoformat(),
    )


def _loop_ns() -> float:
    """The median of some tries."""
    found = []
    for _ in range(_NUM_TRIES):
        began_s, total = time.process_time(), 0
        for number in range(_NUM_TURNS):
            total += number
        found.append((time.process_time() - began_s) / _NUM_TURNS * 1e9)
    return sorted(found)[len(found) // 2]


def percentile(values: list[float], share: float) -> float:
    """The value below which `share` of them lie; 0.0 where there are none."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)] if ordered else 0.0


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )
