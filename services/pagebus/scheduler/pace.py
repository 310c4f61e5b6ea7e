"""How long an executor's steps take, from its own reports."""

_SMOOTHING = 0.2  # weight of the newest step
_MIN_PROMPT_TOKENS = 64
MAX_CHUNK_S = 1.0
MIN_CHUNK_TOKENS = 64
FIRST_CHUNK_TOKENS = 256
"""A step's prompt tokens until it is known how long they take: few enough that no layer takes seconds."""


class Pace:
    """Smoothed seconds: of a step in which rows only decode, and of a prompt's token; 0 while unknown."""

    def __init__(self) -> None:
        self.step_s = 0.0
        self.prefill_s = 0.0

    def note(self, num_tokens: int, num_rows: int, duration_s: float) -> None:
        """A step of `num_rows` rows computed `num_tokens` positions."""
        if duration_s <= 0.0 or num_rows == 0:
            return
        if num_tokens <= num_rows:
            self.step_s = _smoothed(self.step_s, duration_s)
        elif num_tokens > num_rows + _MIN_PROMPT_TOKENS:
            self.prefill_s = _smoothed(self.prefill_s, duration_s / num_tokens)

    def num_step_tokens(self, num_rows: int) -> int:
        """How many positions a step may compute where `num_rows` decode, so that it takes about a second."""
        if self.prefill_s == 0.0:
            return FIRST_CHUNK_TOKENS + num_rows
        return max(MIN_CHUNK_TOKENS + num_rows, int(MAX_CHUNK_S / self.prefill_s))


def _smoothed(mean: float, value: float) -> float:
    return value if mean == 0.0 else mean + _SMOOTHING * (value - mean)
