"""How long to wait before a process is started again. No clock, no process."""

_FIRST_S = 0.2
_MOST_S = 10.0
_WELL_AFTER_S = 30.0


class Backoff:
    """0.2 s after the first end, twice as much after each next one, 10 s at most.

    A process that lived for 30 s was well: it starts over at 0.2 s.
    """

    def __init__(self) -> None:
        self._next_s = _FIRST_S
        self.num_failures = 0  # in a row

    def after(self, alive_s: float) -> float:
        """Seconds to wait after a process ended that had lived for `alive_s`."""
        if alive_s >= _WELL_AFTER_S:
            self._next_s, self.num_failures = _FIRST_S, 0
        wait_s = self._next_s
        self._next_s = min(2 * wait_s, _MOST_S)
        self.num_failures += 1
        return wait_s
