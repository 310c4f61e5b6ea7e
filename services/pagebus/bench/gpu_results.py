"""What `pagebus bench gpu` measured: one file, rewritten after every measurement, and one table."""

import platform
import time
from pathlib import Path

import msgspec
import torch


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One figure. `floor` is the best that the device allows, in the same unit; `share` how near it comes."""

    name: str
    value: float
    unit: str
    floor: float | None = None
    is_less_better: bool = True
    note: str = ""

    @property
    def share(self) -> float | None:
        """Fraction of the floor that is reached, 1 at best."""
        if self.floor is None or self.value <= 0:
            return None
        return self.floor / self.value if self.is_less_better else self.value / self.floor


class Report(msgspec.Struct, kw_only=True):
    """One run of the benchmark."""

    device: str
    torch: str
    triton: str
    python: str
    began: str
    measured: list[Measured] = []
    failed: dict[str, str] = {}  # by the measurement's name: why


def new_report(device: torch.device) -> Report:
    """An empty one that says where it was made."""
    try:
        import triton

        triton_version = str(triton.__version__)
    except ImportError:
        triton_version = "none"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return Report(
        device=name,
        torch=str(torch.__version__),
        triton=triton_version,
        python=platform.python_version(),
        began=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    )


def save(report: Report, path: Path) -> None:
    """Write the report over an older one, whole or not at all."""
    part = path.with_suffix(".part")
    part.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    part.replace(path)


def line(measured: Measured) -> str:
    """One row of the table."""
    floor = "" if measured.floor is None else f"{measured.floor:>12,.3f}"
    share = "" if measured.share is None else f"{100 * measured.share:>7.0f} %"
    value = f"{measured.name:<58}{measured.value:>12,.3f} {measured.unit:<8}"
    return f"{value}{floor:>12}{share:>9}  {measured.note}".rstrip()


def heading(report: Report) -> str:
    """What stands above the table."""
    return (
        f"{report.device}, torch {report.torch}, triton {report.triton}, Python {report.python}\n"
        f"{'':<58}{'measured':>12} {'unit':<8}{'floor':>12}{'share':>9}"
    )
