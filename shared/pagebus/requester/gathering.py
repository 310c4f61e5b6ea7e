"""When new ids are told: at once, or together with what comes while the event loop is behind.

Knows the loop and requests' states, nothing of who listens.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

MOST_A_TURN = 64
"""So many requests are told their news in one turn of the loop; then it takes what has come meanwhile. About
a millisecond's work, and the rows of one executor's step."""


class Gathered(Protocol):
    """A request whose ids are told."""

    is_gathered: bool


_Request = TypeVar("_Request", bound=Gathered)


class Gathering(Generic[_Request]):
    """The requests of one process that have ids to tell, in the order in which they came.

    With `interval` 0 ids are told in the next turn of the loop, `MOST_A_TURN` requests in each: whoever is at
    the front gets all that has come for it by then. So nothing waits while the loop keeps up, and the further
    it is behind, the more ids are told at once. 1: at once. More: as with 0, but only so many ids of a
    choice, or its end; its first ids wait for no others.
    """

    def __init__(self, interval: int, tell: Callable[[_Request, int], None]) -> None:
        """`tell(request, at_least)` tells the news of every choice that has at least so many ids of it."""
        self.is_on = interval != 1
        self._at_least = interval or 1
        self._tell = tell
        self._waiting: deque[_Request] = deque()
        self._turn: asyncio.Handle | None = None

    def add(self, request: _Request) -> None:
        """The request has news, and `is_on`."""
        if not request.is_gathered:
            request.is_gathered = True
            self._waiting.append(request)
            if self._turn is None:
                loop = asyncio.get_running_loop()
                self._turn = loop.call_soon(self._on_turn, loop)

    def close(self) -> None:
        """Nothing is told any more."""
        if self._turn is not None:
            self._turn.cancel()

    def _on_turn(self, loop: asyncio.AbstractEventLoop) -> None:
        waiting, tell, at_least = self._waiting, self._tell, self._at_least
        try:
            for _ in range(min(MOST_A_TURN, len(waiting))):
                request = waiting.popleft()
                request.is_gathered = False
                tell(request, at_least)
        finally:
            self._turn = loop.call_soon(self._on_turn, loop) if waiting else None
