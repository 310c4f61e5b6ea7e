"""Decoding steps one after the other, as an executor launches them, and what the device waits between them.

The device's own time for a step is that of its graphs launched back to back; what a step takes beyond it, the
device was idle for. Knows runners, no shapes and no bus.
"""

import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from pagebus.executor.batch import PipelinedRunner, RowInput, RowOutput
from pagebus.executor.device_runner import DeviceRunner

_NUM_FIRST = 3  # steps that do not count


@dataclass(frozen=True, slots=True)
class Paced:
    """Seconds of a step, launched ahead and collected; of its graph alone; of its launch, on the host."""

    step_s: float
    device_s: float
    launch_s: float

    @property
    def idle_share(self) -> float:
        """Of the step's time the device had nothing to do for this part."""
        return max(0.0, 1.0 - self.device_s / self.step_s)


def paced(runner: DeviceRunner, rows: Sequence[RowInput], num_steps: int) -> Paced:
    """Rows of one token that go on by themselves. Raises `RuntimeError` where a row fails."""
    steps = [[replace(row, key=number) for number, row in enumerate(rows)]]
    for _ in range(num_steps + _NUM_FIRST):
        steps.append(
            [
                replace(row, ids=(0,), start=row.start + 1, index=row.index + 1, follows=number)
                for number, row in enumerate(steps[-1])
            ]
        )
    times, launches = _run(runner, steps)
    took = [after - before for before, after in pairwise(times)]
    return Paced(
        statistics.median(took[_NUM_FIRST:]), _device_s(runner, len(rows)), statistics.median(launches[1:])
    )


def _run(runner: PipelinedRunner, steps: Sequence[Sequence[RowInput]]) -> tuple[list[float], list[float]]:
    """When each step was collected, and how long each launch took."""
    waiting: deque[object] = deque()
    times, launches = [], []
    for step in steps:
        began_s = time.perf_counter()
        waiting.append(runner.launch(step))
        launches.append(time.perf_counter() - began_s)
        if len(waiting) == 2:
            _check(runner.collect(waiting.popleft()))
            times.append(time.perf_counter())
    _check(runner.collect(waiting.popleft()))
    return times, launches


def _check(outputs: Sequence[RowOutput]) -> None:
    errors = [output.error for output in outputs if output.error is not None]
    if errors:
        raise RuntimeError(errors[0])


def _device_s(runner: DeviceRunner, num_rows: int) -> float:
    """Seconds of a step when graphs are launched with nothing in between; the rows go on where they were."""
    num, took = 20, []
    for _ in range(3):
        _synchronize(runner)
        began_s = time.perf_counter()
        runner.replay(num_rows, num)
        _synchronize(runner)
        took.append((time.perf_counter() - began_s) / num)
    return statistics.median(took)


def _synchronize(runner: DeviceRunner) -> None:
    if runner.device.type == "cuda":
        torch.cuda.synchronize(runner.device)
