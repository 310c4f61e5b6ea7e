"""The processes of a run: the real services, each in a context of its own, so that it can die or stand still.

Knows no requests and no faults; `World` gives it what its services need.
"""

import asyncio
import contextvars
import random
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path

from pagebus.bus import subjects
from pagebus.bus.memory import MemoryBroker, MemoryBus
from pagebus.executor import service as executor_service
from pagebus.executor.batch import RowInput, RowOutput, Runner
from pagebus.executor.errors import BrokenModelError
from pagebus.executor.fake import FakeModel, FakeRunner
from pagebus.executor.fake_device import FakeDevice
from pagebus.executor.launched import LaunchedStep
from pagebus.executor.step_loop import Event
from pagebus.requester.client import Requester
from pagebus.scheduler.service import SchedulerService
from pagebus.settings.structs import ExecutorSettings, SchedulerSettings
from pagebus.sim.client import RAISING_ID, ViolationError
from pagebus.sim.scenario import Scenario
from pagebus.sim.timed_steps import StaleError, StepFate, TimedSteps
from pagebus.sim.virtual_time import OWNER, Owner

MODEL = "sim"
WATCHDOG_S = 5.0
DRAIN_S = 1.0


class SimulatedRunner(FakeRunner):
    """The fake model; some prompts raise, and a fault may make the next step raise."""

    is_crashing = False

    def step(self, rows: Sequence[RowInput]) -> list[RowOutput]:
        """A step of the fake model."""
        if self.is_crashing:
            self.is_crashing = False
            raise MemoryError("a fault")
        if any(RAISING_ID in row.ids for row in rows):
            raise ValueError("a prompt that no model likes")
        return super().step(rows)


@dataclass(eq=False)
class Process:
    """One that lives. `stop` is SIGTERM."""

    name: str
    bus: MemoryBus
    owner: Owner
    stop: asyncio.Event
    context: contextvars.Context
    task: asyncio.Task[None] | None = None
    steps: TimedSteps | None = None
    runner: SimulatedRunner | None = None
    scheduler: SchedulerService | None = None
    requester: Requester | None = None

    @property
    def is_executor(self) -> bool:
        """Whether it runs a model."""
        return self.name.startswith("ex")

    @property
    def is_scheduler(self) -> bool:
        """Whether it plans."""
        return self.name.startswith("sched")

    @property
    def is_gateway(self) -> bool:
        """Whether it owns requests."""
        return self.name.startswith("gw")


