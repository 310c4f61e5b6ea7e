"""The rows that wait, first come first served, and the attempts that must not run again."""

import heapq
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from pagebus.scheduler.requests import Row, RowState

REFUSAL_TIME_S = 300.0
MAX_REFUSALS = 200_000


class WaitingQueue:
    """Rows by arrival. A preempted row comes back ahead of all that arrived after it.

    Rows that ended meanwhile are skipped; `len` counts those that really wait.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[float, int], Row]] = []
        self._num_waiting = 0
        self.num_tokens = 0  # of their prompts

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Row]:
        """All that wait, in no order."""
        return (row for _, row in self._heap if row.state in (RowState.WAITING, RowState.RETURNING))

    def add(self, row: Row) -> None:
        """Put in a row that waits or returns; it must not be in already."""
        heapq.heappush(self._heap, (row.age, row))
        self._num_waiting += 1
        self.num_tokens += row.request.num_prompt

    def forget(self, row: Row) -> None:
        """Count out a row that waited and ended; it is dropped when it is met."""
        self._num_waiting -= 1
        self.num_tokens -= row.request.num_prompt
        if len(self._heap) > 2 * self._num_waiting + 64:
            self._heap = [entry for entry in self._heap if entry[1].state is not RowState.OVER]
            heapq.heapify(self._heap)

    def head(self) -> Row | None:
        """The row that is next, or None."""
        while self._heap and self._heap[0][1].state is RowState.OVER:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def take_head(self) -> Row:
        """Take the row that `head` gave out of the queue."""
        _, row = heapq.heappop(self._heap)
        self._num_waiting -= 1
        self.num_tokens -= row.request.num_prompt
        return row


@dataclass(slots=True)
class _Refused:
    attempt: int
    until_s: float
    choices: set[int] = field(default_factory=set)  # empty: all


class RefusedAttempts:
    """Attempts that ended or were cancelled: they and lower ones are refused for five minutes.

    A cancel of single choices that overtakes its `Generate` is kept here too.
    """

    def __init__(self) -> None:
        self._whole: OrderedDict[str, _Refused] = OrderedDict()
        self._partly: OrderedDict[str, _Refused] = OrderedDict()

    def refuse(self, request_id: str, attempt: int, now_s: float) -> None:
        """Refuse `attempt` and lower ones from now on."""
        old = self._whole.pop(request_id, None)
        highest = max(attempt, old.attempt) if old else attempt
        self._whole[request_id] = _Refused(highest, now_s + REFUSAL_TIME_S)
        self._prune(self._whole, now_s)

    def refuse_choices(self, request_id: str, attempt: int, choices: tuple[int, ...], now_s: float) -> None:
        """Refuse these choices of `attempt` and lower ones from now on."""
        old = self._partly.pop(request_id, None)
        known = old.choices if old and old.attempt == attempt else set()
        self._partly[request_id] = _Refused(attempt, now_s + REFUSAL_TIME_S, known | set(choices))
        self._prune(self._partly, now_s)

    def is_refused(self, request_id: str, attempt: int) -> bool:
        """Whether this attempt must not run."""
        refused = self._whole.get(request_id)
        return refused is not None and attempt <= refused.attempt

    def refused_choices(self, request_id: str, attempt: int) -> set[int]:
        """The choices of this attempt that must not run."""
        refused = self._partly.get(request_id)
        return refused.choices if refused is not None and attempt <= refused.attempt else set()

    def prune(self, now_s: float) -> None:
        """Forget what is over."""
        self._prune(self._whole, now_s)
        self._prune(self._partly, now_s)

    @staticmethod
    def _prune(entries: OrderedDict[str, _Refused], now_s: float) -> None:
        while entries:
            oldest = next(iter(entries))
            if entries[oldest].until_s > now_s and len(entries) <= MAX_REFUSALS:
                return
            del entries[oldest]
