"""One simulated run: requesters, schedulers and executors on a bus that loses, doubles, delays and cuts, and
processes that die, stand still and come back. Everything is drawn from one seed; what must hold is checked
all along.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from unittest import mock

from pagebus.bus.memory import MemoryBroker
from pagebus.executor.fake import FakeModel
from pagebus.executor.launched import LaunchedStep
from pagebus.requester.client import Ticket
from pagebus.requester.events import Event, RequestFailed
from pagebus.sim import checks, virtual_time
from pagebus.sim.bad_bus import BadBus
from pagebus.sim.client import LATE_S, Client, Manner, ViolationError, draw_clients
from pagebus.sim.history import History
from pagebus.sim.processes import Process, Processes
from pagebus.sim.scenario import Scenario, draw
from pagebus.sim.timed_steps import StepFate
from pagebus.sim.trouble import Trouble

__all__ = ["Outcome", "ViolationError", "run"]

BAD_BUS_S = 3.0
"""So long after the last fault the bus still loses and delays."""
END_S = 75.0
"""So long after all is well the last request ends, at the latest."""
IDLE_S = 30.0
"""... and so long after that nothing is held for anybody."""
WATCH_INTERVAL_S = 0.05
EPOCH_S = 1.7e9


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run was like. Times are virtual seconds."""

    seed: int
    num_requests: int
    num_faults: int
    num_attempts: int
    num_preemptions: int
    num_terms: int
    num_moved: int  # requests that another owner went on with
    end_s: float  # when the last request ended, after all was well again
    idle_s: float  # when nothing was held any more, after that
    digest: str  # of every message
    faults: Counter[str] = field(compare=False)
    ends: Counter[str] = field(compare=False)  # how requests ended


