"""What kind of world a seed gives: its size, how bad its bus is, and which faults strike. Pure."""

import random
from dataclasses import dataclass

TROUBLES = (
    "kill", "stop", "drop", "mute", "deafen", "split", "terminate", "hang", "crash",
    "store away", "store slow", "store wiped", "no schedulers", "no executors", "estranged",
)  # fmt: skip
"""`Trouble` says what each one does."""
_DISORDER = frozenset(("drop", "stop", "mute", "deafen", "split", "hang"))
_FEW = 5


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One world. Times are virtual seconds; probabilities are for one delivery."""

    num_requests: int
    num_executors: int
    num_schedulers: int
    num_gateways: int
    troubles: tuple[str, ...]
    interval_s: float  # between two faults, on average
    trouble_s: float  # faults strike so long; later the bus alone is bad for a while, and then all is well
    loss: float
    duplication: float
    delay: float
    max_delay_s: float
    step_s: float
    num_blocks: int
    windows: tuple[int | None, ...]
    horizon: int
    max_num_batched_tokens: int
    max_num_seqs: int
    max_num_queued_reqs: int
    max_tokens: int  # the most that a request asks for
    num_poison: int  # requests that kill their executor
    num_raising: int  # requests whose step raises
    share_impatient: float  # requests that are cancelled, or have a short deadline
    is_pipelined: bool = False  # executors launch a step before they have collected the one before
    raises_late: bool = True  # ... where a step that raises does so when it is collected, not when launched

    @property
    def is_orderly(self) -> bool:
        """Whether what is said is heard, and who lives gets on."""
        return self.loss == 0 and _DISORDER.isdisjoint(self.troubles)


def draw(rng: random.Random, num_requests: int | None = None) -> Scenario:
    """Most worlds are small and bad; one in ten is large. Each has few kinds of faults: where all strike at
    once, none gets far."""
    is_large = num_requests is None and rng.random() < 0.1
    num = num_requests or (rng.randint(15, 30) if is_large else rng.randint(4, 9))
    is_orderly = rng.random() < 0.25
    possible = [kind for kind in TROUBLES if not (is_orderly and kind in _DISORDER)]
    kinds = rng.sample(possible, rng.randint(1, _FEW))
    return Scenario(
        num_requests=num,
        num_executors=rng.choice((1, 2, 2, 3)),
        num_schedulers=rng.choice((1, 2, 2)),
        num_gateways=rng.choice((1, 2)),
        troubles=tuple(sorted(kinds)),
        interval_s=rng.choice((0.3, 0.6, 1.2)),
        trouble_s=rng.uniform(4.0, 10.0) if is_large else rng.uniform(1.5, 4.0),
        loss=rng.choice((0.0, 0.0) if is_orderly else (0.0, 0.01, 0.05, 0.15)),
        duplication=rng.choice((0.0, 0.05, 0.2)),
        delay=rng.choice((0.0, 0.1, 0.5)),
        max_delay_s=rng.choice((0.01, 0.2)),
        step_s=rng.choice((0.004, 0.02, 0.05)),
        num_blocks=rng.choice((14, 20, 40, 96)),
        windows=rng.choice(((None,), (None,), (None, 40))),
        horizon=rng.choice((0, 1, 3, 8)),
        max_num_batched_tokens=rng.choice((16, 64, 256)),
        max_num_seqs=rng.choice((2, 8, 64)),
        max_num_queued_reqs=rng.choice((3, 4096, 4096, 4096)),
        max_tokens=rng.choice((20, 50, 100)),
        num_poison=rng.choice((0, 0, 0, 0, 1)),
        num_raising=rng.choice((0, 0, 0, 1, 2)),
        share_impatient=rng.choice((0.0, 0.3, 0.6)),
    )
