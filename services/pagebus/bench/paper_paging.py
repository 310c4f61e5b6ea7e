"""Simulates pagebus itself: the real scheduler core and an imaginary executor, in virtual time.

The core sees only messages, each under way for `link_s`. Memory is read from plans and reports alone: a block
counts from the plan that grants it until the scheduler has heard that its row is over.
"""

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from pagebus.bench.paper_cost import CostModel
from pagebus.bench.paper_executor import ImaginaryExecutor, LaunchedStep
from pagebus.bench.paper_lengths import MAX_LEN, SimRequest
from pagebus.bench.paper_meter import MemoryUse, Meter, Outcome
from pagebus.bus import subjects
from pagebus.bus.messages import (
    ChoiceState,
    Failed,
    Generate,
    Hello,
    Plan,
    PoolGroup,
    Rejected,
    StepDone,
)
from pagebus.scheduler.actions import SendPlan, SendReply
from pagebus.scheduler.book import CoreConfig
from pagebus.scheduler.core import SchedulerCore

MODEL = "simulated"
NUM_VOCABULARY = 50_000
TICK_S = 1.0
MAX_STALL_S = 60.0
"""Virtual seconds without a step, while requests are open, after which a run is given up."""


@dataclass(frozen=True, kw_only=True)
class PagingConfig:
    """What the scheduler is given: pagebus's own defaults, except that memory alone bounds the rows."""

    cost: CostModel
    block_size: int = 16
    horizon: int = 0  # 0: chosen from the step time
    max_num_seqs: int = 1024
    max_num_batched_tokens: int = 2048
    link_s: float = 0.0005
    seed: int = 0


NOT_COUNTED = MemoryUse()


class SimulationError(RuntimeError):
    """The scheduler refused or failed a request, or got nowhere."""