class World:
    """Everything of a run."""

    def __init__(self, seed: int, num_requests: int | None, *, is_told: bool) -> None:
        self._loop = asyncio.get_running_loop()
        self._rng = random.Random(seed)  # noqa: S311
        self.scenario: Scenario = replace(
            draw(self._rng, num_requests), is_pipelined=seed % 2 == 1, raises_late=seed % 4 == 1
        )
        self.history = History(self._loop.time, is_told=is_told)
        self._bus = BadBus(self._rng, self.scenario)
        self.broker = MemoryBroker(faults=self._bus)
        self.broker.on_publish = self.history.take
        model = FakeModel(windows=self.scenario.windows)
        self.clients = draw_clients(self._rng, self.scenario, model)
        self._by_name = {client.name: client for client in self.clients}
        self.processes = Processes(
            self.broker,
            self.scenario,
            model,
            random.Random(self._rng.getrandbits(32)),  # noqa: S311
            fate=self._fate_of,
            on_death=self._die,
            on_exit=self._replace,
            on_gateway=self._welcome,
        )
        self.trouble = Trouble(
            random.Random(self._rng.getrandbits(32)),  # noqa: S311
            self.scenario,
            self.processes,
            self._bus,
            self.broker,
            self.history,
            self._orphan,
        )
        self._tickets: dict[str, Ticket] = {}
        self._taps: list[checks.Tap] = []
        self._violation: ViolationError | None = None
        self.healthy_s = float("inf")
        self.num_moved = 0
        self.num_deaths_of_poison = 0

    # -- processes -------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Every process, the requests and the trouble begin."""
        scenario, loop = self.scenario, self._loop
        for letters, num in (
            ("sched", scenario.num_schedulers),
            ("ex", scenario.num_executors),
            ("gw", scenario.num_gateways),
        ):
            for number in range(num):
                self.processes.start(f"{letters}{number}")
        for client in self.clients:
            client.begin()
            loop.call_at(client.start_s, self._submit, client)

    def _fate_of(self, name: str, step: LaunchedStep) -> StepFate:
        if name in self.trouble.hanging:
            self.trouble.hanging.discard(name)
            return StepFate.HANG
        for row, asked in zip(step.rows, step.inputs, strict=True):
            client = self._by_name[row.start.request_id]
            if asked.is_sampled and asked.choice == 0 and asked.index == client.poison_index:
                self.history.say(f"{name} dies of {client.name}")
                self.num_deaths_of_poison += 1
                return StepFate.DIE
        return StepFate.FINE

    def _die(self, name: str) -> None:
        """From within a process, whose context must not be that of what follows."""
        self._loop.call_soon(lambda: self.trouble.kill(name, is_own_fault=True), context=checks.NOBODY.copy())

    def _replace(self, process: Process) -> None:
        self.trouble.replace(process)

    # -- requests --------------------------------------------------------------------------------------------

    def _submit(self, client: Client) -> None:
        """Ask through any gateway; where there is none, try again soon."""
        if not client.is_open or client.asked_term == client.term:
            return
        gateways = [
            process
            for name in self.processes.names("gw")
            if (process := self.processes.live[name]).requester is not None
            and not process.stop.is_set()
            and not process.owner.is_stopped
        ]
        if not gateways:
            self._loop.call_later(0.2, self._submit, client)
            return
        process = self._rng.choice(gateways)
        term = client.asked_term = client.term
        client.gateway = process.name
        now_s = self._loop.time()
        if term == 0:
            client.deadline_s = now_s + client.spec.timeout_s
        spec = checks.spec_of_term(client, max(0.001, client.deadline_s - now_s))
        process.context.run(self._ask, client, term, process, spec)
        if client.manner is Manner.CANCELS and term == 0:
            self._loop.call_later(client.patience_s, self._cancel, client)

    def _ask(self, client: Client, term: int, process: Process, spec: checks.RequestSpec) -> None:
        requester = process.requester
        if requester is None:
            return
        requester.release(client.name)  # of an earlier term
        self._tickets[client.name] = requester.submit(spec, lambda event: self._take(client, term, event))

    def _welcome(self, process: Process) -> None:
        tap = checks.tap_rows(self.broker, process)
        if tap is not None:
            self._taps.append(tap)
        if process.requester is not None:
            process.requester.on_doubt = lambda request_id: self._doubt(process, request_id)

    def _doubt(self, process: Process, request_id: str) -> None:
        """As stored streams do: who finds that another one owns the request lets go of it."""
        if process.requester is not None and self._by_name[request_id].gateway != process.name:
            process.requester.release(request_id)

    def _take(self, client: Client, term: int, event: Event) -> None:
        if term != client.term:
            return  # its owner does not know yet that it is none
        try:
            failure = client.take(event, self._loop.time())
            if failure is not None:
                self._judge(client, failure)
        except ViolationError as violation:
            self._violation = self._violation or violation
            return
        is_due = client.manner is Manner.ENDS_CHOICE and len(client.received[0]) >= client.end_at
        if is_due and client.ended_s is None and client.finishes[0] is None:
            self._loop.call_soon(self._end_choice, client, term)

    def _end_choice(self, client: Client, term: int) -> None:
        if client.is_open and client.term == term and client.finishes[0] is None:
            client.finishes[0] = "stop"
            self._tickets[client.name].end_choice(0)
            if all(client.finishes):
                client.ended_s = self._loop.time()

    def _cancel(self, client: Client) -> None:
        process = self.processes.live.get(client.gateway)
        if not client.is_open or process is None or process.owner.is_stopped:
            return
        client.ended_s, client.failure = self._loop.time(), "cancelled"
        process.context.run(self._tickets[client.name].cancel)

    def _judge(self, client: Client, failure: RequestFailed) -> None:
        """A failure must be legitimate in this world."""
        requester_attempt = self._tickets[client.name]._live.state.attempt
        why = checks.is_legitimate(
            client,
            failure,
            attempt=requester_attempt,
            scenario=self.scenario,
            num_executor_faults=self.trouble.num_executor_faults,
            now_s=self._loop.time(),
        )
        if not why:
            raise ViolationError(f"{client.name} failed: {failure.code}: {failure.message}")

    def _orphan(self, gateway: str) -> None:
        """A gateway is gone: half of its clients go on at another one, with what they have."""
        for client in self.clients:
            if client.gateway != gateway or not client.is_open:
                continue
            client.term += 1
            if self._rng.random() < 0.3:
                client.is_orphan = True
                continue
            self.num_moved += 1
            self._loop.call_later(self._rng.uniform(0.0, 2.0), self._submit, client)

    def _move(self) -> None:
        """An owner that stands still may lose a request to another one."""
        for client in self.clients:
            process = self.processes.live.get(client.gateway)
            if client.is_open and process is not None and process.owner.is_stopped:
                client.term += 1
                self.num_moved += 1
                self._loop.call_soon(self._submit, client)

    # -- checks ----------------------------------------------------------------------------------------------

    async def watch(self) -> None:
        """All along."""
        num_looks = 0
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            num_looks += 1
            self.check(is_thorough=num_looks % 4 == 0)
            if num_looks % 40 == 0:
                self._move()

    def check(self, *, is_thorough: bool) -> None:
        """Raises `ViolationError`."""
        if self._violation is not None:
            raise self._violation
        now_s = self._loop.time()
        checks.check_executors(self.processes)
        if self.scenario.is_orderly:
            checks.check_orphans(self.processes, now_s)
        for tap in self._taps:
            if tap.flaw is not None:
                raise ViolationError(tap.flaw)
        if is_thorough:
            self.processes.check()
            checks.check_books(self.processes)
        for client in self.clients:
            if client.is_open and client.gateway and now_s > client.deadline_s + LATE_S:
                process = self.processes.live.get(client.gateway)
                if process is not None and not process.owner.is_stopped and client.term == 0:
                    raise ViolationError(f"{client.name} did not end at its deadline")
        if now_s > self.healthy_s + END_S and any(client.is_open for client in self.clients):
            names = [client.name for client in self.clients if client.is_open]
            left = checks.leftovers(self.processes, self.scenario)
            raise ViolationError(f"{names} did not end in {END_S} s after all was well; {left}")

    async def all_ended(self) -> None:
        """Until every request has ended or was left alone."""
        while any(client.is_open for client in self.clients):  # noqa: ASYNC110 - virtual seconds
            await asyncio.sleep(WATCH_INTERVAL_S)

    async def settled(self) -> None:
        """Nothing is held for anybody any more."""
        end_s = self._loop.time() + IDLE_S
        while left := checks.leftovers(self.processes, self.scenario):
            if self._loop.time() > end_s:
                raise ViolationError(f"held on an idle system: {left}")
            await asyncio.sleep(0.1)

    async def play(self) -> None:
        """The run itself, without the watching."""
        await self.trouble.run()
        await asyncio.sleep(BAD_BUS_S)
        self._bus.heal()
        self.broker.store.is_available = True
        self.broker.store.delay_s = 0.0
        self.history.say("all is well")
        await asyncio.sleep(4.0)  # who stands still or is to be started does so for less
        self.healthy_s = self._loop.time()
        await self.all_ended()
        self.end_s = self._loop.time()
        await self.settled()
        self.idle_s = self._loop.time()
        self.check(is_thorough=True)


