"""How long a requester waits for what before it asks again. Values only."""

from dataclasses import dataclass

NEVER = float("inf")


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Bounds past which a request may be lost, in seconds."""

    acknowledged_s: float = 1.0  # sent, and no sign; doubles up to `max_backoff_s` while nothing is heard
    silence_s: float = 20.0  # acknowledged, and no further sign (the scheduler gives one every 15 s)
    progress_s: float = 120.0  # said to be running, and no token; doubles at each time it was asked again
    min_backoff_s: float = 0.05  # after a retryable failure; doubles up to
    max_backoff_s: float = 2.0
    jitter_s: float = 0.1  # spread of what all requesters would do at the same moment
