"""Requests whose executor died, perhaps of them: they come back one at a time, so that a culprit is found."""

import heapq

from pagebus.scheduler.requests import Request

MAX_DEATHS = 2
"""What killed so many executors while it was their only suspect is poison."""


class SuspectQueue:
    """Suspects whose turn has not come: those with fewer deaths first, then by rank."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, tuple[int, float, int], Request]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, request: Request) -> None:
        """Hold a request back; it has rows."""
        request.is_held_back = True
        heapq.heappush(self._heap, (request.num_deaths, request.rows[0].rank, request))

    def take(self) -> Request | None:
        """The next one that has not ended meanwhile, or None."""
        while self._heap:
            _, _, request = heapq.heappop(self._heap)
            request.is_held_back = False
            if request.rows:
                return request
        return None
