"""What lies between two steps: take what came, launch the next step, collect what is to be told.

Whoever runs steps drives it; it knows neither threads nor the bus.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pagebus.bus.messages import Plan, PoolGroup, StepDone
from pagebus.executor.batch import Runner
from pagebus.executor.errors import BrokenModelError
from pagebus.executor.launched import LaunchedStep
from pagebus.executor.launches import launches
from pagebus.executor.lease import Outcome, PlanState
from pagebus.executor.reports import Report

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
    """`begin`, `take_events`, `run` where a step is due, and so on; idle where none is and none was launched.

    Rows are only ended, and blocks only handed out anew, for what was told: `take_events` comes after the
    launch of the next step and before `run`, so nobody can react to a row's end before every step that was
    launched with it is collected.
    """

    def __init__(self, executor: str, runner: Runner, clock: Callable[[], float]) -> None:
        self._launches = launches(runner, clock)
        self._num_failed_steps = 0  # in a row
        self.pulse = runner.pulse
        self._state = PlanState(
            executor, runner.pool, runner.max_model_len, max_in_flight=self._launches.max_num
        )
        self._events: list[Event] = [Ready(tuple(runner.pool), runner.max_model_len)]
        self._delayed: list[Command] = []  # until nothing is in flight
        self._owes_acknowledgement = False
        self.due: LaunchedStep | None = None
        """What `run` waits for: None after a launch that another one may follow, and where all is done."""
        self.is_idle = False
        """Whether `begin` found that there is nothing to do before a command comes."""
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
        """Take commands (no `Stop`) and launch the next step; None: nothing was launched."""
        state, had_gap = self._state, self._state.has_gap
        waiting = [*self._delayed, *commands]
        self._delayed = []
        for number, command in enumerate(waiting):
            if self._needs_quiet(command):
                self._delayed = waiting[number:]
                break
            self._owes_acknowledgement |= self._apply(state, command)
        step = state.next_step() if self._launches.can_launch and not self._delayed else None
        if step is not None:
            self._launches.launch(step)
        # Failures are reported after the steps before them, where these are not in flight.
        failures = state.report_failures()
        if failures is not None:
            self._events.append(failures)
        if state.has_gap and not had_gap:
            self._events.append(HelloWanted())
        if step is not None or state.num_in_flight == 0:
            self._acknowledge(step)
        self.due = None if step is not None and self._launches.can_launch else self._launches.oldest
        self.is_idle = self._launches.oldest is None and not self._delayed
        if waiting or step is None or state.has_gap != had_gap:
            self.view = state.view
        return step

    def _needs_quiet(self, command: Command) -> bool:
        """Whether steps in flight are to be collected before it: it may hand out blocks anew, or ends all."""
        if self._launches.max_num == 1 or not self._state.num_in_flight:
            return False
        return isinstance(command, HandOver) or (
            isinstance(command, Plan) and self._state.needs_quiet(command)
        )

    def _acknowledge(self, step: LaunchedStep | None) -> None:
        """A step launched now acknowledges all plans. Where none is in flight, a bare message does."""
        if step is None and self._owes_acknowledgement:
            self._events.append(Acknowledge(self._state.acknowledgement()))
        self._owes_acknowledgement = False

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

    def run(self) -> None:
        """Compute, or collect, the step that is `due`. What raises fails its rows, and the loop goes on.

        Raises `BrokenModelError`, after the rows were failed, where only a new process can help.
        """
        step = self.due
        if step is None:
            raise RuntimeError("no step is due")
        self.due = None
        try:
            outputs = self._launches.collect()
            report = self._state.complete(step, outputs, self._launches.duration_s)
        except Exception as error:
            # Out of memory, or a broken model: the step's rows fail, and requesters ask again.
            _log.exception("a step of %d rows failed", len(step.rows))
            self._fail(step, error)
            return
        if report is None:
            self._owes_acknowledgement = True  # of the plans that its report would have acknowledged
            return
        self._num_failed_steps = 0
        self._events.append(report)

    def _fail(self, step: LaunchedStep, error: Exception) -> None:
        message = f"the step failed: {type(error).__name__}: {error}"[:500]
        self._num_failed_steps += 1
        broken = error if isinstance(error, BrokenModelError) else None
        if self._num_failed_steps >= MAX_FAILED_STEPS:
            broken = BrokenModelError(f"{self._num_failed_steps} steps in a row failed; {message}")
        lost: LaunchedStep | None = step
        while lost is not None:
            report = self._state.fail_step(lost, message, self._launches.duration_s)
            if report is not None:
                self._events.append(report)
            # A broken model takes with it what was launched behind.
            lost = self._state.oldest_in_flight if broken is not None else None
        if broken is not None:
            raise broken

    def finish(self) -> None:
        """Collect all that was launched. Raises as `run` does."""
        while self._launches.oldest is not None:
            self.due = self._launches.oldest
            self.run()
