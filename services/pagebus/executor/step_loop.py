"""What lies between two steps: take what came, prepare the next step, collect what is to be told.

Whoever runs steps drives it, one step at a time; it knows neither threads nor the bus.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pagebus.bus.messages import Plan, PoolGroup, StepDone
from pagebus.executor.batch import Runner
from pagebus.executor.errors import BrokenModelError
from pagebus.executor.lease import LaunchedStep, Outcome, PlanState
from pagebus.executor.reports import Report
from pagebus.executor.retrying import compute

_log = logging.getLogger(__name__)

MAX_FAILED_STEPS = 3
"""So many steps in a row in which no row could be computed: the process is beyond repair."""


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
class Hear:
    """A leader's epoch was heard."""

    epoch: int


@dataclass(frozen=True, slots=True)
class EndRequesters:
    """Nobody listens on these life subjects any more."""

    lives: frozenset[str]


@dataclass(frozen=True, slots=True)
class HandOver:
    """End every row: its requester asks again, and it goes on elsewhere."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Finish the running step, then end."""


Command = Plan | Hear | EndRequesters | HandOver | Stop


class StepLoop:
    """`begin`, then `run` where it gave a step, and so on; `take_events` at any time between."""

    def __init__(self, executor: str, runner: Runner, clock: Callable[[], float]) -> None:
        self._runner = runner
        self._clock = clock
        self._num_failed_steps = 0  # in a row
        self.pulse = runner.pulse
        self._state = PlanState(executor, runner.pool, runner.max_model_len)
        self._events: list[Event] = [Ready(tuple(runner.pool), runner.max_model_len)]
        self.view = self._state.view
        """The state after the last commands; its `num_steps` may be behind."""

    @property
    def state(self) -> PlanState:
        """Rows and lease, to be looked at only."""
        return self._state

    @property
    def live_choices(self) -> list[tuple[str, int]]:
        """(request id, choice) of each row that is not over."""
        return self._state.live_choices

    def take_events(self) -> list[Event]:
        """What is to be told, in order."""
        events, self._events = self._events, []
        return events

    def begin(self, commands: Iterable[Command]) -> LaunchedStep | None:
        """Take commands (no `Stop`) and prepare the next step; None: nothing to do."""
        state, had_gap = self._state, self._state.has_gap
        owes_acknowledgement = has_commands = False
        for command in commands:
            owes_acknowledgement |= self._apply(state, command)
            has_commands = True
        # Failures are reported after the step before them.
        step = state.next_step()
        failures = state.report_failures()
        if failures is not None:
            self._events.append(failures)
        if state.has_gap and not had_gap:
            self._events.append(HelloWanted())
        if step is None and owes_acknowledgement:
            self._events.append(Acknowledge(state.acknowledgement()))  # else the step acknowledges
        if has_commands or step is None or state.has_gap != had_gap:
            self.view = state.view
        return step

    def _apply(self, state: PlanState, command: Command) -> bool:
        """Change the state; True when a plan has to be acknowledged."""
        match command:
            case Plan():
                outcome = state.take_plan(command)
                if outcome in (Outcome.TAKEN, Outcome.DUPLICATE):
                    return True
                if outcome is Outcome.INVALID:
                    _log.error("plan %d of epoch %d is malformed", command.sequence, command.epoch)
                self._events.append(HelloWanted())
            case Hear(epoch=epoch):
                if state.hear(epoch):
                    self._events.append(HelloWanted())
            case EndRequesters(lives=lives):
                state.end_requesters(lives)
            case HandOver():
                state.hand_over()
            case Stop():
                pass
        return False

    def run(self, step: LaunchedStep) -> None:
        """Compute a step that `begin` gave. What raises fails its rows, and the loop goes on.

        Raises `BrokenModelError`, after the rows were failed, where only a new process can help.
        """
        runner, state = self._runner, self._state
        began_s = self._clock()
        broken: BrokenModelError | None = None
        self.pulse.begin()
        try:
            if step.copies:
                runner.copy_blocks(step.copies)
            outputs = compute(runner, step.inputs)
            report = state.complete(step, outputs, self._clock() - began_s)
            self._num_failed_steps = 0
        except Exception as error:
            # Out of memory, or a broken model: the step's rows fail, and requesters ask again.
            _log.exception("a step of %d rows failed", len(step.rows))
            message = f"the step failed: {type(error).__name__}: {error}"[:500]
            report = state.fail_step(step, message, self._clock() - began_s)
            self._num_failed_steps += 1
            if isinstance(error, BrokenModelError):
                broken = error
            elif self._num_failed_steps >= MAX_FAILED_STEPS:
                broken = BrokenModelError(f"{self._num_failed_steps} steps in a row failed; {message}")
        finally:
            self.pulse.end()
        if report is not None:
            self._events.append(report)
        if broken is not None:
            raise broken
