"""Measures the scheduler's core: microseconds for a report and the plan that may follow, by number of rows.

`python -m pagebus.bench.scheduler [--rows 256] [--steps 400] [--horizon 8]`. An executor that does exactly
what plans say is imitated outside the measured time.
"""

import argparse
import statistics
import time

from pagebus.bus import subjects
from pagebus.bus.messages import Generate, Hello, Plan, PoolGroup, StepDone, encode, pack_handles, pack_ids
from pagebus.scheduler.actions import SendPlan
from pagebus.scheduler.book import CoreConfig
from pagebus.scheduler.core import SchedulerCore

_PROMPT = 64


def main() -> None:
    """Print the median and the 99th percentile, per step and per row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--horizon", type=int, default=8)
    arguments = parser.parse_args()
    durations_us = measure(arguments.rows, arguments.steps, arguments.horizon)
    median_us = statistics.median(durations_us)
    mean_us = statistics.fmean(durations_us)
    worst_us = sorted(durations_us)[int(len(durations_us) * 0.99)]
    print(
        f"{arguments.rows} rows, horizon {arguments.horizon}: mean {mean_us:.0f} us a step, median "
        f"{median_us:.0f}, 99th percentile {worst_us:.0f}; {mean_us / arguments.rows:.2f} us a row"
    )


def measure(num_rows: int, num_steps: int, horizon: int) -> list[float]:
    """Microseconds of `on_step_done`, `plan` and encoding, for each of `num_steps` decode steps."""
    core = SchedulerCore(
        CoreConfig(
            model="m", horizon=horizon, max_num_seqs=num_rows, max_num_batched_tokens=num_rows * _PROMPT
        )
    )
    core.become_leader(1, 0.0)
    pool = (PoolGroup(num_blocks=num_rows * ((_PROMPT + num_steps) // 16 + 4)),)
    core.on_hello(
        Hello(executor="e", model="m", pool=pool, max_model_len=1 << 20, max_num_seqs=num_rows), 0.0
    )
    snapshot = _plan(core, 0.0)
    core.on_step_done(StepDone(executor="e", epoch=1, plan=snapshot.sequence, num_steps=0), 0.0)
    for i in range(num_rows):
        core.on_generate(
            Generate(
                request_id=f"r{i}",
                model="m",
                prompt=pack_ids(range(_PROMPT)),
                max_tokens=num_steps + 100,
                reply=subjects.out("r"),
                life=subjects.life("r"),
            ),
            0.0,
        )
    sequence = _plan(core, 0.0).sequence
    handles = list(range(1, num_rows + 1))
    durations_us = []
    for step in range(num_steps):
        now_s = step * 0.02
        done = StepDone(
            executor="e",
            epoch=1,
            plan=sequence,
            num_steps=step + 1,
            handles=pack_handles(handles),
            num_computed=pack_handles([_PROMPT + step] * num_rows),
            num_made=b"\1" * num_rows,
            ids=pack_ids(range(num_rows)),
        )
        start_s = time.perf_counter()
        core.on_step_done(done, now_s)
        plans = [action.plan for action in core.plan(now_s) if isinstance(action, SendPlan)]
        for plan in plans:
            encode(plan)
        durations_us.append((time.perf_counter() - start_s) * 1e6)
        if plans:
            sequence = plans[-1].sequence
    return durations_us


def _plan(core: SchedulerCore, now_s: float) -> Plan:
    (plan,) = (action.plan for action in core.plan(now_s) if isinstance(action, SendPlan))
    return plan


if __name__ == "__main__":
    main()
