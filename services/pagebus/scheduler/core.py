"""The scheduler's core: requests and reports in, plans and replies out. No I/O, no clock, no torch, no text.

Times are monotonic seconds given by the caller. `plan` returns all that is to be sent, in order.
"""

import itertools
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from pagebus.bus import subjects
from pagebus.bus.messages import Cancel, DecodeError, Generate, Hello, StepDone, unpack_handles, unpack_ids
from pagebus.scheduler import placing
from pagebus.scheduler.actions import Action, SendPlan
from pagebus.scheduler.blocks import KvPool
from pagebus.scheduler.book import CoreConfig, RequestBook
from pagebus.scheduler.executors import MAX_UNACKNOWLEDGED, ExecutorState
from pagebus.scheduler.planner import Budget, lay_out
from pagebus.scheduler.requests import RowState

SILENCE_S = 3.0
"""An executor that was not heard for so long is given up."""
FORGET_S = 600.0
UPKEEP_INTERVAL_S = 1.0
MAX_PLAN_IDS = 1 << 19
"""Ids (2 MiB) that the chunks of one plan may carry."""
MAX_PLAN_START_BYTES = 2 << 20
"""Rough bytes of new rows' descriptors and tables in one plan."""


class Figures(NamedTuple):
    """Load, as heartbeats tell it."""

    num_running: int
    num_waiting: int
    num_executors: int
    num_blocks: int
    num_free_blocks: int
    block_size: int
    max_model_len: int
    full_model_len: int  # the same before it was lowered to what the pools hold


