"""Which requesters are gone, judged from the answers to probes of their life subjects. Knows no bus."""

import enum
from collections.abc import Set
from dataclasses import dataclass

MAX_SILENCE_S = 10.0
MAX_NO_RESPONDERS = 2


class Answer(enum.Enum):
    """What one probe brought."""

    ALIVE = "alive"
    NO_RESPONDERS = "no responders"
    SILENCE = "silence"  # somebody subscribes, nobody answered in time
    UNKNOWN = "unknown"  # the bus was not connected: says nothing about the requester


@dataclass(slots=True)
class _Record:
    answered_at_s: float
    num_no_responders: int = 0


class Probes:
    """One record a life subject. "No responders" twice in a row, or 10 s without an answer, means gone."""

    def __init__(self) -> None:
        self._records: dict[str, _Record] = {}

    def note(self, life: str, answer: Answer, now_s: float) -> bool:
        """Note a probe's outcome; True when the requester is gone."""
        record = self._records.setdefault(life, _Record(now_s))
        if answer is Answer.NO_RESPONDERS:
            record.num_no_responders += 1
            return record.num_no_responders >= MAX_NO_RESPONDERS
        record.num_no_responders = 0
        if answer is Answer.SILENCE:
            return now_s - record.answered_at_s >= MAX_SILENCE_S
        record.answered_at_s = now_s
        return False

    def keep_only(self, lives: Set[str]) -> None:
        """Forget life subjects that no row names any more."""
        self._records = {life: record for life, record in self._records.items() if life in lives}
