"""The thread that builds the model and runs its steps back to back. It owns the `PlanState` and never touches
asyncio but for `call_soon_threadsafe`; knows no bus.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from pagebus.bus.messages import Plan, PoolGroup, StepDone
from pagebus.executor.batch import Runner
from pagebus.executor.lease import LaunchedStep, Outcome, PlanState, View
from pagebus.executor.reports import Report

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ready:
    """The model is loaded."""

    pool: tuple[PoolGroup, ...]
    max_model_len: int


@dataclass(frozen=True, slots=True)
class Acknowledge:
    """A bare acknowledgement is to be sent once: no step will carry it soon."""

    done: StepDone


@dataclass(frozen=True, slots=True)
class HelloWanted:
    """The scheduler must hear from this executor at once."""


@dataclass(frozen=True, slots=True)
class Stopped:
    """The thread ended, the last event; with an error where it was not asked to."""

    error: BaseException | None


Event = Ready | Report | Acknowledge | HelloWanted | Stopped


@dataclass(frozen=True, slots=True)
class _Hear:
    epoch: int


@dataclass(frozen=True, slots=True)
class _EndRequesters:
    lives: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


_Command = Plan | _Hear | _EndRequesters | _Stop


class Worker:
    """Hand it plans from the loop; `on_event` is called on the loop with what comes out, in order."""

    def __init__(
        self,
        executor: str,
        build: Callable[[], Runner],
        on_event: Callable[[Event], None],
        *,
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._executor = executor
        self._build = build
        self._on_event = on_event
        self._loop = loop
        self._clock = clock
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._events: list[Event] = []
        self._view = View(0, 0, 0, b"", has_gap=False, lives=frozenset())
        # A daemon: a process that is told to stop while weights load does not wait for them.
        self._thread = threading.Thread(target=self._main, name="executor-steps", daemon=True)

    # -- the loop's side ---------------------------------------------------------------------------------

    @property
    def view(self) -> View:
        """The state after the last command (its `num_steps` may be behind); replaced whole by the thread."""
        return self._view

    def start(self) -> None:
        """Start the thread: it builds the model first."""
        self._thread.start()

    def take_plan(self, plan: Plan) -> None:
        """Hand over a plan; it is applied after the running step."""
        self._commands.put(plan)

    def hear(self, epoch: int) -> None:
        """A leader of this epoch was heard."""
        self._commands.put(_Hear(epoch))

    def end_requesters(self, lives: frozenset[str]) -> None:
        """Nobody listens on these life subjects any more."""
        self._commands.put(_EndRequesters(lives))

    def stop(self) -> None:
        """Finish the running step, then end; `Stopped` follows."""
        self._commands.put(_Stop())

    # -- the thread's side -------------------------------------------------------------------------------

    def _main(self) -> None:
        error: BaseException | None = None
        try:
            runner = self._build()
            self._events.append(Ready(tuple(runner.pool), runner.max_model_len))
            self._flush()
            self._serve(runner, PlanState(self._executor, runner.pool, runner.max_model_len))
        except BaseException as caught:  # handed to the loop, which raises it
            error = caught
        self._events.append(Stopped(error))
        self._flush()

    def _serve(self, runner: Runner, state: PlanState) -> None:
        owes_acknowledgement = False
        is_idle = False
        while True:
            # 1. What the loop handed over; an idle thread waits for it.
            commands = self._receive(is_idle)
            if any(isinstance(command, _Stop) for command in commands):
                return
            had_gap = state.has_gap
            for command in commands:
                owes_acknowledgement |= self._apply(state, command)
            # 2. The next step. Failures are reported after the step before them.
            step = state.next_step()
            failures = state.report_failures()
            if failures is not None:
                self._events.append(failures)
            if state.has_gap and not had_gap:
                self._events.append(HelloWanted())
            if step is None and owes_acknowledgement:
                self._events.append(Acknowledge(state.acknowledgement()))
            owes_acknowledgement = False  # a step that is launched acknowledges
            if commands or state.has_gap != had_gap:
                self._view = state.view
            # 3. Publish what the step before made while this one computes.
            self._flush()
            is_idle = step is None
            if step is not None:
                self._run(runner, state, step)

    def _receive(self, is_idle: bool) -> list[_Command]:
        commands = [self._commands.get()] if is_idle else []
        while True:
            try:
                commands.append(self._commands.get_nowait())
            except queue.Empty:
                return commands

    def _apply(self, state: PlanState, command: _Command) -> bool:
        """Change the state; True when a plan has to be acknowledged."""
        match command:
            case Plan():
                outcome = state.take_plan(command)
                if outcome in (Outcome.TAKEN, Outcome.DUPLICATE):
                    return True
                if outcome is Outcome.INVALID:
                    _log.error("plan %d of epoch %d is malformed", command.sequence, command.epoch)
                self._events.append(HelloWanted())
            case _Hear(epoch=epoch):
                if state.hear(epoch):
                    self._events.append(HelloWanted())
            case _EndRequesters(lives=lives):
                state.end_requesters(lives)
            case _Stop():
                pass
        return False

    def _run(self, runner: Runner, state: PlanState, step: LaunchedStep) -> None:
        began_s = self._clock()
        try:
            if step.copies:
                runner.copy_blocks(step.copies)
            outputs = runner.step(step.inputs)
            report = state.complete(step, outputs, self._clock() - began_s)
        except Exception as error:
            # Out of memory, or a broken model: the step's rows fail, the process lives on.
            _log.exception("a step of %d rows failed", len(step.rows))
            message = f"the step failed: {type(error).__name__}: {error}"[:500]
            report = state.fail_step(step, message, self._clock() - began_s)
        if report is not None:
            self._events.append(report)

    def _flush(self) -> None:
        if not self._events:
            return
        events, self._events = self._events, []
        try:
            self._loop.call_soon_threadsafe(self._deliver, events)
        except RuntimeError:  # the loop is closed: nobody is left to tell
            self._commands.put(_Stop())

    def _deliver(self, events: list[Event]) -> None:
        for event in events:
            self._on_event(event)
