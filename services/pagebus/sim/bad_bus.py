"""What the bus does to single deliveries in a run: seeded loss, copies and delays; cuts between processes."""

import random
from collections.abc import Sequence

from pagebus.bus.faults import SeededFaults
from pagebus.sim.scenario import Scenario


class BadBus:
    """`mute` ones are not heard, `deaf` ones hear nobody; a split parts those in it from all others;
    estranged schedulers do not hear each other."""

    def __init__(self, rng: random.Random, scenario: Scenario) -> None:
        self.mute: set[str] = set()
        self.deaf: set[str] = set()
        self.splits: list[tuple[frozenset[str], bool]] = []  # (who, whether only they are not heard outside)
        self.is_healthy = self.is_estranged = False
        self._single = SeededFaults(
            rng.getrandbits(32),
            loss=scenario.loss,
            duplication=scenario.duplication,
            delay=scenario.delay,
            max_delay_s=scenario.max_delay_s,
        )

    def delays_s(self, subject: str, sender: str, receiver: str) -> Sequence[float]:
        """One delay in seconds for each copy delivered."""
        if sender in self.mute or receiver in self.deaf:
            return ()
        if self.is_estranged and sender.startswith("sched") and receiver.startswith("sched"):
            return ()
        for inside, is_one_way in self.splits:
            if (sender in inside) != (receiver in inside) and (sender in inside or not is_one_way):
                return ()
        return (0.0,) if self.is_healthy else self._single.delays_s(subject, sender, receiver)

    def heal(self) -> None:
        """All is well from now on."""
        self.is_healthy, self.is_estranged = True, False
        self.mute.clear()
        self.deaf.clear()
        self.splits.clear()
