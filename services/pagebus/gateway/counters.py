"""What the gateway counts about requests, in plain numbers: cheap to change for every token.

It knows neither HTTP nor how the numbers are shown (`metrics.py`).
"""

from bisect import bisect_left
from collections.abc import Sequence

_FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_BETWEEN_TOKENS_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_WHOLE_REQUEST_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
)  # fmt: skip
_NUM_TOKENS = tuple(float(1 << power) for power in range(21))

FINISHED_REASONS = ("stop", "length", "abort", "error")


class Distribution:
    """A histogram: `counts[i]` values at most `bounds[i]`, the last one what is above all bounds."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count `value`, `times` times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times


class Counters:
    """Everything counted since the process started."""

    def __init__(self) -> None:
        self.num_prompt_tokens = 0
        self.num_generated_tokens = 0
        self.finished = dict.fromkeys(FINISHED_REASONS, 0)  # choices, by reason
        self.first_token_s = Distribution(_FIRST_TOKEN_S)
        self.between_tokens_s = Distribution(_BETWEEN_TOKENS_S)
        self.per_output_token_s = Distribution(_BETWEEN_TOKENS_S)
        self.whole_request_s = Distribution(_WHOLE_REQUEST_S)
        self.prompt_lengths = Distribution(_NUM_TOKENS)
        self.generation_lengths = Distribution(_NUM_TOKENS)
