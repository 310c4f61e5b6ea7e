"""Options that all tests share: what needs an absent tool or a GPU is deselected, and listed."""

import os
import shutil
import sys
from pathlib import Path

import pytest

# Threads of OpenMP that spin while they wait slow everything down where test processes share two cores.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# Where tests share a machine, the CPU's kernels may take long to compile: no test depends on that.
os.environ.setdefault("PAGEBUS_COMPILE_WAIT_S", "300")

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept, left_out, reasons = [], [], {}
    for item in items:
        reason = _missing(item)
        if reason:
            left_out.append(item)
            reasons[reason] = reasons.get(reason, 0) + 1
        else:
            kept.append(item)
    if left_out:
        items[:] = kept
        config.hook.pytest_deselected(items=left_out)
        config.stash[_REASONS] = reasons


_REASONS = pytest.StashKey[dict[str, int]]()


def _missing(item: pytest.Item) -> str | None:
    if item.get_closest_marker("gpu") and not _has_gpu():
        return "gpu: no CUDA device"
    for marker in item.iter_markers("needs"):
        tool = str(marker.args[0])
        if shutil.which(tool) is None and not (Path(sys.executable).parent / tool).exists():
            return f"needs {tool}: not installed"
    return None


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reasons = terminalreporter.config.stash.get(_REASONS, {})
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"deselected {count} tests: {reason}")
