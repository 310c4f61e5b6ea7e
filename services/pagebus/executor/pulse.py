"""Whether a forward pass gets on: a counter that every part of it (a layer) advances. Knows no model.

One thread writes (the one that runs steps), another one reads.
"""

import time

_FORGETTING = 0.999  # what is left of an old slowest part with each newer one
_LONGEST_S = 2.0
"""A part that took longer counts as this: steps are made for a second or so, and a process that was stopped
in one is not to be waited for five times as long when it hangs."""


class Pulse:
    """Advanced by whoever computes. `is_busy`: a step is being computed now."""

    __slots__ = ("_beat_s", "count", "is_busy", "is_compiling", "slowest_s")

    def __init__(self) -> None:
        self.count = 0
        self.is_busy = False
        self.is_compiling = False  # no progress for a good reason
        self.slowest_s = 0.0  # seconds that one part takes at most, as far as it was seen
        self._beat_s = 0.0

    def begin(self) -> None:
        """A step begins."""
        self._beat_s = time.monotonic()
        self.is_busy = True

    def beat(self) -> None:
        """A part of the step is done."""
        now_s = time.monotonic()
        part_s = min(now_s - self._beat_s, _LONGEST_S)
        self.slowest_s = max(part_s, self.slowest_s * _FORGETTING)
        self._beat_s = now_s
        self.count += 1

    def tell_compiling(self, is_compiling: bool) -> None:
        """The model begins to compile something in the middle of a step, or is done with it."""
        self.is_compiling = is_compiling
        self._beat_s = time.monotonic()  # its time says nothing about the parts'

    def end(self) -> None:
        """The step is over, however it ended."""
        self.beat()
        self.is_busy = self.is_compiling = False
