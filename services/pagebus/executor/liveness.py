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
    named_at_s: float
    num_no_responders: int = 0


class Probes:
    """One record a life subject. "No responders" twice in a row, or 10 s without an answer, means gone."""

    def __init__(self) -> None:
        self._records: dict[str, _Record] = {}
        self._named: frozenset[str] = frozenset()

    def note(self, life: str, answer: Answer, now_s: float) -> bool:
        """Note a probe's outcome; True when the requester is gone."""
        record = self._records.setdefault(life, _Record(now_s, now_s))
        if answer is Answer.NO_RESPONDERS:
            record.num_no_responders += 1
            return record.num_no_responders >= MAX_NO_RESPONDERS
        record.num_no_responders = 0
        if answer is Answer.SILENCE:
            return now_s - record.answered_at_s >= MAX_SILENCE_S
        record.answered_at_s = now_s
        return False

    def keep_only(self, lives: Set[str], now_s: float) -> None:
        """Forget life subjects that no row has named for 10 s: until then rows of theirs may yet come."""
        for life in lives & self._records.keys():
            record = self._records[life]
            if life not in self._named:
                record.answered_at_s = now_s  # it was not asked meanwhile
            record.named_at_s = now_s
        self._named = frozenset(lives)
        self._records = {
            life: record
            for life, record in self._records.items()
            if now_s - record.named_at_s < MAX_SILENCE_S
        }
