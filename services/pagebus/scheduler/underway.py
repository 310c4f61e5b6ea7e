"""What the scheduler has sent to an executor and not heard back of."""

from dataclasses import dataclass
from typing import NamedTuple

from pagebus.bus.messages import Plan
from pagebus.scheduler.requests import Row


@dataclass(slots=True)
class SentPlan:
    """A plan that the executor has not acknowledged."""

    plan: Plan
    sent_s: float


class Returning(NamedTuple):
    """A row that left; its slot and blocks are free once the executor has taken the plan `sequence`."""

    sequence: int
    row: Row
