"""Faults of gateways: one of two is killed, with readers that resume elsewhere or that never come back."""

import random
import time
from collections.abc import Sequence

from tests.chaos.bed import Bed
from tests.chaos.history import StreamHistory, percentile
from tests.chaos.load import Marks


async def kill_one(bed: Bed, rng: random.Random, marks: Marks) -> None:
    """SIGKILL; its connections drop, and those readers go on at the other one."""
    victim = rng.randrange(bed.layout.gateways)
    bed.of("gateway")[victim].kill()

    async def after(histories: Sequence[StreamHistory]) -> None:
        """Whoever talks to another process must not notice."""
        live = [h for h in histories if h.ended_s > marks.struck_s and h.started_s < marks.struck_s]
        others = [h for h in live if not h.resumed_s and not h.num_refused and h.spec.path != "client"]
        marks.counts["connections_lost"] += sum(bool(h.resumed_s) for h in live)
        marks.counts["wrongly_dropped"] += sum(
            bool(h.resumed_s) for h in live if h.spec.path == "http" and h.spec.gateway != victim
        )
        marks.times_s["others_stall_p99"] = percentile([h.stalls(marks.struck_s) for h in others], 0.99)

    marks.afterwards.append(after)


async def orphan_all(bed: Bed, rng: random.Random, marks: Marks) -> None:
    """SIGKILL of the gateways that own all streams, whose readers never come back: how soon the executors'
    blocks are free again, as the scheduler's heartbeats tell."""
    began_s = time.monotonic()
    for service in bed.of("gateway"):
        service.kill()
    await bed.until(lambda: bed.is_idle(began_s), "the orphans' blocks are free", 30)
    marks.times_s["blocks_free_after"] = bed.beat_s - began_s
