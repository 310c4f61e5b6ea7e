"""How long a requester waits for what before it asks again. Pure."""

from dataclasses import dataclass

NEVER = float("inf")


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Bounds past which a request may be lost, in seconds."""

    acknowledged_s: float = 0.5  # sent, and no sign; doubles up to `max_backoff_s` while nothing is heard
    silence_s: float = 20.0  # acknowledged, and no further sign (the scheduler gives one every 15 s)
    progress_s: float = 120.0  # said to be running, and no token; doubles at each time it was asked again
    min_backoff_s: float = 0.05  # after a retryable failure; doubles up to
    max_backoff_s: float = 2.0
    jitter_s: float = 0.1  # spread of what all requesters would do at the same moment

    def doubled(self, first_s: float, num_attempts: int) -> float:
        """`first_s` doubled at each attempt after the first one since the last token."""
        return first_s * (1 << min(max(num_attempts - 1, 0), 16))

    def backed_off(self, first_s: float, num_attempts: int) -> float:
        """The same, up to the bound."""
        return min(self.doubled(first_s, num_attempts), max(first_s, self.max_backoff_s))
