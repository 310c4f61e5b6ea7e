"""One simulated run: requesters, schedulers and executors on a bus that loses, doubles, delays and cuts, and
processes that die and come back. Everything is drawn from one seed; what must hold is checked all along.
"""

import asyncio
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from pagebus.bus.faults import SeededFaults
from pagebus.bus.memory import MemoryBroker, MemoryBus
from pagebus.bus.messages import Sampling
from pagebus.executor import service as executor_service
from pagebus.executor.batch import Runner
from pagebus.executor.fake import FakeModel, FakeRunner, fake_sequence
from pagebus.executor.step_loop import Event
from pagebus.requester.client import Requester
from pagebus.requester.events import NewTokens, RequestFailed, RequestSpec
from pagebus.scheduler import service as scheduler_service
from pagebus.settings.structs import ExecutorSettings, SchedulerSettings
from pagebus.sim import virtual_time
from pagebus.sim.timed_steps import TimedSteps

MODEL = "sim"
NUM_BLOCKS = 96
TROUBLE_S = 12.0
"""Faults happen until then; after it everybody is up and the bus is healthy."""
DEADLINE_S = 300.0
EPOCH_S = 1.7e9


class ViolationError(AssertionError):
    """Something happened that must never happen."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run was like."""

    seed: int
    num_requests: int
    num_faults: int
    end_s: float  # of virtual time, when the last request ended


@dataclass
class _Process:
    bus: MemoryBus
    task: asyncio.Task[None]
    steps: TimedSteps | None = None


class _Faults:
    """Seeded single faults, and processes that nobody hears or that hear nobody."""

    def __init__(self, seed: int, rng: random.Random) -> None:
        self.cut: set[str] = set()
        self.deaf: set[str] = set()
        self.is_healthy = False
        self._single = SeededFaults(
            seed,
            loss=rng.choice((0.0, 0.01, 0.05)),
            duplication=rng.choice((0.0, 0.05)),
            delay=rng.choice((0.0, 0.1, 0.5)),
            max_delay_s=rng.choice((0.01, 0.2)),
        )

    def delays_s(self, subject: str, sender: str, receiver: str) -> Sequence[float]:
        if sender in self.cut or receiver in self.deaf:
            return ()
        return (0.0,) if self.is_healthy else self._single.delays_s(subject, sender, receiver)


@dataclass
class _Request:
    spec: RequestSpec
    gateway: str
    expected: list[list[int]]
    received: list[list[int]] = field(default_factory=list)
    num_ends: int = 0