class Processes:
    """All that live, by name. `on_exit` is told of one that ended by itself, with what it raised."""

    def __init__(
        self,
        broker: MemoryBroker,
        scenario: Scenario,
        model: FakeModel,
        rng: random.Random,
        *,
        fate: Callable[[str, LaunchedStep], StepFate],
        on_death: Callable[[str], None],
        on_exit: Callable[[Process], None],
        on_gateway: Callable[[Process], None],
    ) -> None:
        self.live: dict[str, Process] = {}
        self.failures: list[BaseException] = []
        self.began_s: dict[str, float] = {}
        self.gone_s: dict[str, float] = {}  # by life subject
        self.orphaned_s: dict[tuple[str, float, int], float] = {}  # rows without an owner, for the checks
        self._all: list[Process] = []
        self._broker = broker
        self._scenario = scenario
        self._model = model
        self._rng = rng
        self._fate = fate
        self._on_death = on_death
        self._on_exit = on_exit
        self._on_gateway = on_gateway

    def names(self, letters: str = "") -> list[str]:
        """Sorted names of those that live and begin so."""
        return sorted(name for name in self.live if name.startswith(letters))

    def start(self, name: str) -> Process:
        """Start a process; what it is stands in its name: ex, sched, gw."""
        owner = Owner()
        context = contextvars.copy_context()
        context.run(OWNER.set, owner)
        process = context.run(self._make, name, owner, context)
        self.live[name] = process
        self.began_s[name] = asyncio.get_running_loop().time()
        self._all.append(process)
        process.task = asyncio.get_running_loop().create_task(
            context.run(self._main, process), context=context
        )
        process.task.add_done_callback(lambda task: self._ended(process), context=contextvars.Context())
        return process

    def kill(self, name: str) -> Process:
        """As SIGKILL does: nothing is sent any more, nothing is received, nothing runs."""
        process = self.live.pop(name)
        self._note_gone(process)
        process.owner.is_stopped = True
        if process.steps is not None:
            process.steps.die()
        return process

    def _note_gone(self, process: Process) -> None:
        process.bus.disconnect()
        if process.is_gateway:
            self.gone_s[subjects.life(process.name)] = asyncio.get_running_loop().time()

    def end_all(self) -> None:
        """The run is over: let every task end."""
        for process in self._all:
            process.bus.disconnect()
            if process.task is not None:
                process.task.cancel()
            process.owner.go_on()
        self.live.clear()

    def _make(self, name: str, owner: Owner, context: contextvars.Context) -> Process:
        return Process(name, self._broker.connect(name), owner, asyncio.Event(), context)

    def _main(self, process: Process) -> Coroutine[object, object, None]:
        if process.is_executor:
            return self._executor(process)
        return self._scheduler(process) if process.is_scheduler else self._gateway(process)

    def _ended(self, process: Process) -> None:
        task = process.task
        if task is None or self.live.get(process.name) is not process:
            return
        del self.live[process.name]
        self._note_gone(process)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, BrokenModelError):
            self.failures.append(error)
        self._on_exit(process)

    def _scheduler(self, process: Process) -> Coroutine[object, object, None]:
        scenario = self._scenario
        settings = SchedulerSettings(
            model=MODEL,
            horizon=scenario.horizon,
            max_num_batched_tokens=scenario.max_num_batched_tokens,
            max_num_seqs=scenario.max_num_seqs,
            max_num_queued_reqs=scenario.max_num_queued_reqs,
        )
        process.scheduler = SchedulerService(settings, process.bus, process.name)
        return process.scheduler.run(process.stop)

    def _executor(self, process: Process) -> Coroutine[object, object, None]:
        loop, name = asyncio.get_running_loop(), process.name
        runner = SimulatedRunner(self._model, num_blocks=self._scenario.num_blocks, max_model_len=256)
        process.runner = runner
        device = FakeDevice(
            runner,
            is_pipelined=self._scenario.is_pipelined,
            raises_late=self._scenario.raises_late,
            clock=loop.time,
        )
        steps = TimedSteps(
            name,
            lambda: device,
            loop=loop,
            step_s=self._scenario.step_s,
            fate=lambda step: self._fate(name, step),
            on_death=lambda: self._on_death(name),
        )
        process.steps = steps

        def make(
            executor: str,
            build: Callable[[], Runner],
            on_event: Callable[[Event], None],
            *,
            loop: asyncio.AbstractEventLoop,
        ) -> TimedSteps:
            steps.on_event = on_event
            return steps

        settings = ExecutorSettings(
            model=MODEL, fake=True, watchdog_s=WATCHDOG_S, drain_timeout_s=DRAIN_S, max_num_seqs=64
        )
        return executor_service.run(
            settings,
            process.bus,
            Path(),
            name,
            process.stop,
            clock=loop.time,
            make_steps=make,
            on_hang=lambda: self._on_death(name),
        )

    async def _gateway(self, process: Process) -> None:
        rng = random.Random(self._rng.getrandbits(32))  # noqa: S311
        requester = Requester(process.bus, model=MODEL, instance=process.name, rng=rng)
        await requester.start()
        process.requester = requester
        self._on_gateway(process)
        await process.stop.wait()
        await requester.close()

    def check(self) -> None:
        """Nothing of ours may have gone wrong where nobody sees it."""
        for error in self.failures:
            raise ViolationError(f"a service ended: {type(error).__name__}: {error}") from error
        for process in self._all:
            counts: dict[str, int] = dict(process.bus.counters)
            if process.scheduler is not None:
                counts |= process.scheduler.counters
            if process.requester is not None:
                counts |= process.requester.counters
            wrong = [name for name in counts if name in _WRONG and counts[name]]
            if wrong:
                raise ViolationError(f"{process.name} counted {wrong}")


_WRONG = frozenset(
    ("planning_errors", "handling_errors", "handler_errors", "listener_errors", "undecodable", "unexpected")
)

__all__ = ["MODEL", "Process", "Processes", "StaleError"]
