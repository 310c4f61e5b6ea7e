"""Faults of the leading scheduler: killed, or stopped and woken when another one leads."""

import asyncio
import random
import signal
import time
from collections.abc import Sequence

import msgspec

from tests.chaos.bed import Bed
from tests.chaos.history import StreamHistory
from tests.chaos.load import Marks
from tests.chaos.taps import PlanTap


async def _taken_over(bed: Bed, marks: Marks) -> None:
    epoch = bed.epochs[-1][1]
    began_s = time.monotonic()
    await bed.until(lambda: bed.epochs[-1][1] > epoch, "another scheduler leads", 20)
    marks.times_s["take_over"] = bed.epochs[-1][0] - began_s


async def kill_leader(bed: Bed, rng: random.Random, marks: Marks) -> None:
    """SIGKILL; a standby takes over, the dead one comes back as a standby."""
    bed.leader().kill()
    await _taken_over(bed, marks)


async def stop_leader(bed: Bed, rng: random.Random, marks: Marks) -> None:
    """SIGSTOP until another leads, SIGCONT. Plans of the old term are also sent again by hand."""
    old = bed.leader()
    async with PlanTap(bed) as tap:
        await asyncio.sleep(0.2)
        marks.struck_s = time.monotonic()
        old.signal(signal.SIGSTOP)
        stale = dict(tap.last_plan)
        await _taken_over(bed, marks)
        await asyncio.sleep(rng.uniform(0.0, 0.5))
        old.signal(signal.SIGCONT)
        num_replayed = 0
        for _ in range(5):
            for plan in stale.values():
                num_replayed += 1
                later = msgspec.structs.replace(plan, sequence=plan.sequence + num_replayed, is_snapshot=True)
                await tap.replay(later)
            await asyncio.sleep(0.1)
        await asyncio.sleep(0.5)
        marks.counts["late_plans_replayed"] += num_replayed
        marks.counts["late_plans_of_its_own"] += tap.num_late_plans - num_replayed
        marks.counts["late_plans_obeyed"] += tap.num_late_obeyed

    async def after(histories: Sequence[StreamHistory]) -> None:
        await bed.until(lambda: time.monotonic() - bed.beat_s < 0.6, "somebody leads", 5)

    marks.afterwards.append(after)
