"""The faults of a run: at random times, of the kinds that the scenario names, each over after a while."""

import asyncio
import random
from collections.abc import Callable

from pagebus.bus.memory import MemoryBroker
from pagebus.sim.bad_bus import BadBus
from pagebus.sim.history import History
from pagebus.sim.processes import Process, Processes
from pagebus.sim.scenario import Scenario


class Trouble:
    """`on_gateway_death` is told who owns requests no more."""

    def __init__(
        self,
        rng: random.Random,
        scenario: Scenario,
        processes: Processes,
        bus: BadBus,
        broker: MemoryBroker,
        history: History,
        on_gateway_death: Callable[[str], None],
    ) -> None:
        self.num_executor_faults = 0
        self.hanging: set[str] = set()  # executors whose next step never ends
        self.is_over = False
        self._rng = rng
        self._scenario = scenario
        self._processes = processes
        self._bus = bus
        self._broker = broker
        self._history = history
        self._on_gateway_death = on_gateway_death
        self._num_started = 0
        self._strikes: dict[str, Callable[[], None]] = {
            "kill": lambda: self.kill(self._pick()),
            "stop": self._stop,
            "drop": self._drop,
            "mute": lambda: self._set_apart(self._bus.mute),
            "deafen": lambda: self._set_apart(self._bus.deaf),
            "split": self._split,
            "terminate": self._terminate,
            "hang": self._hang,
            "crash": self._crash,
            "store away": self._store_away,
            "store slow": self._store_slow,
            "store wiped": self._broker.store.wipe,
            "no schedulers": lambda: self._kill_all("sched"),
            "estranged": self._estrange,
            "no executors": lambda: self._kill_all("ex"),
        }

    async def run(self) -> None:
        """Strike until time is up; every fault is over then, or soon."""
        loop = asyncio.get_running_loop()
        end_s = loop.time() + self._scenario.trouble_s
        while loop.time() < end_s:
            await asyncio.sleep(self._rng.expovariate(1.0 / self._scenario.interval_s))
            kind = self._rng.choice(self._scenario.troubles)
            self._history.counts[kind] += 1
            self._strikes[kind]()
        self.is_over = True

    def _pick(self, letters: str = "") -> str:
        return self._rng.choice(self._processes.names(letters) or [""])

    def _later(self, callback: Callable[[], None], most_s: float = 3.0) -> None:
        asyncio.get_running_loop().call_later(self._rng.uniform(0.05, most_s), callback)

    def _note(self, name: str, what: str) -> None:
        self.num_executor_faults += name.startswith("ex")
        self._history.say(f"{name} {what}")

    # -- processes -------------------------------------------------------------------------------------------

    def kill(self, name: str, *, is_own_fault: bool = False) -> None:
        """SIGKILL, and a new one after a while."""
        if name not in self._processes.live:
            return
        self._note("" if is_own_fault else name, f"{name} is killed")
        process = self._processes.kill(name)
        self.hanging.discard(name)
        self._replace_later(process)

    def replace(self, process: Process) -> None:
        """One ended by itself."""
        self._history.say(f"{process.name} has ended")
        self._replace_later(process)

    def _replace_later(self, process: Process) -> None:
        name = process.name
        if process.is_gateway:
            self._on_gateway_death(name)
            self._num_started += 1
            name = f"{name.partition('-')[0]}-{self._num_started}"
        self._later(lambda: self._start(name))

    def _start(self, name: str) -> None:
        if name not in self._processes.live:
            self._history.say(f"{name} starts")
            self._processes.start(name)

    def _kill_all(self, letters: str) -> None:
        for name in self._processes.names(letters):
            self.kill(name)

    def _terminate(self) -> None:
        name = self._pick()
        if name and not self._processes.live[name].owner.is_stopped:
            self._note(name, f"{name} is asked to end")
            self._processes.live[name].stop.set()

    def _stop(self) -> None:
        name = self._pick()
        process = self._processes.live.get(name)
        if process is None or process.owner.is_stopped:
            return
        self._note(name, f"{name} is stopped")
        process.owner.is_stopped = True
        is_cut = self._rng.random() < 0.3  # by the server, which sees a slow consumer

        def go_on() -> None:
            if self._processes.live.get(name) is not process:
                return
            self._history.say(f"{name} goes on")
            if is_cut:
                process.bus.disconnect()
            process.owner.go_on()
            if is_cut:
                process.bus.reconnect()

        self._later(go_on, 6.0)

    def _hang(self) -> None:
        name = self._pick("ex")
        if name:
            self._note(name, f"{name} hangs at its next step")
            self.hanging.add(name)

    def _crash(self) -> None:
        name = self._pick("ex")
        runner = self._processes.live[name].runner if name else None
        if runner is not None:
            self._note(name, f"{name} runs out of memory at its next step")
            runner.is_crashing = True

    # -- the bus ---------------------------------------------------------------------------------------------

    def _drop(self) -> None:
        name = self._pick()
        process = self._processes.live.get(name)
        if process is None:
            return
        self._note(name, f"{name} loses its connection")
        process.bus.disconnect()

        def heal() -> None:
            if self._processes.live.get(name) is process:
                self._history.say(f"{name} is connected again")
                process.bus.reconnect()

        self._later(heal)

    def _set_apart(self, names: set[str]) -> None:
        name = self._pick()
        self._note(name, f"{name} is {'not heard' if names is self._bus.mute else 'deaf'}")
        names.add(name)
        self._later(lambda: names.discard(name))

    def _split(self) -> None:
        names = self._processes.names()
        inside = frozenset(self._rng.sample(names, self._rng.randint(0, len(names))))
        split = (inside, self._rng.random() < 0.3)
        self.num_executor_faults += 1
        self._history.say(f"split: {sorted(inside)} and the rest{', one way' if split[1] else ''}")
        self._bus.splits.append(split)
        self._later(lambda: self._bus.splits.remove(split) if split in self._bus.splits else None)

    def _estrange(self) -> None:
        """Schedulers see no sign of each other: when the store is back, two may lead for a moment."""
        self._history.say("schedulers see no sign of each other")
        store, loop, deaf = self._broker.store, asyncio.get_running_loop(), self._pick("sched")
        self._bus.is_estranged, store.is_available = True, False

        def find_store() -> None:
            store.is_available = True
            self._bus.deaf.add(deaf)  # if it led until now: what it still plans is stale
            loop.call_later(1.0, find_each_other)

        def find_each_other() -> None:
            self._bus.deaf.discard(deaf)
            self._bus.is_estranged = False

        loop.call_later(self._rng.uniform(2.0, 3.5), find_store)

    def _store_away(self) -> None:
        self._history.say("the store is away")
        store = self._broker.store
        store.is_available = False

        def heal() -> None:
            store.is_available = True

        self._later(heal, 5.0)

    def _store_slow(self) -> None:
        self._history.say("the store is slow")
        store = self._broker.store
        store.delay_s = self._rng.choice((0.05, 0.3, 1.0))

        def heal() -> None:
            store.delay_s = 0.0

        self._later(heal, 5.0)
