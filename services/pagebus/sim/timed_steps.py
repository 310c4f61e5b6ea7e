"""Runs a model's steps on timers: what the thread of `pagebus.executor.worker` is outside of simulations."""

import asyncio
from collections.abc import Callable

from pagebus.bus.messages import Plan
from pagebus.executor.batch import Runner
from pagebus.executor.lease import LaunchedStep, View
from pagebus.executor.step_loop import Command, EndRequesters, Event, Hear, StepLoop, Stop, Stopped

STEP_S = 0.004
STEP_ROW_S = 0.0001
START_S = 0.5


class TimedSteps:
    """A step takes `STEP_S`, and a little for each row; building the model takes `START_S`."""

    def __init__(
        self,
        executor: str,
        build: Callable[[], Runner],
        *,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
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

    def die(self) -> None:
        """The process is killed: nothing more happens, nothing more is told."""
        self._is_dead = True

    def start(self) -> None:
        """Build the model after a while."""
        self._loop.call_later(START_S, self._load)

    def take_plan(self, plan: Plan) -> None:
        """Hand over a plan; it is applied after the running step."""
        self._put(plan)

    def hear(self, epoch: int) -> None:
        """A leader of this epoch was heard."""
        self._put(Hear(epoch))

    def end_requesters(self, lives: frozenset[str]) -> None:
        """Nobody listens on these life subjects any more."""
        self._put(EndRequesters(lives))

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
            self._loop.call_later(STEP_S + STEP_ROW_S * len(self._running.rows), self._finish, self._running)

    def _finish(self, step: LaunchedStep) -> None:
        if self._is_dead or self._steps is None:
            return
        self._steps.run(step)
        self._running = None
        self._turn()
