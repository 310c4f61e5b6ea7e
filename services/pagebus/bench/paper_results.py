"""What the experiments found: one struct a row of each table, as `--json` prints them."""

import msgspec

from pagebus.bench import paper_figures
from pagebus.bench.paper_meter import NoBacklogError, Outcome, Shares


class MemoryRow(msgspec.Struct, frozen=True):
    """Shares of the KV pool while requests wait, in percent. The first four sum to 100."""

    workload: str
    system: str
    token_state: float
    reserved: float  # for tokens that this request will make; paging: blocks granted ahead
    internal: float  # never used by this request; paging: the rest of last blocks
    external: float  # held by nobody, or on its way back
    of_held: float  # token state as a share of what requests hold
    num_preemptions: int
    shares: Shares  # the same in full
    paper: paper_figures.Split | None

    @classmethod
    def of(
        cls, workload: str, system: str, outcome: Outcome, paper: paper_figures.Split | None
    ) -> "MemoryRow":
        """The figures of a backlog. Raises `NoBacklogError` where requests never waited."""
        shares = outcome.shares
        if shares is None:
            raise NoBacklogError(f"{workload}: these requests are too few or too short to fill the KV memory")
        return cls(
            workload=workload,
            system=system,
            token_state=100 * shares.token_state,
            reserved=100 * (shares.reserved + shares.granted_ahead + shares.prompt_ahead),
            internal=100 * (shares.never_used + shares.unfilled),
            external=100 * (shares.unused + shares.freed_late),
            of_held=100 * shares.of_held,
            num_preemptions=outcome.num_preemptions,
            shares=shares,
            paper=paper,
        )


class BatchRow(msgspec.Struct, frozen=True):
    """Requests in a step, on average, at a request rate."""

    workload: str
    rate: float  # requests/s
    system: str
    num_running: float
    paper: float | None


class RateRow(msgspec.Struct, frozen=True):
    """The highest request rate within the latency limit, and paging's over it."""

    workload: str
    system: str
    rate: float
    ratio: float
    paper: tuple[float, float] | None


class BlockRow(msgspec.Struct, frozen=True):
    """One block size at a fixed request rate."""

    workload: str
    block_size: int
    normalized_latency_s: float
    num_running: float


class SharingRow(msgspec.Struct, frozen=True):
    """Share of the blocks of all rows' tables that need not exist because choices share them."""

    workload: str
    num_choices: int
    saved: float


class ThroughputRow(msgspec.Struct, frozen=True):
    """Generated tokens a second under a backlog."""

    workload: str
    system: str
    tokens_per_s: float
    ratio: float  # to static batches


class Results(msgspec.Struct, frozen=True):
    """All figures of one call; rows by workload, in the order of the tables."""

    machine: str
    seed: int
    is_quick: bool
    horizon: int
    latency_limit_s: float
    memory: list[MemoryRow] = []
    batches: list[BatchRow] = []
    rates: list[RateRow] = []
    blocks: list[BlockRow] = []
    sharing: list[SharingRow] = []
    throughputs: list[ThroughputRow] = []
