"""One timer of the event loop for all requests of a process: a heap with an entry a request, put back where
it became due later.

Knows when a request is due, not what is done then.
"""

import asyncio
import heapq
import itertools
from collections.abc import Callable, Mapping
from typing import Generic, Protocol, TypeVar

from pagebus.requester.state import RequestState
from pagebus.requester.timing import NEVER

_LATE_S = 0.001


class Timed(Protocol):
    """A request. `timer_s`: its newest entry's time."""

    timer_s: float

    @property
    def state(self) -> RequestState:
        """Says when it is due."""


_Request = TypeVar("_Request", bound=Timed)


class Timers(Generic[_Request]):
    """`act(request, now_s)` is called when a request of `live` (by id) is due; what ended is not held."""

    def __init__(self, live: Mapping[str, _Request], act: Callable[[_Request, float], None]) -> None:
        self._live = live
        self._act = act
        self._heap: list[tuple[float, int, str]] = []
        self._order = itertools.count()
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False

    def watch(self, request: _Request, request_id: str) -> None:
        """Something happened to the request: it may be due earlier."""
        due_s = request.state.due_s
        if due_s >= request.timer_s:
            return
        request.timer_s = due_s
        entry = (due_s, next(self._order), request_id)
        heapq.heappush(self._heap, entry)
        if self._heap[0] is entry:
            self._set(0.0)

    def close(self) -> None:
        """Nobody is due any more."""
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()

    def _set(self, late_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._heap and self._heap[0][2] not in self._live:  # it ended
            heapq.heappop(self._heap)
        if self._heap and not self._is_closed:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(self._heap[0][0] + late_s, self._on_timer, loop)

    def _on_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        now_s = loop.time()
        # uvloop counts whole milliseconds and may be early: set again for the same time it would be so again,
        # and again, until that has come.
        late_s = _LATE_S if self._heap and self._heap[0][0] > now_s else 0.0
        while self._heap and self._heap[0][0] <= now_s:
            due_s, _, request_id = heapq.heappop(self._heap)
            request = self._live.get(request_id)
            if request is None or due_s != request.timer_s or request.state.has_ended:
                continue  # it ended, or an earlier entry replaced this one
            request.timer_s = NEVER
            if request.state.due_s <= now_s:
                self._act(request, now_s)
            self.watch(request, request_id)
        self._set(late_s)
