"""The rows that wait and whose turn it is, and the attempts that must not run again."""

import heapq
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from pagebus.scheduler.fairness import VirtualCounters
from pagebus.scheduler.requests import Row

REFUSAL_TIME_S = 300.0
MAX_REFUSALS = 200_000


class _Entry(NamedTuple):
    """A row's place in a heap; void once the row's ticket is another one."""

    key: tuple[float, float, float, int]
    ticket: int
    row: Row

    @property
    def is_void(self) -> bool:
        return self.ticket != self.row.ticket


class WaitingQueue:
    """Rows by turn:

    1. who was preempted and has waited longer than `patience_s` since, longest wait first;
    2. the best priority; within it who was preempted, by arrival;
    3. then the tenant that got the least service, and its rows by arrival.

    `len` counts the rows that wait, `num_tokens` their prompts' tokens.
    """

    def __init__(self, counters: VirtualCounters, patience_s: float) -> None:
        self._counters = counters
        self._patience_s = patience_s
        self._lines: dict[str, list[_Entry]] = {}  # by tenant
        self._preempted: list[_Entry] = []  # by the time since which they wait
        self._tickets = 0
        self._num_void = 0
        self._num_waiting = 0
        self._num_of: Counter[str] = Counter()  # by tenant that has any
        self.num_tokens = 0

    def __len__(self) -> int:
        return self._num_waiting

    def has_less_than_its_share(self, tenant: str, limit: int) -> bool:
        """Whether other tenants wait, and this one with fewer rows than an equal share of `limit`."""
        num_tenants = len(self._num_of) + (tenant not in self._num_of)
        return num_tenants > 1 and self._num_of[tenant] < limit // num_tenants

    def __iter__(self) -> Iterator[Row]:
        """All that wait, in no order."""
        return (entry.row for line in self._lines.values() for entry in line if not entry.is_void)

    def add(self, row: Row) -> None:
        """Put in a row that waits or returns; it must not be in already."""
        tenant = row.request.tenant
        if tenant not in self._lines:
            self._counters.lift(tenant, self._lines)
            self._lines[tenant] = []
        self._tickets += 1
        row.ticket = self._tickets
        priority, arrival_s, serial = row.rank
        is_new = row.num_preemptions == 0
        entry = _Entry((priority, is_new, arrival_s, serial), row.ticket, row)
        heapq.heappush(self._lines[tenant], entry)
        if not is_new:
            entry = _Entry((row.waiting_since_s, 0, arrival_s, serial), row.ticket, row)
            heapq.heappush(self._preempted, entry)
        self._num_waiting += 1
        self._num_of[tenant] += 1
        self.num_tokens += row.request.num_prompt

    def remove(self, row: Row) -> None:
        """A row waits no longer."""
        row.ticket = 0
        self._num_waiting -= 1
        self._num_of[row.request.tenant] -= 1
        if self._num_of[row.request.tenant] == 0:
            del self._num_of[row.request.tenant]
        self.num_tokens -= row.request.num_prompt
        self._num_void += 1
        line = self._lines[row.request.tenant]
        _drop_void(line)
        if not line:
            del self._lines[row.request.tenant]
        _drop_void(self._preempted)
        if self._num_void > 2 * self._num_waiting + 64:
            self._compact()

    def _compact(self) -> None:
        for heap in (*self._lines.values(), self._preempted):
            heap[:] = [entry for entry in heap if not entry.is_void]
            heapq.heapify(heap)
        self._num_void = 0

    def is_starving(self, row: Row, now_s: float) -> bool:
        """Whether a preempted row has waited too long for its next id."""
        return row.num_preemptions > 0 and now_s - row.waiting_since_s >= self._patience_s

    def head(self, now_s: float) -> Row | None:
        """The row whose turn it is, or None."""
        if self._preempted and self.is_starving(self._preempted[0].row, now_s):
            return self._preempted[0].row
        best: tuple[tuple[float, float, float, float, int], Row] | None = None
        for tenant, line in self._lines.items():
            priority, is_new, arrival_s, serial = line[0].key
            service = self._counters.value(tenant) if is_new else 0.0
            key = (priority, is_new, service, arrival_s, serial)
            if best is None or key < best[0]:
                best = (key, line[0].row)
        return None if best is None else best[1]


def _drop_void(heap: list[_Entry]) -> None:
    while heap and heap[0].is_void:
        heapq.heappop(heap)


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