class PagingRun:
    """One run; `run` gives its outcome."""

    def __init__(self, requests: Sequence[SimRequest], config: PagingConfig, warm_up_s: float) -> None:
        """`requests` by arrival. Memory is measured from `warm_up_s` on."""
        self._requests = requests
        self._config = config
        num_blocks = config.cost.machine.num_slots // config.block_size
        self._core = SchedulerCore(
            CoreConfig(
                model=MODEL,
                horizon=config.horizon,
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_num_queued_reqs=1 << 30,
                max_model_len=MAX_LEN,
            )
        )
        self.executor = ImaginaryExecutor("gpu", num_blocks, config.block_size, self._end_position)
        self._num_slots = num_blocks * config.block_size
        self._meter = Meter(self._num_slots, warm_up_s, requests[-1].arrival_s)
        self._prompts = np.random.default_rng(config.seed)
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._serials = itertools.count()
        self._is_busy = False
        self._measured_s = 0.0  # the meter knows all before
        self._last_step_s = 0.0
        self._ends_s = [0.0] * len(requests)
        self._num_open = [len(request.outputs) for request in requests]  # rows of each that have not ended
        self._num_left = sum(self._num_open)
        self._num_arrived = 0  # rows that arrived and have not ended

    def _end_position(self, request_id: str, choice: int) -> int:
        request = self._requests[int(request_id)]
        return request.num_prompt + request.outputs[choice] - 1  # the last id is never written

    # -- time ------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Serve all requests. Raises `SimulationError` where the scheduler does not."""
        self._core.become_leader(1, 0.0)
        self._tick(0.0)
        for i, request in enumerate(self._requests):
            self._at(request.arrival_s, partial(self._arrive, i))
        while self._num_left:
            now_s, _, event = heapq.heappop(self._events)
            if now_s > self._measured_s:
                self._measure(now_s)
            event(now_s)
        return self._meter.outcome(
            self._requests,
            self._ends_s,
            num_steps=self.executor.num_steps,
            num_preemptions=self.executor.num_restarts,
        )

    def _at(self, time_s: float, event: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (time_s, next(self._serials), event))

    def _tick(self, now_s: float) -> None:
        executor = self.executor
        if self._num_arrived and now_s - self._last_step_s > MAX_STALL_S:
            raise SimulationError(
                f"{self._num_arrived} rows are open and no step was done for {MAX_STALL_S} s"
            )
        hello = Hello(
            executor=executor.name,
            model=MODEL,
            epoch=executor.epoch,
            plan=executor.plan,
            num_steps=executor.num_steps,
            handles=np.array(executor.handles, "<u4").tobytes(),
            pool=(PoolGroup(num_blocks=len(executor.uses), block_size=executor.block_size),),
            max_model_len=MAX_LEN,
            max_num_seqs=self._config.max_num_seqs,
        )
        self._core.on_hello(hello, now_s)
        self._core.on_tick(now_s)
        self._plan(now_s)
        self._at(now_s + TICK_S, self._tick)

    # -- the scheduler's side --------------------------------------------------------------------------------

    def _arrive(self, index: int, now_s: float) -> None:
        if not self._num_arrived:
            self._last_step_s = now_s
        request = self._requests[index]
        prompt = self._prompts.integers(NUM_VOCABULARY, size=request.num_prompt, dtype=np.int32)
        self._num_arrived += len(request.outputs)
        generate = Generate(
            request_id=str(index),
            model=MODEL,
            prompt=prompt.astype("<i4").tobytes(),
            choices=tuple(ChoiceState(index=i) for i in range(len(request.outputs))),
            max_tokens=MAX_LEN - request.num_prompt,  # how long it will really be, only the executor knows
            time_left_ms=1 << 40,
            reply=subjects.out("client"),
            life=subjects.life("client"),
        )
        self._core.on_generate(generate, now_s)
        self._plan(now_s)

    def _report(self, done: StepDone, now_s: float) -> None:
        self._core.on_step_done(done, now_s)
        executor = self.executor
        leaving = executor.leaving
        cut_short = set()
        while leaving and leaving[0][0] <= done.plan:
            cut_short.add(leaving.popleft()[1])
        for handle in done.finished:
            start = executor.starts[handle]
            self._end_choice(int(start.request_id), now_s)
        # A row that ended in the very step in which it was cut short is in both.
        pending = {handle for _, handle in leaving}
        for handle in cut_short | (done.finished.keys() - pending):
            executor.forget(handle)
        self._plan(now_s)

    def _end_choice(self, index: int, now_s: float) -> None:
        self._num_open[index] -= 1
        self._num_left -= 1
        self._num_arrived -= 1
        if not self._num_open[index]:
            self._ends_s[index] = now_s

    def _plan(self, now_s: float) -> None:
        for action in self._core.plan(now_s):
            if isinstance(action, SendPlan):
                self._at(now_s + self._config.link_s, partial(self._take, action.plan))
            elif isinstance(action, SendReply) and isinstance(action.message, Rejected | Failed):
                raise SimulationError(f"request {action.message.request_id}: {action.message.message}")
        self._core.settle()

    # -- the executor's side ---------------------------------------------------------------------------------

    def _take(self, plan: Plan, now_s: float) -> None:
        self.executor.take(plan)
        if not self._is_busy:
            self._launch(now_s)
        if not self._is_busy:
            done = self.executor.acknowledgement()
            self._at(now_s + self._config.link_s, partial(self._report, done))

    def _launch(self, now_s: float) -> None:
        step = self.executor.next_step()
        self._is_busy = step is not None
        if step is None:
            return
        cost = self._config.cost
        duration_s = cost.step_s(step.num_tokens, step.num_rows, step.num_kv_tokens, self._config.block_size)
        self._at(now_s + duration_s, partial(self._complete, step, duration_s))

    def _complete(self, step: LaunchedStep, duration_s: float, now_s: float) -> None:
        has_waiting = self._has_waiting()
        done = self.executor.complete(step, duration_s)
        self._last_step_s = now_s
        self._meter.add_tokens(now_s, sum(done.num_made), has_waiting=has_waiting)
        self._at(now_s + self._config.link_s, partial(self._report, done))
        self._launch(now_s)

    # -- measuring -------------------------------------------------------------------------------------------

    def _has_waiting(self) -> bool:
        """Whether a row that arrived is not with the executor (nor on its way back from there)."""
        return self._num_arrived > len(self.executor.starts)

    def _measure(self, until_s: float) -> None:
        """Tell the meter of the time since the last event, in which nothing changed."""
        executor = self.executor
        num_distinct = int(np.count_nonzero(executor.uses))
        use = self._memory_use(num_distinct) if self._meter.is_backlog else NOT_COUNTED
        num_running = len(executor.running)
        self._meter.add(self._measured_s, until_s, use, num_running, has_waiting=self._has_waiting())
        self._meter.add_sharing(until_s - self._measured_s, executor.num_row_blocks, num_distinct)
        self._measured_s = until_s

    def _memory_use(self, num_distinct: int) -> MemoryUse:
        executor = self.executor
        position, num_ids, capacity = executor.positions()
        size = self._config.block_size
        filled = -(-position // size) * size  # whole blocks that hold anything
        prompt_end = np.minimum(-(-num_ids // size) * size, capacity)
        num_state = int(position.sum())
        num_unfilled = int(filled.sum()) - num_state
        num_prompt = int(np.maximum(prompt_end - filled, 0).sum())
        num_capacity = int(capacity.sum())
        return MemoryUse(
            token_state=num_state,
            unfilled=num_unfilled,
            prompt_ahead=num_prompt,
            granted_ahead=num_capacity - num_state - num_unfilled - num_prompt,
            freed_late=executor.num_row_blocks * size - num_capacity,
            unused=self._num_slots - num_distinct * size,
        )
