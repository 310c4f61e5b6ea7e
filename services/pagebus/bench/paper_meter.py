"""Adds up what a simulation shows over its time: memory by use, running requests, tokens, latencies."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from pagebus.bench.paper_lengths import SimRequest


class NoBacklogError(ValueError):
    """Requests never waited for memory, so there is nothing to say of its use."""


class MemoryUse(msgspec.Struct, frozen=True):
    """KV memory at one moment, in slots of one token; the parts sum to the pool.

    `granted_ahead` to `freed_late` are what paging holds beyond token state, by reason. The paper's words:
    internal fragmentation is `unfilled` and `never_used`, external fragmentation and others `unused`.
    """

    token_state: int = 0
    reserved: int = 0  # this request's own tokens will go here (contiguous policies)
    never_used: int = 0  # reserved, and the request ends before
    unfilled: int = 0  # paging: the rest of a row's last block that holds anything
    granted_ahead: int = 0  # paging: blocks for the steps of the lease that nothing was written to yet
    prompt_ahead: int = 0  # paging: blocks of a prompt that is not prefilled yet
    freed_late: int = 0  # paging: of rows that ended or left, until the scheduler knows
    unused: int = 0  # no request holds it


class Shares(msgspec.Struct, frozen=True):
    """`MemoryUse` as shares of the pool, averaged over a backlog: requests wait for memory all the time."""

    token_state: float
    reserved: float
    never_used: float
    unfilled: float
    granted_ahead: float
    prompt_ahead: float
    freed_late: float
    unused: float

    @property
    def of_held(self) -> float:
        """Token state as a share of what requests hold."""
        return self.token_state / (1.0 - self.unused)


class Outcome(msgspec.Struct, frozen=True):
    """What one simulated run showed."""

    shares: Shares | None  # None: the run was no backlog
    num_running: float  # rows in a step, mean over the time from warm-up to the last arrival
    normalized_latency_s: float  # seconds a token from arrival to end, mean over requests
    tokens_per_s: (
        float  # generated ones; in a backlog from warm-up until nothing waits, else over the whole run
    )
    sharing_saved: float  # blocks not needed because rows share them, of those needed without sharing
    num_preemptions: int
    num_steps: int
    end_s: float


@dataclass(slots=True)
class Meter:
    """Integrals over virtual time from `warm_up_s` on.

    A backlog (every request arrived at 0) counts while requests wait: memory, tokens and running rows are
    those of a system under full load. Otherwise running rows count until the last arrival.
    """

    num_slots: int
    warm_up_s: float
    last_arrival_s: float
    counted_s: float = 0.0
    row_seconds: float = 0.0
    counted_tokens: int = 0
    num_tokens: int = 0
    row_blocks: float = 0.0  # block seconds of all rows' tables
    saved_blocks: float = 0.0  # ... of which another row holds the same block
    uses: list[float] = field(default_factory=lambda: [0.0] * len(MemoryUse.__struct_fields__))

    @property
    def is_backlog(self) -> bool:
        """Whether every request was there from the start."""
        return self.last_arrival_s <= 0.0

    def add(
        self, start_s: float, end_s: float, use: MemoryUse, num_running: int, *, has_waiting: bool
    ) -> None:
        """The state from `start_s` to `end_s`."""
        start_s = max(start_s, self.warm_up_s)
        if self.is_backlog:
            duration_s = end_s - start_s if has_waiting else 0.0
        else:
            duration_s = min(end_s, self.last_arrival_s) - start_s
        if duration_s <= 0.0:
            return
        self.counted_s += duration_s
        self.row_seconds += num_running * duration_s
        for i, count in enumerate(msgspec.structs.astuple(use)):
            self.uses[i] += count * duration_s

    def add_tokens(self, now_s: float, num_made: int, *, has_waiting: bool) -> None:
        """A step that ended `now_s` made so many tokens."""
        self.num_tokens += num_made
        if has_waiting and now_s > self.warm_up_s:
            self.counted_tokens += num_made

    def add_sharing(self, duration_s: float, num_row_blocks: int, num_distinct: int) -> None:
        """Rows' tables held `num_row_blocks` entries, of `num_distinct` blocks, for so long."""
        self.row_blocks += num_row_blocks * duration_s
        self.saved_blocks += (num_row_blocks - num_distinct) * duration_s

    def outcome(
        self,
        requests: Sequence[SimRequest],
        ends_s: Sequence[float],
        *,
        num_steps: int,
        num_preemptions: int = 0,
    ) -> Outcome:
        """The figures of a run in which `requests[i]` ended at `ends_s[i]`."""
        arrivals = np.array([request.arrival_s for request in requests])
        lengths = np.array([max(request.outputs) for request in requests])
        ends = np.array(ends_s)
        end_s = float(ends.max())
        has_backlog = self.is_backlog and self.counted_s > 0
        total = self.counted_s * self.num_slots
        return Outcome(
            shares=Shares(*(use / total for use in self.uses)) if has_backlog else None,
            num_running=self.row_seconds / self.counted_s if self.counted_s else 0.0,
            normalized_latency_s=float(((ends - arrivals) / lengths).mean()),
            tokens_per_s=self.counted_tokens / self.counted_s if has_backlog else self.num_tokens / end_s,
            sharing_saved=self.saved_blocks / self.row_blocks if self.row_blocks else 0.0,
            num_preemptions=num_preemptions,
            num_steps=num_steps,
            end_s=end_s,
        )
