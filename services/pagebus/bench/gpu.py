"""`pagebus bench gpu`: how near an accelerator's floors the executor comes, alone and over the bus.

Each part runs in a process of its own: one that fails is noted, and the next begins. The cheapest and most
telling come first, and the results file is rewritten after each figure, so that a run cut short still counts;
another run can go on with its file. Knows no model and no device.
"""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import msgspec
import torch

from pagebus.bench.gpu_alone import COPY, PRODUCT
from pagebus.bench.gpu_parts import Part, Task, parts_of
from pagebus.bench.gpu_results import Measured, Report, ending, heading, line, load, new_report, save
from pagebus.bench.gpu_worker import Line

RESULTS_FILE = "gpu.json"
LOG_FILE = "gpu.log"
_ROOM = 2.5  # times what a part takes as a rule it may take, where time is left
_LEAST_S = 240.0  # kernels are compiled when a machine runs them for the first time
_STOP_S = 20.0


@dataclass(frozen=True, kw_only=True)
class GpuRequest:
    """What the command line asks for."""

    out: Path = Path()
    device: Literal["cuda", "cpu"] = "cuda"
    shapes: Sequence[str] = ("qwen3-0.6b", "llama-3.1-8b")
    is_quick: bool = False
    has_bus: bool = True
    budget_s: float = 0.0  # 0: as long as it takes
    resume: Path | None = None  # an earlier run's file
    only: str = ""  # parts whose name has this in it


class PartError(Exception):
    """A part did not come to its end."""


def run(request: GpuRequest) -> Report:
    """Measure all, print the table line by line, and keep the results file. Nothing is raised."""
    began_s = time.monotonic()
    report = new_report(torch.device(request.device), load(request.resume) if request.resume else None)
    print(heading(report), flush=True)
    for measured in report.measured:
        print(line(measured), flush=True)
    parts = parts_of(
        request.shapes, is_quick=request.is_quick, has_bus=request.has_bus, is_cpu=request.device == "cpu"
    )
    save(report, request.out / RESULTS_FILE)
    with (request.out / LOG_FILE).open("ab") as log:
        for part in parts:
            if part.name in report.done or (request.only and request.only not in part.name):
                continue
            left_s = request.budget_s - (time.monotonic() - began_s) if request.budget_s else 1e9
            if left_s < part.about_s:
                report.left.append(part.name)
                continue
            _measure(request, report, part, min(left_s, max(_LEAST_S, _ROOM * part.about_s)), log)
            save(report, request.out / RESULTS_FILE)
    save(report, request.out / RESULTS_FILE)
    print(ending(report.failed, report.left), flush=True)
    return report


def _measure(request: GpuRequest, report: Report, part: Part, timeout_s: float, log: IO[bytes]) -> None:
    """One part, its figures added to the report."""
    task = Task(
        part=part,
        device=request.device,
        is_quick=request.is_quick,
        bytes_per_s=(report.value_of(COPY) or 1e-9) * 1e9,
        flops=(report.value_of(PRODUCT) or 1e-12) * 1e12,
        known={measured.name: measured.value for measured in report.measured},
    )
    log.write(f"\n== {part.name}\n".encode())
    log.flush()

    async def take() -> None:
        async for measured in _lines(task, timeout_s, log):
            report.add(measured)
            print(line(measured), flush=True)
            save(report, request.out / RESULTS_FILE)

    try:
        asyncio.run(take())
    except (PartError, OSError, ValueError) as error:
        report.failed[part.name] = str(error)
        print(f"{part.name}: {error}", file=sys.stderr, flush=True)
    else:
        report.done.append(part.name)


async def _lines(task: Task, timeout_s: float, log: IO[bytes]) -> AsyncIterator[Measured]:
    """The figures of a part's process. Raises `PartError`."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "pagebus.bench.gpu_worker", msgspec.json.encode(task).decode(),
        stdout=asyncio.subprocess.PIPE, stderr=log, start_new_session=True, limit=1 << 24,
    )  # fmt: skip
    try:
        if process.stdout is None:
            raise PartError("no pipe to its process")
        async with asyncio.timeout(timeout_s):
            while text := await process.stdout.readline():
                said = msgspec.json.decode(text, type=Line)
                if said.error:
                    raise PartError(said.error)
                if said.measured is not None:
                    yield said.measured
            code = await process.wait()
        if code != 0:
            raise PartError(f"its process ended with {code}; see {LOG_FILE}")
    except TimeoutError:
        raise PartError(f"not done after {timeout_s:.0f} s; see {LOG_FILE}") from None
    finally:
        await _end(process)


async def _end(process: asyncio.subprocess.Process) -> None:
    """End the process and what it started: first kindly, so that it stops its own services."""
    if process.returncode is None:
        process.terminate()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), _STOP_S)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # its session: whatever is left
    await process.wait()
