"""The fake model behind a simulated device: steps queue up there and take their time, the host only launches.

```
PAGEBUS_FAKE_PIPELINED=1            steps are launched ahead; 0: the same device, one step after the other
PAGEBUS_FAKE_STEP_S=0.004           what a step takes on the device
PAGEBUS_FAKE_FIGURES=/path/file     how long the device worked and waited: `DeviceFigures` as JSON
```
"""

import json
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pagebus.bus.messages import PoolGroup
from pagebus.executor.batch import BlockCopy, RowInput, RowOutput
from pagebus.executor.fake import FakeRunner
from pagebus.executor.pulse import Pulse

PIPELINED_VARIABLE = "PAGEBUS_FAKE_PIPELINED"
FIGURES_VARIABLE = "PAGEBUS_FAKE_FIGURES"

_WRITE_INTERVAL_S = 0.2


class ContractError(BaseException):
    """What `PipelinedRunner` asks of its user was not kept. No `Exception`: nobody may try again."""


@dataclass(slots=True)
class DeviceFigures:
    """Of all steps so far. `idle_s`: nothing was queued although a row waited for its next step."""

    num_steps: int = 0
    num_rows: int = 0
    busy_s: float = 0.0
    idle_s: float = 0.0
    num_gaps: int = 0  # that idle_s consists of


@dataclass(slots=True, eq=False)
class _Work:
    """A launch. `before` is the one directly before, which its rows may follow."""

    rows: list[RowInput]
    copies: list[BlockCopy]
    before: "_Work | None"
    end_s: float
    outputs: list[RowOutput] | None = None
    error: Exception | None = None


class FakeDevice:
    """A `PipelinedRunner` around a `FakeRunner`, whose `step` it calls once for each launch, in order.

    That is done while the device is at work, not at the launch, which costs the host next to nothing. What a
    step raises is raised when it is collected, as by a device, or (not `raises_late`) at its launch.
    """

    def __init__(
        self,
        model: FakeRunner,
        *,
        step_time_s: float = 0.0,
        is_pipelined: bool = True,
        raises_late: bool = True,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
        figures_path: Path | None = None,
    ) -> None:
        self.model = model
        self.step_time_s = step_time_s
        self.is_pipelined = is_pipelined
        self.figures = DeviceFigures()
        self._raises_late = raises_late
        self._clock = clock
        self._sleep = sleep
        self._figures_path = figures_path
        self._written_s = clock()
        self._free_s = clock()
        self._queue: deque[_Work] = deque()
        self._last: _Work | None = None  # the launch directly before
        self._copies: list[BlockCopy] = []  # before the next launch
        self._last_keys: set[int] = set()

    @property
    def pool(self) -> tuple[PoolGroup, ...]:
        """The model's."""
        return self.model.pool

    @property
    def max_model_len(self) -> int:
        """The model's."""
        return self.model.max_model_len

    @property
    def pulse(self) -> Pulse:
        """The model's."""
        return self.model.pulse

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Copy whole blocks, after what was launched and before what will be."""
        self._copies += copies

    def step(self, rows: Sequence[RowInput]) -> list[RowOutput]:
        """One step, waited for."""
        if self._queue:
            raise ContractError("a step while others are not collected")
        return self.collect(self.launch(rows))

    def launch(self, rows: Sequence[RowInput]) -> object:
        """Queue a step."""
        if len(self._queue) >= 2:
            raise ContractError(f"{len(self._queue)} launches are not collected")
        for row in rows:
            _check(row, self._last)
        # The host may change its tables and its row before the device is there.
        kept = [replace(row, tables=list(row.tables)) for row in rows]
        work = _Work(kept, self._copies, self._last, self._occupy(rows))
        self._copies = []
        self._last = None  # a launch that raises is nothing to follow
        self._queue.append(work)
        if not self._raises_late:
            for each in self._queue:
                self._compute(each)
            if work.error is not None:
                self._queue.pop()
                raise work.error
        self._last = work
        return work

    def collect(self, launched: object) -> list[RowOutput]:
        """Wait until the device is done with it."""
        if not self._queue or self._queue[0] is not launched:
            raise ContractError("launches are collected in their order, each once")
        work = self._queue[0]
        self._compute(work)
        self._queue.popleft()
        work.before = None
        wait_s = work.end_s - self._clock()
        if wait_s > 0:
            self._sleep(wait_s)
        if self._figures_path is not None and self._clock() >= self._written_s + _WRITE_INTERVAL_S:
            self._write(self._figures_path)
        if work.error is not None:
            raise work.error
        return work.outputs or []

    def _compute(self, work: _Work) -> None:
        """What the device does; those before it must be done."""
        if work.outputs is not None or work.error is not None:
            return
        if work.copies:
            self.model.copy_blocks(work.copies)
        try:
            work.outputs = self.model.step([_known(row, work.before) for row in work.rows])
        except Exception as error:
            work.error = error

    def _occupy(self, rows: Sequence[RowInput]) -> float:
        """Take the device for a step; when it is done."""
        figures, now_s = self.figures, self._clock()
        start_s = max(now_s, self._free_s)
        keys = {row.key for row in rows}
        if not keys.isdisjoint(self._last_keys):  # these were there all along
            figures.idle_s += start_s - self._free_s
            figures.num_gaps += start_s > self._free_s
        self._last_keys = keys
        figures.num_steps += 1
        figures.num_rows += len(rows)
        figures.busy_s += self.step_time_s
        self._free_s = start_s + self.step_time_s
        return self._free_s

    def _write(self, path: Path) -> None:
        self._written_s = self._clock()
        beside = path.with_suffix(".new")
        beside.write_text(json.dumps(asdict(self.figures)))
        os.replace(beside, path)


def _check(row: RowInput, before: _Work | None) -> None:
    """Raises `ContractError` where a row follows what is not its own last step."""
    if row.follows is None:
        return
    if before is None or not 0 <= row.follows < len(before.rows):
        raise ContractError(f"row {row.key} follows row {row.follows} of a launch that has none")
    source = before.rows[row.follows]
    is_next = source.start + len(source.ids) == row.start and source.index + 1 == row.index
    if source.key != row.key or not source.is_sampled or not is_next or tuple(row.ids) != (0,):
        raise ContractError(f"row {row.key} follows row {source.key}, which is not its last step")
    if row.sampling.needs_history:
        raise ContractError(f"row {row.key} follows and needs its history")


def _known(row: RowInput, before: _Work | None) -> RowInput:
    """The row with the id that it follows; garbage, as on a device, where none was made."""
    if row.follows is None:
        return row
    made = before.outputs[row.follows].id if before is not None and before.outputs else None
    return replace(row, ids=(0 if made is None else made,), follows=None)


def on_device(model: FakeRunner, environ: Mapping[str, str]) -> "FakeRunner | FakeDevice":
    """The model behind a device, where the environment asks for one; its step time becomes the device's."""
    wanted = environ.get(PIPELINED_VARIABLE)
    if not wanted:
        return model
    step_time_s, model.step_time_s = model.step_time_s, 0.0
    path = environ.get(FIGURES_VARIABLE, "")
    return FakeDevice(
        model,
        step_time_s=step_time_s,
        is_pipelined=wanted != "0",
        figures_path=Path(path) if path else None,
    )
