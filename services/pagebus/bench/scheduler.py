"""Measures the scheduler's core: microseconds a step, with everything switched on.

`pagebus bench scheduler [--rows 256 1024 4096] [--steps 400] [--horizon 0] [--step-ms 8]`

An executor that does exactly what plans say is imitated outside the measured time. The critical path is
what lies between a step's report and the plan that it leads to: decode the report, take it, plan, encode
the plan. What is settled after the plan was sent (ids, digests of full blocks for the prefix cache,
tenants' counters, rows that ended) is measured apart. The rows belong to three tenants and share a prompt's
prefix; the pool's free blocks all come from the prefix cache, so that every block given out evicts one.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from pagebus.bench.processes import machine
from pagebus.bus import subjects
from pagebus.bus.messages import (
    Generate,
    Hello,
    Plan,
    PoolGroup,
    StepDone,
    decode,
    encode,
    pack_ids,
    unpack_handles,
)
from pagebus.scheduler.actions import SendPlan
from pagebus.scheduler.book import CoreConfig
from pagebus.scheduler.core import SchedulerCore

_PROMPT = 64
_COMMON = 32
_BARS_US = {256: 40, 1024: 80, 4096: 200}


class Figures(NamedTuple):
    """Microseconds: of the critical path and of what is settled later, a step; of an admission, a request."""

    step_us: list[float]
    settle_us: list[float]
    admit_us: float
    num_plans: int


def main(words: Sequence[str] | None = None) -> None:
    """Print mean, median and 99th percentile for each number of rows. `words`: the arguments; None: those of
    the process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=sorted(_BARS_US))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--horizon", type=int, default=0)
    parser.add_argument("--step-ms", type=float, default=8.0, help="step time that the executor reports")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    arguments = parser.parse_args(words)
    told: list[dict[str, float]] = []
    print("    rows   mean us a step   median      p99      bar   settled later   admission, us   plans")
    for num_rows in arguments.rows:
        found = measure(num_rows, arguments.steps, arguments.horizon, arguments.step_ms / 1e3)
        steps = sorted(found.step_us)
        print(
            f"{num_rows:8} {statistics.fmean(steps):16.1f} {statistics.median(steps):8.1f} "
            f"{steps[int(len(steps) * 0.99)]:8.1f} {_BARS_US.get(num_rows, 0) or '':>8} "
            f"{statistics.fmean(found.settle_us):15.1f} {found.admit_us:15.1f} {found.num_plans:7}"
        )
        told.append(
            {
                "rows": num_rows,
                "step_mean_us": statistics.fmean(steps),
                "step_median_us": statistics.median(steps),
                "step_p99_us": steps[int(len(steps) * 0.99)],
                "settle_mean_us": statistics.fmean(found.settle_us),
                "admission_us": found.admit_us,
            }
        )
    if arguments.json is not None:
        file: Path = arguments.json
        figures = {"machine": msgspec.to_builtins(machine()), "figures": told}
        file.write_bytes(msgspec.json.format(msgspec.json.encode(figures), indent=2) + b"\n")


class _Executor:
    """Does what plans say, and reports it as packed bytes."""

    def __init__(self, num_rows: int, step_s: float) -> None:
        self.sequence = 0
        self.num_steps = 0
        self._step_us = round(step_s * 1e6)
        self._positions = np.zeros(num_rows + 1, np.int32)  # by handle
        self._ids = np.random.default_rng(1)

    def report(self, handles: np.ndarray, num_computed: int) -> bytes:
        self.num_steps += 1
        self._positions[handles] += num_computed
        done = StepDone(
            executor="e",
            epoch=1,
            plan=self.sequence,
            num_steps=self.num_steps,
            handles=handles.astype("<u4").tobytes(),
            num_computed=self._positions[handles].astype("<u4").tobytes(),
            num_made=b"\1" * len(handles),
            ids=self._ids.integers(0, 1 << 15, len(handles), dtype=np.int32).tobytes(),
            duration_us=self._step_us,
        )
        return encode(done)