class SchedulerCore:
    """All state of one term. Without a term (epoch 0) it takes nothing and plans nothing."""

    def __init__(self, config: CoreConfig) -> None:
        self._config = config
        self._max_num_seqs = min(config.max_num_seqs, config.max_num_batched_tokens)
        self.counters: Counter[str] = Counter()
        self.epoch = 0
        self._clear()

    def _clear(self) -> None:
        self._executors: dict[str, ExecutorState] = {}
        self._handles = itertools.count(1)
        self._book = RequestBook(self._config, self.epoch, self._executors, self.counters)
        self._upkeep_s = float("-inf")

    # -- terms -----------------------------------------------------------------------------------------------

    def become_leader(self, epoch: int, now_s: float) -> None:
        """Begin a term with nothing: executors say hello, requesters ask again."""
        self.epoch = epoch
        self._clear()
        self._upkeep_s = now_s

    def step_down(self) -> None:
        """End the term; all state is dropped and nothing is sent: another leads."""
        self.epoch = 0
        self._clear()

    # -- requests --------------------------------------------------------------------------------------------

    def on_generate(self, generate: Generate, now_s: float, headers: Mapping[str, str] | None = None) -> None:
        """Take a request, a new attempt of one, or turn it away. `headers` carry its trace context."""
        if self.epoch:
            self._book.on_generate(generate, now_s, headers)

    def on_cancel(self, cancel: Cancel, now_s: float) -> None:
        """Stop and free rows; nothing more is sent for them."""
        if self.epoch:
            self._book.on_cancel(cancel, now_s)

    def on_fault(self, generate: Generate, now_s: float) -> None:
        """Handling this raised: fail it alone."""
        if self.epoch:
            self._book.on_fault(generate, now_s)

    # -- executors -------------------------------------------------------------------------------------------

    def on_hello(self, hello: Hello, now_s: float) -> None:
        """Note that an executor lives; bring it to our state where it has another one."""
        if self.epoch == 0 or hello.model != self._config.model:
            return
        is_sound = (
            subjects.is_part(hello.executor)
            and bool(hello.pool)
            and all(
                group.num_blocks > 0 and group.block_size > 0 and (group.window is None or group.window > 0)
                for group in hello.pool
            )
        )
        try:
            handles = unpack_handles(hello.handles)
        except DecodeError:
            is_sound = False
        if not is_sound or hello.max_num_seqs < 1 or hello.max_model_len < 1:
            self.counters["hello_invalid"] += 1
            return
        executor = self._executors.get(hello.executor)
        if executor is None:
            self._meet(hello, None, now_s)
            return
        if executor.is_lost:
            self._meet(hello, executor, now_s)
            return
        executor.heard_s = now_s
        if hello.epoch != self.epoch:
            has_lost_state = executor.acknowledged_before > 0
        else:
            has_lost_state = executor.view_differs(hello, handles)
        if has_lost_state or tuple(hello.pool) != executor.kv.groups:
            self._give_up(executor, f"executor {hello.executor} came back in another state", now_s)
            self._meet(hello, executor, now_s)
        elif hello.has_gap:
            self._book.out.extend(SendPlan(executor.name, plan) for plan in executor.to_repeat(now_s, 0.05))

    def _meet(self, hello: Hello, old: ExecutorState | None, now_s: float) -> None:
        is_ours = hello.epoch == self.epoch and hello.plan > 0
        # A Hello's count may lag; what was processed once is never repeated by the executor.
        num_steps = max(hello.num_steps, old.num_steps if old else 0) if is_ours else 0
        kv = KvPool(hello.pool, self._config.max_num_batched_tokens)
        full_len = min(self._config.max_model_len or hello.max_model_len, hello.max_model_len)
        sequence = max(hello.plan if is_ours else 0, old.sequence if old else 0)
        self._executors[hello.executor] = ExecutorState(
            name=hello.executor,
            kv=kv,
            max_num_seqs=hello.max_num_seqs,
            max_len=full_len if kv.num_positions is None else min(full_len, kv.num_positions),
            full_len=full_len,
            heard_s=now_s,
            sequence=sequence,
            acknowledged=hello.plan if is_ours else 0,
            snapshot_sequence=sequence + 1,
            num_steps=num_steps,
            num_steps_told=num_steps,
        )
        self._book.fit_waiting(now_s)

    def _give_up(self, executor: ExecutorState, why: str, now_s: float) -> None:
        """Tell its rows' requesters to ask again; what it still does is of attempts that nobody follows."""
        executor.is_lost = True
        rows = [*executor.rows.values(), *(entry.row for entry in executor.returning)]
        for request in {row.request: None for row in rows if row.state is not RowState.OVER}:
            self._book.fail(request, "executor_lost", why, now_s, is_retryable=True)
        executor.forget_rows()

    # -- reports ---------------------------------------------------------------------------------------------

    def on_step_done(self, done: StepDone, now_s: float) -> None:
        """Take a report in its order; what was lost on the way comes again, what came twice is dropped."""
        executor = self._executors.get(done.executor)
        if self.epoch == 0 or executor is None or executor.is_lost or done.epoch != self.epoch:
            return
        executor.heard_s = now_s
        is_bare = not done.handles
        num_expected = executor.num_steps + (0 if is_bare else 1)
        if done.num_steps > num_expected:
            self.counters["step_done_out_of_order"] += 1
            return
        if done.num_steps == num_expected and not is_bare:
            self._take_report(executor, done, now_s)
        executor.acknowledge(done.plan)
        executor.renew_due()

    def _take_report(self, executor: ExecutorState, done: StepDone, now_s: float) -> None:
        try:
            handles = unpack_handles(done.handles)
            computed = unpack_handles(done.num_computed)
            ids = unpack_ids(done.ids)
            is_sound = len(handles) == len(computed) == len(done.num_made) and sum(done.num_made) == len(ids)
        except DecodeError:
            is_sound = False
        executor.num_steps = done.num_steps
        executor.num_done += done.plan == executor.sequence
        if not is_sound:
            self._give_up(executor, f"executor {done.executor} sent a broken report", now_s)
            return
        first = 0
        for handle, position, num_made in zip(handles, computed, done.num_made, strict=True):
            row = executor.row_of(handle)
            if row is not None and row.state is not RowState.OVER:
                if row.position < row.target <= position and row.state is RowState.RUNNING:
                    executor.num_behind -= 1
                row.position = position
                if num_made:
                    self._book.add_ids(row, ids[first : first + num_made], now_s)
            first += num_made
        for handle, message in done.failed.items():
            row = executor.row_of(handle)
            if row is not None and row.state is not RowState.OVER:
                # The executor itself told the requester.
                self._book.end_row(row, "failed", is_finished=True)
                self.counters["row_failed"] += 1
                self._book.end(row.request, "failed", now_s, message[:200])
        for handle, reason in done.finished.items():
            row = executor.row_of(handle)
            if row is not None and row.state is not RowState.OVER:
                self._book.end_row(row, reason, is_finished=True)
                if not row.request.rows:
                    self._book.end(row.request, "finished", now_s)

    # -- time ------------------------------------------------------------------------------------------------

    def on_tick(self, now_s: float) -> None:
        """What happens by time alone; call it some times a second."""
        if self.epoch == 0:
            return
        self._book.end_overdue(now_s)
        for executor in list(self._executors.values()):
            silent_s = now_s - executor.heard_s
            if executor.is_lost and silent_s > FORGET_S:
                del self._executors[executor.name]
            elif not executor.is_lost and silent_s > SILENCE_S:
                self._give_up(executor, f"executor {executor.name} was silent for {silent_s:.1f} s", now_s)
        if now_s - self._upkeep_s >= UPKEEP_INTERVAL_S:
            self._upkeep_s = now_s
            self._upkeep(now_s)

    def _upkeep(self, now_s: float) -> None:
        self._book.keep_up(now_s)
        for executor in self._executors.values():
            executor.acknowledged_before = executor.acknowledged_at_upkeep
            executor.acknowledged_at_upkeep = executor.acknowledged

    # -- plans -----------------------------------------------------------------------------------------------

    def plan(self, now_s: float) -> list[Action]:
        """All that is to be sent now: replies, at most one new plan an executor, and repeated ones."""
        if self.epoch:
            self._place_waiting(now_s)
            for executor in self._executors.values():
                if executor.is_due and len(executor.unacknowledged) < MAX_UNACKNOWLEDGED:
                    self._plan_executor(executor, now_s)
                if not executor.is_lost:
                    self._book.out.extend(SendPlan(executor.name, plan) for plan in executor.to_repeat(now_s))
        out, self._book.out = self._book.out, []
        return out

    def _place_waiting(self, now_s: float) -> None:
        """Place rows, first come first: the head waits for room, and nobody overtakes it."""
        left = MAX_PLAN_START_BYTES
        while left > 0:
            row = self._book.waiting.head()
            if row is None or row.state is not RowState.WAITING:
                return
            executor = placing.choose_executor(self._executors.values(), row, self._max_num_seqs)
            if executor is None:
                return
            self._book.waiting.take_head()
            executor.place(row, next(self._handles))
            executor.grow(row, placing.start_position(executor, row))
            left -= 512 + len(row.request.stop_token_ids) + 4 * sum(map(len, row.tables.blocks))
            if row.request.first_scheduled_s is None:
                row.request.first_scheduled_s = now_s

    def _plan_executor(self, executor: ExecutorState, now_s: float) -> None:
        while victims := placing.give_blocks(executor, self._config.horizon):
            for row in victims:
                executor.remove(row, is_finished=False)
                row.request.num_preemptions += 1
                row.state = RowState.RETURNING if row.is_told else RowState.WAITING
                self._book.waiting.add(row)
        executor.is_due = False  # what was released just now is in this plan
        budget = Budget(
            num_steps=self._config.horizon,
            num_step_tokens=self._config.max_num_batched_tokens,
            num_chunk_tokens=MAX_PLAN_IDS,
        )
        steps = lay_out(executor.rows.values(), budget)
        plan = executor.make_plan(self.epoch, steps, now_s)
        if plan is not None:
            self._book.out.append(SendPlan(executor.name, plan))

    # -- figures ---------------------------------------------------------------------------------------------

    @property
    def figures(self) -> Figures:
        """Load over all live executors."""
        live = [executor for executor in self._executors.values() if not executor.is_lost]
        return Figures(
            num_running=sum(len(executor.rows) for executor in live),
            num_waiting=len(self._book.waiting),
            num_executors=len(live),
            num_blocks=sum(executor.kv.num_blocks for executor in live),
            num_free_blocks=sum(executor.kv.num_free for executor in live),
            block_size=live[0].kv.groups[0].block_size if live else 16,
            max_model_len=self._book.max_model_len,
            full_model_len=min((executor.full_len for executor in live), default=0),
        )
