"""Simulates the systems before paging: Orca's batches over reserved extents, and static batches.

Requests are served first come, first served; who does not fit waits, and nobody overtakes. These systems are
ours, written from their papers' descriptions; the scheduler under test is not involved.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pagebus.bench.paper_contiguous import ContiguousAllocator, Extent
from pagebus.bench.paper_cost import CostModel
from pagebus.bench.paper_lengths import MAX_LEN, SimRequest
from pagebus.bench.paper_meter import MemoryUse, Meter, Outcome

Reservation = Callable[[SimRequest], int]
"""How many slots a request reserves when it starts."""


def reserve_max(request: SimRequest) -> int:
    """Orca (Max): as many as the longest possible sequence."""
    return MAX_LEN


def reserve_pow2(request: SimRequest) -> int:
    """Orca (Pow2): the prompt and the output, at most twice too much: the next power of two."""
    return min(MAX_LEN, request.num_prompt + (1 << (request.outputs[0] - 1).bit_length()))


def reserve_oracle(request: SimRequest) -> int:
    """Orca (Oracle): exactly what will be needed, which no system can know."""
    return request.num_prompt + request.outputs[0]


POLICIES: dict[str, Reservation] = {
    "Orca (Max)": reserve_max,
    "Orca (Pow2)": reserve_pow2,
    "Orca (Oracle)": reserve_oracle,
}


@dataclass(slots=True)
class _Row:
    """A request that runs. It computed its prompt in step `first` and makes its last token in step `last`."""

    index: int
    size: int  # positions that it will have written when it ends
    reserved: int
    extent: Extent
    last: int


class ContiguousRun:
    """One run of iteration-level batching; `run` gives its outcome."""

    def __init__(
        self,
        requests: Sequence[SimRequest],
        reservation: Reservation,
        allocator: ContiguousAllocator,
        cost: CostModel,
        warm_up_s: float,
    ) -> None:
        """`requests` by arrival; every one must fit the empty pool."""
        self._requests = requests
        self._reservation = reservation
        self._allocator = allocator
        self._cost = cost
        self._meter = Meter(allocator.num_slots, warm_up_s, requests[-1].arrival_s)
        self._ends_s = [0.0] * len(requests)
        self._ending: list[tuple[int, int, _Row]] = []  # by last step
        self._num_placed = 0
        self._num_steps = 0
        self._num_state = 0  # positions written, over all running rows
        self._num_reserved = 0  # ... reserved
        self._num_needed = 0  # ... that will have been written at the rows' ends

    def run(self) -> Outcome:
        """Serve all requests."""
        now_s = 0.0
        requests = self._requests
        while self._num_placed < len(requests) or self._ending:
            num_old = len(self._ending)
            new = self._admit(now_s)
            if not self._ending:
                arrival_s = requests[self._num_placed].arrival_s
                if arrival_s <= now_s:
                    raise ValueError(f"{requests[self._num_placed]} does not fit the empty pool")
                self._meter.add(now_s, arrival_s, MemoryUse(), 0, has_waiting=False)
                now_s = arrival_s
                continue
            now_s = self._step(now_s, num_old, new)
        return self._meter.outcome(requests, self._ends_s, num_steps=self._num_steps)

    def _has_waiting(self, now_s: float) -> bool:
        return self._num_placed < len(self._requests) and self._requests[self._num_placed].arrival_s <= now_s

    def _admit(self, now_s: float) -> list[SimRequest]:
        new = []
        while self._has_waiting(now_s):
            request = self._requests[self._num_placed]
            reserved = self._reservation(request)
            extent = self._allocator.allocate(reserved)
            if extent is None:
                break
            num_output = request.outputs[0]
            row = _Row(
                self._num_placed,
                request.num_prompt + num_output - 1,  # the last token is never written
                reserved,
                extent,
                self._num_steps + num_output - 1,
            )
            heapq.heappush(self._ending, (row.last, row.index, row))
            self._num_reserved += row.reserved
            self._num_needed += row.size
            self._num_placed += 1
            new.append(request)
        return new

    def _step(self, now_s: float, num_old: int, new: list[SimRequest]) -> float:
        num_prompt = sum(request.num_prompt for request in new)
        num_rows = num_old + len(new)
        duration_s = self._cost.step_s(num_old + num_prompt, num_rows, self._num_state + num_prompt)
        use = MemoryUse(
            token_state=self._num_state,
            reserved=self._num_needed - self._num_state,
            never_used=self._num_reserved - self._num_needed,
            unused=self._allocator.num_slots - self._num_reserved,  # rounding up to buddies included
        )
        end_s = now_s + duration_s
        has_waiting = self._has_waiting(now_s)
        self._meter.add(now_s, end_s, use, num_rows, has_waiting=has_waiting)
        self._meter.add_tokens(end_s, num_rows, has_waiting=has_waiting)
        self._num_state += num_old + num_prompt
        while self._ending and self._ending[0][0] == self._num_steps:
            row = heapq.heappop(self._ending)[2]
            self._allocator.free(row.extent)
            self._num_state -= row.size
            self._num_needed -= row.size
            self._num_reserved -= row.reserved
            self._ends_s[row.index] = end_s
        self._num_steps += 1
        return end_s


def run_static(requests: Sequence[SimRequest], num_slots: int, cost: CostModel) -> Outcome:
    """Static batches of as many requests as fit at `MAX_LEN` slots each: all leave when the longest ends."""
    batch_size = max(1, num_slots // MAX_LEN)
    meter = Meter(num_slots, 0.0, requests[-1].arrival_s)
    ends_s: list[float] = []
    now_s = 0.0
    num_steps = 0
    while len(ends_s) < len(requests):
        first = len(ends_s)
        now_s = max(now_s, requests[first].arrival_s)
        batch = [r for r in requests[first : first + batch_size] if r.arrival_s <= now_s]
        longest = max(request.outputs[0] for request in batch)
        num_prompt = sum(request.num_prompt for request in batch)
        for k in range(longest):
            num_tokens = num_prompt if k == 0 else len(batch)  # rows that ended are computed on
            now_s += cost.step_s(num_tokens, len(batch), num_prompt + k * len(batch))
            meter.add_tokens(now_s, sum(r.outputs[0] > k for r in batch), has_waiting=False)
        num_steps += longest
        ends_s += [now_s] * len(batch)
    return meter.outcome(requests, ends_s, num_steps=num_steps)
