"""Steps between launch and collect on a `Runner`, and what one that raises means for the one behind it.

Knows rows and runners; neither plans nor what is told of a step.
"""

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from pagebus.executor.batch import PipelinedRunner, RowOutput, Runner, pipelined
from pagebus.executor.errors import BrokenModelError
from pagebus.executor.launched import LaunchedStep, known_inputs
from pagebus.executor.retrying import compute, compute_again

_log = logging.getLogger(__name__)


class Launches(Protocol):
    """Steps are launched, and collected in the same order."""

    duration_s: float
    """How long the device was at the step collected last."""

    @property
    def max_num(self) -> int:
        """So many steps may be uncollected."""

    @property
    def oldest(self) -> LaunchedStep | None:
        """The step to be collected next."""

    @property
    def can_launch(self) -> bool:
        """Whether one more step may be launched now."""

    def launch(self, step: LaunchedStep) -> None:
        """Start a step. Raises nothing: what went wrong is raised when it is collected."""

    def collect(self) -> list[RowOutput]:
        """One output a row of the oldest step (any for rows that are over); rows at fault fail alone.

        Steps launched before must have been completed, so that rows know their last ids. Raises what the
        step raised where it is nobody's fault in particular, and `BrokenModelError`; it is collected then.
        """


def launches(runner: Runner, clock: Callable[[], float]) -> Launches:
    """As the runner has it: steps launched ahead, or one after the other."""
    ahead = pipelined(runner)
    return InTurn(runner, clock) if ahead is None else Ahead(ahead, clock)


class InTurn:
    """One step at a time: it is computed when it is collected."""

    max_num = 1

    def __init__(self, runner: Runner, clock: Callable[[], float]) -> None:
        self.duration_s = 0.0
        self._runner = runner
        self._clock = clock
        self._step: LaunchedStep | None = None

    @property
    def oldest(self) -> LaunchedStep | None:
        """The step to be computed."""
        return self._step

    @property
    def can_launch(self) -> bool:
        """Whether the last one was collected."""
        return self._step is None

    def launch(self, step: LaunchedStep) -> None:
        """It is the next one."""
        self._step = step

    def collect(self) -> list[RowOutput]:
        """Compute it."""
        step, self._step = self._step, None
        if step is None:
            raise RuntimeError("no step was launched")
        began_s = self._clock()
        self._runner.pulse.begin()
        try:
            if step.copies:
                self._runner.copy_blocks(step.copies)
            return compute(self._runner, step.inputs)
        finally:
            self.duration_s = self._clock() - began_s
            self._runner.pulse.end()


@dataclass(slots=True, eq=False)
class _Launch:
    """A step that is not collected: at work on the device, or to be computed when it is collected."""

    step: LaunchedStep
    launched_s: float
    work: object = None  # the runner's
    is_at_work: bool = False
    error: Exception | None = None  # what its launch raised
    copy_error: Exception | None = None  # ... or the copies before it: its rows have nothing to begin from


class Ahead:
    """A step is launched while the one before it is at work, so that the device never waits for the host.

    ```
    device    | step N                  | step N+1                  | step N+2
    host       launch N+1, tell N-1      collect N, launch N+2, tell N
    ```

    When a step raises, what was launched behind it has worked with garbage: it is collected and dropped, and
    computed anew in its turn, from ids that are known then. Computing a row again writes the same to the same
    places, and nobody else has been given these by then: of rows in flight nothing was told.
    """

    max_num = 2

    def __init__(self, runner: PipelinedRunner, clock: Callable[[], float]) -> None:
        self.duration_s = 0.0
        self._runner = runner
        self._clock = clock
        self._waiting: deque[_Launch] = deque()
        self._collected_s = clock()

    @property
    def oldest(self) -> LaunchedStep | None:
        """The step to be collected next."""
        return self._waiting[0].step if self._waiting else None

    @property
    def can_launch(self) -> bool:
        """Whether there is room, and what a next step would follow is at work."""
        return len(self._waiting) < self.max_num and all(launch.is_at_work for launch in self._waiting)

    def launch(self, step: LaunchedStep) -> None:
        """Hand it to the device."""
        launch = _Launch(step, self._clock())
        if not self._waiting:
            self._runner.pulse.begin()
        self._waiting.append(launch)
        try:
            if step.copies:
                self._runner.copy_blocks(step.copies)
        except Exception as error:  # whatever a device raises; it is raised again by `collect`
            launch.copy_error = error
            return
        try:
            launch.work = self._runner.launch(step.inputs)
            launch.is_at_work = True
        except Exception as error:  # the same
            launch.error = error

    def collect(self) -> list[RowOutput]:
        """Wait for it; or compute it, where the device could not."""
        launch = self._waiting.popleft()
        try:
            return self._outputs_of(launch)
        finally:
            # The device began with it when the one before was done, or later.
            now_s = self._clock()
            self.duration_s = now_s - max(launch.launched_s, self._collected_s)
            self._collected_s = now_s
            if self._waiting:
                self._runner.pulse.beat()
            else:
                self._runner.pulse.end()

    def _outputs_of(self, launch: _Launch) -> list[RowOutput]:
        error = launch.copy_error or launch.error
        if launch.is_at_work:
            try:
                return self._runner.collect(launch.work)
            except Exception as caught:
                error = caught
        if isinstance(error, BrokenModelError):
            raise error
        if error is not None:
            self._drop_work()
        if launch.copy_error is not None:
            raise launch.copy_error
        return self._compute(launch.step, error)

    def _drop_work(self) -> None:
        """What follows a step that raised is worth nothing. Raises `BrokenModelError`."""
        for launch in self._waiting:
            if launch.is_at_work:
                launch.is_at_work = False
                try:
                    self._runner.collect(launch.work)
                except BrokenModelError:
                    raise
                except Exception:
                    _log.exception("a step behind one that raised raised as well; it is computed anew")

    def _compute(self, step: LaunchedStep, error: Exception | None) -> list[RowOutput]:
        """The rows that are left of a step; `error` is what the device raised for it, if it did."""
        outputs = [RowOutput() for _ in step.rows]
        known = known_inputs(step)
        inputs = [row_input for _, row_input in known]
        if inputs:
            again = (
                compute(self._runner, inputs) if error is None else compute_again(self._runner, inputs, error)
            )
            for (number, _), output in zip(known, again, strict=True):
                outputs[number] = output
        return outputs
