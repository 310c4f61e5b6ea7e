"""Runs a model's steps on timers: what the thread of `pagebus.executor.worker` is outside of simulations."""

import asyncio
import enum
import math
from collections import deque
from collections.abc import Callable

from pagebus.bus.messages import Plan
from pagebus.executor.batch import Runner
from pagebus.executor.launched import LaunchedStep
from pagebus.executor.lease import PlanState, View
from pagebus.executor.pulse import Pulse
from pagebus.executor.step_loop import Command, EndRequesters, Event, HandOver, Hear, StepLoop, Stop, Stopped

STEP_S = 0.004
STEP_ROW_S = 0.0001
START_S = 0.5


class StepFate(enum.Enum):
    """What becomes of a step that is about to be computed."""

    FINE = "fine"
    DIE = "die"  # it takes the process with it
    HANG = "hang"  # it never ends


class StaleError(AssertionError):
    """A plan of a former epoch was obeyed."""


class TimedSteps:
    """A step takes `step_s`, and `row_s` for each row; building the model takes `START_S`.

    Steps that are launched ahead queue up. `fate` is asked at each launch; `die` ends the simulated process.
    """

    def __init__(
        self,
        executor: str,
        build: Callable[[], Runner],
        *,
        loop: asyncio.AbstractEventLoop,
        step_s: float = STEP_S,
        row_s: float = STEP_ROW_S,
        fate: Callable[[LaunchedStep], StepFate] = lambda step: StepFate.FINE,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        self.num_steps = 0
        self._step_s = step_s
        self._row_s = row_s
        self._fate = fate
        self._on_death = on_death
        self._heard_epoch = 0
        self._known: set[tuple[int, int]] = set()  # (epoch, sequence) of plans that came in time
        self.on_event: Callable[[Event], None] = lambda event: None
        self._executor = executor
        self._build = build
        self._loop = loop
        self._commands: list[Command] = []
        self._steps: StepLoop | None = None
        self._ends_s: deque[float] = deque()  # of each launched step; infinity: never
        self._free_s = 0.0  # when all that was launched is done
        self._is_waiting = False  # for the oldest of them
        self._is_stopped = False
        self._is_dead = False

    @property
    def view(self) -> View:
        """The state after the last commands."""
        return self._steps.view if self._steps else View(0, 0, 0, b"", has_gap=False, lives=frozenset())

    @property
    def live_choices(self) -> list[tuple[str, int]]:
        """(request id, choice) of each row that is not over."""
        return [] if self._is_dead or self._steps is None else self._steps.live_choices

    @property
    def pulse(self) -> Pulse:
        """Whether a step is being computed, and whether it gets on."""
        return self._steps.pulse if self._steps else Pulse()

    @property
    def state(self) -> PlanState | None:
        """The rows and the lease; None while the model loads."""
        return None if self._is_dead or self._steps is None else self._steps.state

    def die(self) -> None:
        """The process is killed: nothing more happens, nothing more is told."""
        self._is_dead = True

    def start(self) -> None:
        """Build the model after a while."""
        self._loop.call_later(START_S, self._load)

    def take_plan(self, plan: Plan) -> None:
        """Hand over a plan; it is applied after the running step."""
        if plan.epoch >= self._heard_epoch:
            self._heard_epoch = plan.epoch
            self._known.add((plan.epoch, plan.sequence))
        self._put(plan)

    def hear(self, epoch: int) -> None:
        """A leader of this epoch was heard."""
        self._heard_epoch = max(self._heard_epoch, epoch)
        self._put(Hear(epoch))

    def end_requesters(self, lives: frozenset[str]) -> None:
        """Nobody listens on these life subjects any more."""
        self._put(EndRequesters(lives))

    def hand_over(self) -> None:
        """Finish the running step, then end every row."""
        self._put(HandOver())

    def stop(self) -> None:
        """Finish the running step, then end."""
        self._put(Stop())

    def _put(self, command: Command) -> None:
        self._commands.append(command)
        if not self._is_waiting and len(self._commands) == 1:
            self._loop.call_soon(self._turn)

    def _load(self) -> None:
        if not self._is_dead:
            self._steps = StepLoop(self._executor, self._build(), self._loop.time)
            self._turn()

    def _turn(self) -> None:
        steps = self._steps
        if self._is_dead or self._is_stopped or self._is_waiting or steps is None:
            return
        while True:
            commands, self._commands = self._commands, []
            if any(isinstance(command, Stop) for command in commands):
                self._end(steps, None)
                return
            try:
                step = steps.begin(commands)
            except BaseException as error:  # as in the worker's thread
                self._end(steps, error)
                return
            self._tell(steps)
            if step is not None:
                self._launch(step)
            if steps.due is not None:
                self._is_waiting = True
                if self._ends_s[0] < math.inf:
                    self._loop.call_at(self._ends_s[0], self._finish)
                return
            if steps.is_idle:
                return

    def _launch(self, step: LaunchedStep) -> None:
        if (step.epoch, step.plan) not in self._known:
            raise StaleError(
                f"{self._executor} computes plan {step.plan} of epoch {step.epoch}, which is over"
            )
        self.num_steps += 1
        begin_s = max(self._loop.time(), self._free_s)
        fate = self._fate(step)
        is_fine = fate is StepFate.FINE
        self._free_s = begin_s + self._step_s + self._row_s * len(step.rows) if is_fine else math.inf
        self._ends_s.append(self._free_s)
        if fate is StepFate.DIE and begin_s < math.inf:
            self._loop.call_at(begin_s, self._on_death)
        if not self.pulse.is_busy:
            self.pulse.begin()

    def _finish(self) -> None:
        if self._is_dead or self._steps is None:
            return
        self._is_waiting = False
        self._ends_s.popleft()
        try:
            self._steps.run()
        except BaseException as error:  # as in the worker's thread
            self._end(self._steps, error)
        else:
            self._turn()

    def _end(self, steps: StepLoop, error: BaseException | None) -> None:
        self._is_stopped = True
        if error is None:
            try:
                steps.finish()
            except BaseException as caught:
                error = caught
        self._tell(steps)
        self.on_event(Stopped(error))

    def _tell(self, steps: StepLoop) -> None:
        for event in steps.take_events():
            self.on_event(event)
