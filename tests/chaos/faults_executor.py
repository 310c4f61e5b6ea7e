"""Faults of executors: killed, stopped, hung, failing, poisoned."""

import asyncio
import random
import signal
import time
from collections.abc import Sequence

from tests.chaos.bed import Bed
from tests.chaos.history import StreamHistory
from tests.chaos.load import Fault, Marks
from tests.chaos.taps import PlanTap, StaleTap

STOPPED_S = (2.5, 5.0)
_LONG_S, _LONG_EACH = 30.0, 10  # each tenth time: nobody waits for it any more


async def kill_one(bed: Bed, rng: random.Random, marks: Marks) -> None:
    """SIGKILL; it is started again by itself, now and then under the dead one's name."""
    victim = rng.choice(bed.of("executor"))
    victim.reuses_name = rng.random() < 0.3
    victim.kill()
    marks.counts["kills"] += 1


async def kill_ten(bed: Bed, rng: random.Random, marks: Marks) -> None:
    """One after the other, whichever runs."""
    _count_quarantined(marks)
    while marks.counts["kills"] < 10:
        running = [service for service in bed.of("executor") if service.is_running]
        if running:
            rng.choice(running).kill()
            marks.counts["kills"] += 1
        await asyncio.sleep(rng.uniform(0.1, 0.8))


def _count_quarantined(marks: Marks) -> None:
    marks.counts["quarantined"] = 0

    async def after(histories: Sequence[StreamHistory]) -> None:
        marks.counts["quarantined"] += sum(h.error_code == "poison_request" for h in histories)

    marks.afterwards.append(after)


async def poison(bed: Bed, rng: random.Random, marks: Marks) -> None:
    """The fault is one of the streams, which ends whoever runs it."""
    _look_at_poison(bed, marks, "poison_request")


async def raising(bed: Bed, rng: random.Random, marks: Marks) -> None:
    """The fault is one of the streams, whose forward raises: no executor dies of it."""
    _look_at_poison(bed, marks, "row_failed")


def _look_at_poison(bed: Bed, marks: Marks, code: str) -> None:
    """How the one that is at fault ended: with `code`, and no token told."""
    num_before = sum(len(service.exit_codes) for service in bed.of("executor"))

    async def after(histories: Sequence[StreamHistory]) -> None:
        (ill,) = [history for history in histories if history.spec.is_poison]
        is_alone = ill.error_code == code and not ill.choices[0].ids
        marks.counts["poison_failed_alone"] += is_alone
        marks.counts["poison_not_alone"] += not is_alone
        marks.counts["deaths"] += sum(len(s.exit_codes) for s in bed.of("executor")) - num_before
        marks.times_s["poison_found"] = ill.ended_s - ill.started_s
        if not is_alone:
            marks.violations.append(f"the poison request ended with {ill.error_code!r}: {ill.error}")

    marks.afterwards.append(after)


async def stop_one(bed: Bed, rng: random.Random, marks: Marks) -> None:
    """SIGSTOP for some seconds, SIGCONT; what the woken one sends is counted on the wire."""
    victim = rng.choice(bed.of("executor"))
    async with StaleTap(bed) as tap:
        victim.signal(signal.SIGSTOP)
        is_long = marks.number % _LONG_EACH == 0
        await asyncio.sleep(_LONG_S if is_long else rng.uniform(*STOPPED_S))
        num_before = tap.num_stale
        victim.signal(signal.SIGCONT)
        await asyncio.sleep(1.0)
        marks.counts["stale_rows_refused"] += tap.num_stale - num_before


def trouble(fault: str) -> Fault:
    """The next forward of one executor does `fault`."""

    async def strike(bed: Bed, rng: random.Random, marks: Marks) -> None:
        number = rng.randint(1, bed.layout.executors)
        victim = bed.of("executor")[number - 1]
        num_starts = victim.num_starts
        bed.trouble_file(number).write_text(fault)
        began_s = time.monotonic()
        await bed.until(lambda: not bed.trouble_file(number).exists(), "a step that takes the fault", 10)
        marks.struck_s = time.monotonic()
        marks.times_s["taken"] = marks.struck_s - began_s

        async def after(histories: Sequence[StreamHistory]) -> None:
            if fault == "hang" and victim.num_starts == num_starts:  # nothing but an end heals it
                victim.kill()

        marks.afterwards.append(after)

    return strike


async def poison_by_hand(bed: Bed, rng: random.Random, marks: Marks) -> None:
    """A poison request for a model that knows no faults: whichever executor gets its row is killed."""
    tap = PlanTap(bed)

    def on_row(executor: str, request_id: str) -> None:
        for service in bed.of("executor"):
            if service.name == executor and request_id.startswith("poison"):
                service.kill()

    tap.on_row = on_row
    await tap.__aenter__()

    async def after(histories: Sequence[StreamHistory]) -> None:
        await tap.__aexit__(None, None, None)

    await poison(bed, rng, marks)
    marks.afterwards.append(after)
