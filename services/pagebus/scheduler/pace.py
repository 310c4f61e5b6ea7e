"""How long an executor's steps take, from its own reports."""

_SMOOTHING = 0.2  # weight of the newest step
_MIN_PROMPT_TOKENS = 64


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


def _smoothed(mean: float, value: float) -> float:
    return value if mean == 0.0 else mean + _SMOOTHING * (value - mean)
