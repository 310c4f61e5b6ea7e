"""Refuses at once what would be refused anyway: for a moment after the scheduler said that its queue is full.

A flood then costs neither tokens' making nor messages. It knows the scheduler's word only by its code.
"""

import time
from collections import OrderedDict
from collections.abc import Callable

from pagebus.gateway.errors import from_failure
from pagebus.requester.events import RequestFailed

QUEUE_FULL = "queue_full"
SHED_S = 0.1
"""How long one refusal speaks for others: short enough that no queue runs empty meanwhile."""
_MAX_TENANTS = 4096


class Shedding:
    """The newest refusals, by tenant: a scheduler that turns one away may still take another's."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._refused: OrderedDict[str, tuple[float, RequestFailed]] = OrderedDict()

    def note(self, tenant: str, failure: RequestFailed) -> None:
        """A tenant's request failed; only one that found the queue full matters."""
        if failure.code != QUEUE_FULL:
            return
        self._refused[tenant] = (self._clock() + SHED_S, failure)
        self._refused.move_to_end(tenant)
        if len(self._refused) > _MAX_TENANTS:
            self._refused.popitem(last=False)

    def check(self, tenant: str) -> None:
        """Raises the `ApiError` of the tenant's refusal of a moment ago."""
        refused = self._refused.get(tenant)
        if refused is None:
            return
        until_s, failure = refused
        if self._clock() < until_s:
            raise from_failure(failure)
        del self._refused[tenant]