def measure(num_rows: int, num_steps: int, horizon: int, step_s: float) -> Figures:
    """`num_steps` decode steps of `num_rows` rows."""
    core = SchedulerCore(
        CoreConfig(
            model="m", horizon=horizon, max_num_seqs=num_rows, max_num_batched_tokens=num_rows * _PROMPT
        )
    )
    core.become_leader(1, 0.0)
    num_blocks = num_rows * ((_PROMPT + num_steps) // 16 + 4)
    hello = Hello(
        executor="e",
        model="m",
        pool=(PoolGroup(num_blocks=num_blocks),),
        max_model_len=_PROMPT + num_steps + 256,
        max_num_seqs=num_rows,
    )
    core.on_hello(hello, 0.0)
    snapshot = _plans(core, 0.0)[0]
    core.on_step_done(StepDone(executor="e", epoch=1, plan=snapshot.sequence, num_steps=0), 0.0)
    _fill_cache(core, num_blocks)
    executor = _Executor(num_rows, step_s)
    began_s = time.perf_counter()
    for i in range(num_rows):
        core.on_generate(_request(i, num_steps), 0.0)
    plans = _plans(core, 0.0)
    while True:  # a plan carries a bounded number of new rows
        core.settle()
        more = _plans(core, 0.0)
        if not more:
            break
        plans += more
    for plan in plans:
        encode(plan)
    admit_us = (time.perf_counter() - began_s) / num_rows * 1e6
    executor.sequence = plans[-1].sequence
    handles = np.array([start.handle for plan in plans for start in plan.rows], np.int64)
    executor._positions[handles] = [start.num_cached for plan in plans for start in plan.rows]
    first = np.array([_PROMPT]) - executor._positions[handles]
    executor._positions[handles] += first - 1
    return _decode_steps(core, executor, handles, num_steps, admit_us)


def _decode_steps(
    core: SchedulerCore, executor: _Executor, handles: np.ndarray, num_steps: int, admit_us: float
) -> Figures:
    steps_us: list[float] = []
    settles_us: list[float] = []
    num_plans = 0
    for step in range(num_steps):
        now_s = 1.0 + step * 0.008
        data = executor.report(handles, 1)
        start_s = time.perf_counter()
        done = decode(data)
        if isinstance(done, StepDone):
            core.on_step_done(done, now_s)
        plans = _plans(core, now_s)
        for plan in plans:
            encode(plan)
        planned_s = time.perf_counter()
        core.settle()
        settled_s = time.perf_counter()
        if step >= 8:  # the first steps end prefills
            steps_us.append((planned_s - start_s) * 1e6)
            settles_us.append((settled_s - planned_s) * 1e6)
            num_plans += len(plans)
        if plans:
            executor.sequence = plans[-1].sequence
            decoding = {handle for each in plans[-1].steps for handle in unpack_handles(each.decode)}
            if len(decoding) != len(handles):
                raise RuntimeError("the plan leaves rows out")
    return Figures(steps_us, settles_us, admit_us, num_plans)


def _request(number: int, num_steps: int) -> Generate:
    prompt = [*range(_COMMON), *range(1000 + number * _PROMPT, 1000 + number * _PROMPT + _PROMPT - _COMMON)]
    return Generate(
        request_id=f"r{number}",
        model="m",
        prompt=pack_ids(prompt),
        max_tokens=num_steps + 100,
        tenant=f"t{number % 3}",
        reply=subjects.out("r"),
        life=subjects.life("r"),
    )


def _fill_cache(core: SchedulerCore, num_blocks: int) -> None:
    """Every block holds something that could be hit, as after hours of service."""
    pool = core._executors["e"].kv.main
    blocks = pool.allocate(num_blocks)
    for block in blocks.tolist():
        pool.register(block, b"old %d" % block)
    pool.release(blocks)


def _plans(core: SchedulerCore, now_s: float) -> list[Plan]:
    return [action.plan for action in core.plan(now_s) if isinstance(action, SendPlan)]


if __name__ == "__main__":
    main()
