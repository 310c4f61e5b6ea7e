"""Seeded faults for the memory bus: one seed, one sequence of losses, copies and delays, so a run replays."""

import random
from collections.abc import Callable, Sequence


def _spare_nothing(subject: str) -> bool:
    return False


class SeededFaults:
    """Loses, doubles and delays single deliveries; delays of different lengths reorder.

    `loss`, `duplication` and `delay` are probabilities for one delivery; a delayed copy waits up to
    `max_delay_s`. Subjects for which `spare` says true are delivered as on a healthy bus.
    """

    def __init__(
        self,
        seed: int,
        *,
        loss: float = 0.0,
        duplication: float = 0.0,
        delay: float = 0.0,
        max_delay_s: float = 0.1,
        spare: Callable[[str], bool] = _spare_nothing,
    ) -> None:
        for name, probability in (("loss", loss), ("duplication", duplication), ("delay", delay)):
            if not 0.0 <= probability <= 1.0:
                raise ValueError(f"{name} is a probability, not {probability}")
        self._random = random.Random(seed)  # noqa: S311
        self._loss = loss
        self._duplication = duplication
        self._delay = delay
        self._max_delay_s = max_delay_s
        self._spare = spare

    def delays_s(self, subject: str, sender: str, receiver: str) -> Sequence[float]:
        """One delay in seconds for each copy of this delivery; none: it is lost."""
        if self._spare(subject):
            return (0.0,)
        is_lost = self._random.random() < self._loss
        num_copies = 1 + (self._random.random() < self._duplication)
        delays = tuple(self._one_delay() for _ in range(num_copies))
        return () if is_lost else delays

    def _one_delay(self) -> float:
        is_delayed = self._random.random() < self._delay
        length = self._random.random() * self._max_delay_s
        return length if is_delayed else 0.0