class World:
    """All processes of a run, by name."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)  # noqa: S311
        self.faults = _Faults(seed, self.rng)
        self.broker = MemoryBroker(faults=self.faults)
        self.model = FakeModel(windows=self.rng.choice(((None,), (None, 40))))
        self.processes: dict[str, _Process] = {}
        self.requesters: dict[str, Requester] = {}
        self.num_faults = 0
        self._horizon = self.rng.choice((0, 1, 3, 8))
        self._seed = seed

    # -- processes -------------------------------------------------------------------------------------------

    def start_scheduler(self, name: str) -> None:
        bus = self.broker.connect(name)
        settings = SchedulerSettings(model=MODEL, horizon=self._horizon, max_num_batched_tokens=64)
        run = scheduler_service.run(settings, bus, name, asyncio.Event())
        self.processes[name] = _Process(bus, _task(run))

    def start_executor(self, name: str) -> None:
        bus = self.broker.connect(name)
        loop = asyncio.get_running_loop()
        steps = TimedSteps(name, self._build, loop=loop)

        def make(
            executor: str,
            build: Callable[[], Runner],
            on_event: Callable[[Event], None],
            *,
            loop: asyncio.AbstractEventLoop,
        ) -> TimedSteps:
            steps.on_event = on_event
            return steps

        settings = ExecutorSettings(model=MODEL, fake=True)
        run = executor_service.run(
            settings, bus, Path(), name, asyncio.Event(), clock=loop.time, make_steps=make
        )
        self.processes[name] = _Process(bus, _task(run), steps)

    def _build(self) -> Runner:
        return FakeRunner(self.model, num_blocks=NUM_BLOCKS, max_model_len=256)

    def kill(self, name: str) -> None:
        """As SIGKILL does: nothing is sent any more, nothing is received."""
        process = self.processes.pop(name)
        process.bus.disconnect()
        if process.steps is not None:
            process.steps.die()
        process.task.cancel()

    def _start(self, name: str) -> None:
        (self.start_executor if name.startswith("ex") else self.start_scheduler)(name)

    # -- trouble ---------------------------------------------------------------------------------------------

    async def trouble(self) -> None:
        """Faults at random times; at the end all is well again."""
        loop = asyncio.get_running_loop()
        while loop.time() < TROUBLE_S:
            await asyncio.sleep(self.rng.expovariate(1.0))
            name = self.rng.choice(sorted(self.processes) or ["ex0"])
            self.num_faults += 1
            match self.rng.randrange(4):
                case 0:
                    if name in self.processes:
                        self.kill(name)
                        loop.call_later(self.rng.uniform(0.1, 4.0), self._revive, name)
                case 1:
                    if name in self.processes:
                        bus = self.processes[name].bus
                        bus.disconnect()
                        loop.call_later(self.rng.uniform(0.1, 4.0), bus.reconnect)
                case 2:
                    self._cut(self.faults.cut, name)
                case _:
                    self._cut(self.faults.deaf, name)
        await asyncio.sleep(5.0)
        self.faults.is_healthy = True

    def _revive(self, name: str) -> None:
        if name not in self.processes:
            self._start(name)

    def _cut(self, names: set[str], name: str) -> None:
        """One way only: it is not heard, or hears nobody."""
        names.add(name)
        asyncio.get_running_loop().call_later(self.rng.uniform(0.1, 4.0), names.discard, name)

    # -- requests --------------------------------------------------------------------------------------------

    def draw_request(self, number: int) -> _Request:
        prompt = [self.rng.randrange(3) for _ in range(self.rng.randint(1, 50))]
        spec = RequestSpec(
            request_id=f"q{number}",
            prompt=prompt,
            num_choices=self.rng.choice((1, 1, 2)),
            max_tokens=self.rng.randint(1, 120),
            sampling=Sampling(temperature=self.rng.choice((0.0, 1.0)), seed=number),
            priority=self.rng.choice((0, 0, 1)),
            tenant=self.rng.choice(("", "t")),
            timeout_s=DEADLINE_S,
        )
        expected = [
            fake_sequence(prompt, spec.max_tokens, model=self.model, sampling=spec.sampling, choice=choice)
            for choice in range(spec.num_choices)
        ]
        return _Request(spec, self.rng.choice(sorted(self.requesters)), expected)

    async def follow(self, request: _Request, start_s: float) -> None:
        """Send it at its time, and check each id that comes."""
        await asyncio.sleep(start_s)
        request.received = [[] for _ in request.expected]
        name, ended = request.spec.request_id, 0
        async for event in self.requesters[request.gateway].generate(request.spec):
            match event:
                case RequestFailed():
                    raise ViolationError(f"{name} failed: {event.code}: {event.message}")
                case NewTokens():
                    received = request.received[event.choice]
                    if event.index != len(received):
                        raise ViolationError(f"{name}: index {event.index} after {len(received)} ids")
                    received.extend(event.ids)
                    if received != request.expected[event.choice][: len(received)]:
                        raise ViolationError(f"{name} choice {event.choice}: wrong ids at {event.index}")
                    ended += event.finish_reason is not None
        if ended != len(request.expected) or request.received != request.expected:
            raise ViolationError(f"{name} ended {ended} of {len(request.expected)} choices")
        request.num_ends += 1

    async def watch(self) -> None:
        """All along: an executor holds each choice of a request once."""
        while True:
            await asyncio.sleep(0.05)
            for name, process in self.processes.items():
                rows = process.steps.live_choices if process.steps else []
                if len(set(rows)) != len(rows):
                    raise ViolationError(f"{name} runs a choice twice: {sorted(rows)}")

    async def settled(self) -> None:
        """At the end every block is free."""
        beats = [requester.heartbeat for requester in self.requesters.values()]
        for _ in range(600):
            await asyncio.sleep(0.1)
            beats = [requester.heartbeat for requester in self.requesters.values()]
            if all(
                beat and beat.num_executors == 2 and beat.num_running == beat.num_waiting == 0
                and beat.num_free_blocks == beat.num_blocks
                for beat in beats
            ):  # fmt: skip
                return
        raise ViolationError(f"blocks are in use on an idle system: {beats}")


async def _run(seed: int, num_requests: int) -> Outcome:
    loop = asyncio.get_running_loop()

    def wall_s() -> float:
        return EPOCH_S + loop.time()

    with (
        mock.patch.object(time, "monotonic", loop.time),
        mock.patch.object(time, "time", wall_s),
    ):
        world = World(seed)
        for name in ("sched0", "sched1"):
            world.start_scheduler(name)
        for name in ("ex0", "ex1"):
            world.start_executor(name)
        for name in ("gw0", "gw1"):
            made = Requester(world.broker.connect(name), model=MODEL, instance=name, rng=random.Random(seed))  # noqa: S311
            await made.start()
            world.requesters[name] = made
        requests = [world.draw_request(number) for number in range(num_requests)]
        watching, trouble = _task(world.watch()), _task(world.trouble())
        follow = [world.follow(request, world.rng.uniform(0.0, TROUBLE_S)) for request in requests]
        following = _task(_all(follow))
        done, _ = await asyncio.wait({watching, following}, return_when=asyncio.FIRST_COMPLETED)
        for each in done:
            each.result()
        end_s = loop.time()
        await trouble
        await world.settled()
        watching.cancel()
        for name in sorted(world.processes):
            world.kill(name)
        for made in world.requesters.values():
            await made.close()
    return Outcome(
        seed=seed,
        num_requests=num_requests,
        num_faults=world.num_faults,
        end_s=end_s,
    )


def run(seed: int, num_requests: int = 30) -> Outcome:
    """One run. Raises `ViolationError`; the same seed raises it again."""
    return virtual_time.run(_run(seed, num_requests))


def _task(work: Coroutine[object, object, None]) -> asyncio.Task[None]:
    return asyncio.get_running_loop().create_task(work)


async def _all(work: Sequence[Coroutine[object, object, None]]) -> None:
    await asyncio.gather(*work)
