"""When new ids are told: at once, or together with what comes while the event loop is behind.

Knows the loop and requests' states, nothing of who listens.
"""

import asyncio
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

MOST_S = 0.02
"""So long at most ids wait for more of them while messages keep coming."""


class Gathered(Protocol):
    """A request whose ids are told."""

    is_gathered: bool


_Request = TypeVar("_Request", bound=Gathered)


class Gathering(Generic[_Request]):
    """The requests of one process that have ids to tell.

    With `interval` 0 ids are told when a turn of the loop has brought no further message, `MOST_S` after
    the first of them at the latest: an idle process waits for nothing, a busy one tells several ids at once.
    1: at once. More: as with 0, but only so many ids of a choice, or its end; its first ids wait for no
    others.
    """

    def __init__(self, interval: int, tell: Callable[[_Request, int], None]) -> None:
        """`tell(request, at_least)` tells the news of every choice that has at least so many ids of it."""
        self.is_on = interval != 1
        self._interval = interval
        self._tell = tell
        self._waiting: list[_Request] = []
        self._num_taken = 0
        self._num_seen = 0
        self._tell_by_s = 0.0
        self._turn: asyncio.Handle | None = None

    def add(self, request: _Request) -> None:
        """The request has news, and `is_on`."""
        self._num_taken += 1
        if not request.is_gathered:
            request.is_gathered = True
            self._waiting.append(request)
            if self._turn is None:
                loop = asyncio.get_running_loop()
                self._tell_by_s = loop.time() + MOST_S
                self._num_seen = self._num_taken
                self._turn = loop.call_soon(self._on_turn, loop)

    def close(self) -> None:
        """Nothing is told any more."""
        if self._turn is not None:
            self._turn.cancel()

    def _on_turn(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._num_taken != self._num_seen and loop.time() < self._tell_by_s:
            self._num_seen = self._num_taken
            self._turn = loop.call_soon(self._on_turn, loop)
            return
        self._turn = None
        waiting, self._waiting = self._waiting, []
        for request in waiting:
            request.is_gathered = False
            self._tell(request, self._interval or 1)
