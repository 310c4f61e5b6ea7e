"""Finds stop strings in a text that comes in parts, and knows how much of its end may be the beginning of
one.

One automaton a stop string (Knuth, Morris and Pratt, 1977): each character is looked at once or twice,
whatever the text; its state is the number of characters at the end of the text that begin the stop string.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StopMatch:
    """A stop string that a text completes: it ends before character `end` of the text that was scanned."""

    stop: str
    end: int


class StopStrings:
    """Some stop strings. The states of a text are kept by the caller: `initial`, then what `scan` returns."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises ValueError for an empty stop string, which every text would complete."""
        if any(not stop for stop in stops):
            raise ValueError("a stop string must not be empty")
        # The longest first: of two that end at the same place it began first.
        self._stops = sorted(dict.fromkeys(stops), key=len, reverse=True)
        self._failures = [_failure_function(stop) for stop in self._stops]
        self.initial: tuple[int, ...] = (0,) * len(self._stops)

    def __bool__(self) -> bool:
        return bool(self._stops)

    def scan(
        self, text: str, states: tuple[int, ...], is_armed: bool = True
    ) -> tuple[tuple[int, ...], StopMatch | None]:
        """States after `text`, and the match that is completed first; unarmed, matches are passed over."""
        best: StopMatch | None = None
        after: list[int] = []
        for stop, failure, state in zip(self._stops, self._failures, states, strict=True):
            limit = len(text) if best is None else best.end - 1
            reached, end = _advance(stop, failure, state, text, limit, is_armed)
            after.append(reached)
            if end is not None:
                best = StopMatch(stop, end)
        return tuple(after), best


def _failure_function(stop: str) -> list[int]:
    """For each length n: the longest proper prefix of stop[:n] that is also its suffix."""
    failure = [0] * (len(stop) + 1)
    state = 0
    for n in range(1, len(stop)):
        while state and stop[state] != stop[n]:
            state = failure[state]
        if stop[state] == stop[n]:
            state += 1
        failure[n + 1] = state
    return failure


def _advance(
    stop: str, failure: list[int], state: int, text: str, limit: int, is_armed: bool
) -> tuple[int, int | None]:
    """The state after text[:limit], or the place where the stop string is complete."""
    position = 0
    while position < limit:
        if not state:
            position = text.find(stop[0], position, limit)
            if position < 0:
                return 0, None
        character = text[position]
        position += 1
        while state and stop[state] != character:
            state = failure[state]
        if stop[state] == character:
            state += 1
        if state == len(stop):
            if is_armed:
                return state, position
            state = failure[state]
    return state, None