async def _run(seed: int, num_requests: int | None, is_told: bool) -> Outcome:
    loop = asyncio.get_running_loop()

    def wall_s() -> float:
        return EPOCH_S + loop.time()

    with (
        mock.patch.object(time, "monotonic", loop.time),
        mock.patch.object(time, "time", wall_s),
    ):
        world = World(seed, num_requests, is_told=is_told)
        if is_told:
            world.history.say(str(world.scenario))
        try:
            world.start()
            watching, playing = _task(world.watch()), _task(world.play())
            done, _ = await asyncio.wait({watching, playing}, return_when=asyncio.FIRST_COMPLETED)
            watching.cancel()
            for each in done:
                each.result()
            return _outcome(seed, world)
        finally:
            world.processes.end_all()


def _outcome(seed: int, world: World) -> Outcome:
    processes = world.processes.live.values()
    faults = world.history.counts
    return Outcome(
        seed=seed,
        num_requests=len(world.clients),
        num_faults=faults.total(),
        num_attempts=world.history.num_attempts,
        num_preemptions=sum(
            process.scheduler.core.figures.num_preemptions for process in processes if process.scheduler
        ),
        num_terms=world.history.num_terms,
        num_moved=world.num_moved,
        end_s=world.end_s - world.healthy_s,
        idle_s=world.idle_s - world.end_s,
        digest=world.history.digest,
        faults=faults,
        ends=Counter(client.ending for client in world.clients),
    )


def run(seed: int, num_requests: int | None = None, *, is_told: bool = False) -> Outcome:
    """One run. Raises `ViolationError`; the same seed raises it again."""
    return virtual_time.run(_run(seed, num_requests, is_told))


def _task(work: Coroutine[object, object, None]) -> asyncio.Task[None]:
    return asyncio.get_running_loop().create_task(work)
