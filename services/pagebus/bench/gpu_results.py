"""What `pagebus bench gpu` measured: one file, rewritten after every measurement, and one table."""

import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import torch


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One figure. `floor` is the best that the device allows, in the same unit; `share` how near it comes;
    `bar` what it must reach."""

    name: str
    value: float
    unit: str
    floor: float | None = None
    bar: float | None = None
    is_less_better: bool = True
    note: str = ""

    @property
    def share(self) -> float | None:
        """Fraction of the floor that is reached, 1 at best."""
        if self.floor is None or self.value <= 0:
            return None
        return self.floor / self.value if self.is_less_better else self.value / self.floor

    @property
    def is_met(self) -> bool | None:
        """Whether the bar is reached; None without one."""
        if self.bar is None:
            return None
        return self.value <= self.bar if self.is_less_better else self.value >= self.bar


class Report(msgspec.Struct, kw_only=True):
    """All runs of the benchmark that went on with each other's file."""

    device: str
    torch: str
    triton: str
    transformers: str
    python: str
    began: list[str]  # of each run
    measured: list[Measured] = []
    done: list[str] = []  # names of the parts that are not run again
    failed: dict[str, str] = {}  # by the part's name: why
    left: list[str] = []  # parts for which this run had no time

    def value_of(self, name: str) -> float | None:
        """A figure by its name."""
        return next((one.value for one in self.measured if one.name == name), None)

    def add(self, measured: Measured) -> None:
        """Take a figure, instead of an older one of that name."""
        self.measured = [one for one in self.measured if one.name != measured.name] + [measured]


def new_report(device: torch.device, before: Report | None) -> Report:
    """An empty one, or the one before, that says where it was made."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return Report(
        device=name,
        torch=str(torch.__version__),
        triton=_version("triton"),
        transformers=_version("transformers"),
        python=platform.python_version(),
        began=[*(before.began if before else ()), time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())],
        measured=list(before.measured) if before else [],
        done=list(before.done) if before else [],
    )


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def save(report: Report, path: Path) -> None:
    """Write the report over an older one, whole or not at all."""
    part = path.with_suffix(".part")
    part.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    part.replace(path)


def load(path: Path) -> Report:
    """A report that was saved. Raises `OSError` and `msgspec.MsgspecError`."""
    return msgspec.json.decode(path.read_bytes(), type=Report)


def line(measured: Measured) -> str:
    """One row of the table."""
    floor = "" if measured.floor is None else f"{measured.floor:>12,.3f}"
    share = "" if measured.share is None else f"{100 * measured.share:>7.0f} %"
    bar = "" if measured.bar is None else f"{measured.bar:,.2f} {'met' if measured.is_met else 'MISSED'}"
    value = f"{measured.name:<58}{measured.value:>12,.3f} {measured.unit:<8}"
    return f"{value}{floor:>12}{share:>9}{bar:>18}  {measured.note}".rstrip()


def heading(report: Report) -> str:
    """What stands above the table."""
    return (
        f"{report.device}, torch {report.torch}, triton {report.triton}, transformers {report.transformers},"
        f" Python {report.python}\n"
        f"{'':<58}{'measured':>12} {'unit':<8}{'floor':>12}{'share':>9}{'bar':>18}"
    )


def ending(failed: Mapping[str, str], left: Sequence[str]) -> str:
    """What stands below it; empty where all was measured."""
    lines = [f"failed: {name}: {why.splitlines()[-1] if why else ''}" for name, why in failed.items()]
    if left:
        lines.append(f"no time for: {', '.join(left)}; --resume FILE goes on with them")
    return "\n".join(lines)
