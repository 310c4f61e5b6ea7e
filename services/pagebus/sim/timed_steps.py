"""Runs a model's steps on timers: what the thread of `pagebus.executor.worker` is outside of simulations."""

import asyncio
import enum
from collections.abc import Callable

from pagebus.bus.messages import Plan
from pagebus.executor.batch import Runner
from pagebus.executor.errors import BrokenModelError
from pagebus.executor.lease import LaunchedStep, PlanState, View
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
    """A step takes `step_s`, and a little for each row; building the model takes `START_S`.

    `fate` is asked before each step; `die` ends the simulated process.
    """

    def __init__(
        self,
        executor: str,
        build: Callable[[], Runner],
        *,
        loop: asyncio.AbstractEventLoop,
        step_s: float = STEP_S,
        fate: Callable[[LaunchedStep], StepFate] = lambda step: StepFate.FINE,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        self.num_steps = 0
        self._step_s = step_s
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
        self._running: LaunchedStep | None = None
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
        if self._running is None and len(self._commands) == 1:
            self._loop.call_soon(self._turn)

    def _load(self) -> None:
        if not self._is_dead:
            self._steps = StepLoop(self._executor, self._build(), self._loop.time)
            self._turn()

    def _turn(self) -> None:
        if self._is_dead or self._is_stopped or self._running is not None or self._steps is None:
            return
        commands, self._commands = self._commands, []
        is_last = any(isinstance(command, Stop) for command in commands)
        if not is_last:
            self._running = self._steps.begin(commands)
        for event in self._steps.take_events():
            self.on_event(event)
        if is_last:
            self._is_stopped = True
            self.on_event(Stopped(None))
        elif self._running is not None:
            self._launch(self._running)

    def _launch(self, step: LaunchedStep) -> None:
        if (step.epoch, step.plan) not in self._known:
            raise StaleError(
                f"{self._executor} computes plan {step.plan} of epoch {step.epoch}, which is over"
            )
        self.num_steps += 1
        match self._fate(step):
            case StepFate.DIE:
                self._loop.call_soon(self._on_death)
            case StepFate.HANG:
                self.pulse.begin()
            case StepFate.FINE:
                self.pulse.begin()
                self._loop.call_later(self._step_s + STEP_ROW_S * len(step.rows), self._finish, step)

    def _finish(self, step: LaunchedStep) -> None:
        if self._is_dead or self._steps is None:
            return
        error: BrokenModelError | None = None
        try:
            self._steps.run(step)
        except BrokenModelError as caught:
            error = caught
        self._running = None
        if error is None:
            self._turn()
            return
        self._is_stopped = True
        for event in self._steps.take_events():
            self.on_event(event)
        self.on_event(Stopped(error))
