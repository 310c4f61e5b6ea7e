"""The scheduler's core: requests and reports in, plans and replies out. No I/O, no clock, no torch, no text.

Times are monotonic seconds given by the caller. `plan` returns all that is to be sent, in order; `settle`
does what no plan has to wait for, once that was sent.
"""

import itertools
from collections import Counter
from collections.abc import Mapping

from pagebus.bus.messages import AnyMessage, Cancel, Generate, Hello, StepDone
from pagebus.scheduler import placing, watching
from pagebus.scheduler.actions import Action, Probe, SendPlan
from pagebus.scheduler.blocks import KvPool
from pagebus.scheduler.book import CoreConfig, RequestBook
from pagebus.scheduler.executors import MAX_UNACKNOWLEDGED, ExecutorState, ReportError
from pagebus.scheduler.figures import Figures, Overview
from pagebus.scheduler.planner import MAX_CHUNK_IDS, Budget, choose_horizon, lay_out
from pagebus.scheduler.presence import sound_handles
from pagebus.scheduler.requests import Row, RowState

FORGET_S = 600.0
UPKEEP_INTERVAL_S = 1.0


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
        self._finished: list[tuple[Row, str, float]] = []
        self._overview = Overview(self._executors, self._book)
        self._upkeep_s = float("-inf")
        self._stuck = (0, 0)  # ticket of the row that found no place, and what had changed until then

    # -- terms -----------------------------------------------------------------------------------------------

    def become_leader(self, epoch: int, now_s: float) -> None:
        """Begin a term with nothing: executors say hello, requesters ask again."""
        self.epoch = epoch
        self._clear()
        self._upkeep_s = now_s
        self._overview.stall.forgive(now_s)

    def step_down(self) -> None:
        """End the term; all state is dropped and nothing is sent: another leads."""
        self.epoch = 0
        self._clear()

    # -- requests --------------------------------------------------------------------------------------------

    def on_generate(self, generate: Generate, now_s: float, headers: Mapping[str, str] | None = None) -> None:
        """Take a request, a new attempt of one, or turn it away. `headers` carry its trace context."""
        if self.epoch:
            self._settle_finished()
            self._book.on_generate(generate, now_s, headers)

    def on_cancel(self, cancel: Cancel, now_s: float) -> None:
        """Stop and free rows; nothing more is sent for them."""
        if self.epoch:
            self._settle_finished()
            self._book.on_cancel(cancel, now_s)

    def on_reconnect(self, now_s: float) -> None:
        """The bus was away, and with it everybody: their silence says nothing."""
        for executor in self._executors.values():
            executor.hear(now_s)
            executor.computing.step(now_s)
        self._overview.stall.forgive(now_s)

    def on_fault(self, message: AnyMessage, now_s: float) -> None:
        """Handling this raised: the request fails alone, or the executor is begun with anew."""
        match message:
            case Generate() if self.epoch:
                self._book.on_fault(message, now_s)
            case Hello(executor=name) | StepDone(executor=name) if self.epoch:
                if (executor := self._executors.get(name)) is not None and not executor.is_lost:
                    self._give_up(executor, f"a message of {name} was broken", now_s, is_death=False)

    # -- executors -------------------------------------------------------------------------------------------

    def on_hello(self, hello: Hello, now_s: float) -> None:
        """Note that an executor lives; bring it to our state where it has another one."""
        if self.epoch == 0 or hello.model != self._config.model:
            return
        handles = sound_handles(hello)
        if handles is None:
            self.counters["hello_invalid"] += 1
            return
        if not self._overview.presence.is_here(hello, now_s):
            self._forget(hello, now_s)
            return
        executor = self._executors.get(hello.executor)
        if executor is None:
            self._meet(hello, None, now_s)
            return
        if executor.is_lost:
            if hello.epoch == self.epoch and hello.plan > 0 and not executor.is_stuck:
                for request_id in executor.lost_requests:  # it lives: nothing of it had died
                    self._book.pardon(request_id, now_s)
            self._meet(hello, executor, now_s)
            return
        executor.hear(now_s)
        executor.computing.note(hello, now_s)
        if hello.epoch != self.epoch:
            has_lost_state = executor.acknowledged_before > 0
        else:
            has_lost_state = executor.view_differs(hello, handles)
        if has_lost_state or tuple(hello.pool) != executor.pool:
            self._give_up(executor, f"executor {hello.executor} came back in another state", now_s)
            self._meet(hello, executor, now_s)
        elif hello.has_gap:
            self._book.out.extend(SendPlan(executor.name, plan) for plan in executor.to_repeat(now_s, 0.05))
        self._hand_over(executor, now_s)

    def _forget(self, hello: Hello, now_s: float) -> None:
        """What one that left still had is asked for again at once."""
        executor = self._executors.get(hello.executor)
        if executor is not None and hello.state == "left":
            if not executor.is_lost:
                self._give_up(executor, f"executor {executor.name} left", now_s, is_death=False)
            del self._executors[executor.name]

    def _hand_over(self, executor: ExecutorState, now_s: float) -> None:
        """Rows of one that drains go on elsewhere, as soon as there is anybody to take them."""
        is_leaving = executor.computing.phase == "draining" and not executor.is_lost
        if is_leaving and executor.rows and any(other.is_ready for other in self._executors.values()):
            self._take_away(executor, list(executor.rows.values()), now_s)

    def _meet(self, hello: Hello, old: ExecutorState | None, now_s: float) -> None:
        is_ours = hello.epoch == self.epoch and hello.plan > 0
        executor = ExecutorState(
            hello,
            KvPool(hello.pool, self._config.max_num_batched_tokens),
            max_num_seqs=self._max_num_seqs,
            full_len=min(self._config.max_model_len or hello.max_model_len, hello.max_model_len),
            now_s=now_s,
            handles=self._handles,
            is_caching=self._config.enable_prefix_caching,
        )
        # A Hello's count may lag; what was processed once is never repeated by the executor.
        executor.num_steps = max(hello.num_steps, old.num_steps if old else 0) if is_ours else 0
        executor.num_steps_told = executor.num_steps
        executor.sequence = max(hello.plan if is_ours else 0, old.sequence if old else 0)
        executor.acknowledged = hello.plan if is_ours else 0
        executor.snapshot_sequence = executor.sequence + 1
        executor.computing.follow(old.computing if old else None)
        self._executors[hello.executor] = executor
        self._stuck = (0, 0)
        self._book.fit_waiting(now_s)

    def _give_up(self, executor: ExecutorState, why: str, now_s: float, *, is_death: bool = True) -> None:
        """Tell its rows' requesters to ask again; what it still does is of attempts that nobody follows.

        `is_death`: it may have died of one of them.
        """
        self._settle_finished()
        self._stuck = (0, 0)
        executor.is_lost = True
        executor.lost_requests = []
        rows = [*executor.rows.values(), *(entry.row for entry in executor.returning)]
        suspect = executor.sole_suspect(self._num_harmless)
        for request in {row.request: None for row in rows if row.state is not RowState.OVER}:
            is_suspect = is_death and (suspect is None or request is suspect)
            executor.lost_requests.append(request.request_id)
            self._book.fail(
                request,
                "executor_lost",
                why,
                now_s,
                is_retryable=True,
                is_suspect=is_suspect,
                was_sole_suspect=is_death and request is suspect,
            )
        executor.forget_rows()

    # -- reports ---------------------------------------------------------------------------------------------

    def on_step_done(self, done: StepDone, now_s: float) -> None:
        """Take a report in its order; what was lost on the way comes again, what came twice is dropped."""
        executor = self._executors.get(done.executor)
        if self.epoch == 0 or executor is None or executor.is_lost or done.epoch != self.epoch:
            return
        executor.hear(now_s)
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
        executor.computing.step(now_s)
        try:
            completed = executor.take_report(done, now_s)
        except ReportError as error:
            self._give_up(executor, f"executor {done.executor} sent a broken report: {error}", now_s)
            return
        if executor.suspect is not None:
            executor.clear_suspect(self._num_harmless)
        for row in completed:
            self._book.prefill_done(row, now_s)
        for handle, message in done.failed.items():
            failed = executor.row_of(handle)
            if failed is not None and failed.state is not RowState.OVER:
                # The executor itself told the requester.
                self._book.end_row(failed, "failed", is_finished=True)
                self.counters["row_failed"] += 1
                self._book.end(failed.request, "failed", now_s, message[:200])
        for handle, reason in done.finished.items():
            finished = executor.row_of(handle)
            if finished is not None and finished.state is not RowState.OVER:
                self._finish(executor, finished, reason, now_s)

    def _finish(self, executor: ExecutorState, row: Row, reason: str, now_s: float) -> None:
        """A row's executor has let go of it; the books are closed after the next plan."""
        if row.state is RowState.RUNNING:
            executor.remove(row, is_finished=True)
        elif row.state is RowState.RETURNING:
            self._book.lobby.leave(row)
        row.state = RowState.FINISHED
        self._finished.append((row, reason, now_s))
        executor.is_due |= bool(self._book.lobby.queue) or not executor.rows

    def _settle_finished(self) -> None:
        if self._finished:
            self.settle()

    def settle(self) -> None:
        """After `plan` and the sending of what it gave: ids, digests, ended rows, tenants' counters."""
        if self.epoch == 0:
            return
        for executor in self._executors.values():
            if executor.has_unsettled:
                self._book.pay(executor.settle())
        finished, self._finished = self._finished, []
        for row, reason, now_s in finished:
            if row.state is RowState.FINISHED:
                self._book.close_row(row, reason)
                if not row.request.rows:
                    self._book.end(row.request, "finished", now_s)
                else:
                    self._book.lobby.release_siblings(row.request)

    # -- time ------------------------------------------------------------------------------------------------

    def on_tick(self, now_s: float) -> None:
        """What happens by time alone; call it some times a second."""
        if self.epoch == 0:
            return
        self.settle()
        self._book.end_overdue(now_s)
        for executor in list(self._executors.values()):
            if not executor.is_lost:
                self._watch(executor, now_s)
                self._hand_over(executor, now_s)
            elif now_s - executor.heard_s > FORGET_S:
                del self._executors[executor.name]
        self._overview.note(now_s)
        if now_s - self._upkeep_s >= UPKEEP_INTERVAL_S:
            self._upkeep_s = now_s
            self._upkeep(now_s)

    def _watch(self, executor: ExecutorState, now_s: float) -> None:
        match watching.watch(executor, now_s):
            case watching.Verdict.SILENT:
                silent_s = now_s - executor.heard_s
                self._give_up(executor, f"executor {executor.name} was silent for {silent_s:.1f} s", now_s)
            case watching.Verdict.STUCK:
                stuck_s = now_s - executor.computing.progress_s
                why = f"executor {executor.name} has work and did none for {stuck_s:.1f} s"
                self._give_up(executor, why, now_s)
                executor.is_stuck = True
            case watching.Verdict.PROBE:
                self._book.out.append(Probe(executor.name))

    def on_no_responders(self, name: str, now_s: float) -> None:
        """A probe found nobody listening for its plans. Twice, and nothing heard since: it is gone."""
        executor = self._executors.get(name)
        if self.epoch == 0 or executor is None or executor.is_lost:
            return
        executor.num_no_responders += 1
        if executor.num_no_responders >= watching.MAX_NO_RESPONDERS:
            self._give_up(executor, f"executor {name} is gone from the bus", now_s)

    def _upkeep(self, now_s: float) -> None:
        self._book.keep_up(now_s)
        for executor in self._executors.values():
            executor.acknowledged_before = executor.acknowledged_at_upkeep
            executor.acknowledged_at_upkeep = executor.acknowledged

    # -- plans -----------------------------------------------------------------------------------------------

    def plan(self, now_s: float) -> list[Action]:
        """All that is to be sent now: replies, at most one new plan an executor, and repeated ones."""
        if self.epoch:
            if self._book.lobby.suspects:
                live = self._executors.values()
                self._book.lobby.release_suspects(
                    sum(each.is_ready and each.suspect is None for each in live)
                )
            if self._book.lobby.queue:
                self._place_waiting(now_s)
            for executor in self._executors.values():
                if executor.is_due and len(executor.unacknowledged) < MAX_UNACKNOWLEDGED:
                    self._plan_executor(executor, now_s)
                if not executor.is_lost:
                    self._book.out.extend(SendPlan(executor.name, plan) for plan in executor.to_repeat(now_s))
        out, self._book.out = self._book.out, []
        return out

    def _place_waiting(self, now_s: float) -> None:
        """Place rows in their turn: the head waits for room, and nobody overtakes it."""
        if any(executor.has_ended_rows for executor in self._executors.values()):
            self.settle()
        left = placing.MAX_START_BYTES
        while left > 0:
            row = self._book.lobby.queue.head(now_s)
            if row is None or row.state is not RowState.WAITING:
                return
            stuck = (row.ticket, sum(executor.num_changes for executor in self._executors.values()))
            place = None
            if stuck != self._stuck:
                place = placing.choose_place(self._executors.values(), row, self._num_harmless)
            if place is None:
                self._stuck = stuck
                self._make_room(row, now_s)
                return
            self._book.lobby.queue.remove(row)
            target = placing.start_position(place.executor.kv, row)
            place.executor.place(row, place.hit, place.copies, target, now_s)
            self._book.row_placed(row, place.executor, now_s)
            left -= placing.start_bytes(row)

    def _make_room(self, row: Row, now_s: float) -> None:
        """Preempt for a row that has waited too long, or for one with a better priority."""
        is_starving = self._book.lobby.queue.is_starving(row, now_s)
        for executor in self._executors.values():
            leaving = placing.rows_in_the_way(executor, row, is_starving, now_s, self._config.patience_s)
            if leaving is not None:
                self._preempt(executor, leaving, now_s)
                return

    def _preempt(self, executor: ExecutorState, rows: list[Row], now_s: float) -> None:
        for row in rows:
            row.request.num_preemptions += 1
        self._book.num_preemptions += len(rows)
        self._take_away(executor, rows, now_s)

    def _take_away(self, executor: ExecutorState, rows: list[Row], now_s: float) -> None:
        """Rows leave an executor and go on elsewhere, or here later, before rows that never ran."""
        for row in rows:
            executor.remove(row, is_finished=False)
            row.num_preemptions += 1
            row.waiting_since_s = now_s
            row.state = RowState.RETURNING if row.is_told else RowState.HELD
        self._book.lobby.come_back(rows)

    @property
    def _num_harmless(self) -> int:
        """Who made so many ids since it was placed has got on: more than one lease."""
        return 2 + max((self._horizon(executor) for executor in self._executors.values()), default=0)

    def _horizon(self, executor: ExecutorState) -> int:
        return self._config.horizon or choose_horizon(executor.pace.step_s)

    def _plan_executor(self, executor: ExecutorState, now_s: float) -> None:
        horizon = self._horizon(executor)
        while victims := placing.give_blocks(executor, horizon, now_s, self._config.patience_s):
            if executor.has_ended_rows:
                self._book.pay(executor.settle())  # perhaps nobody has to go
                continue
            self._preempt(executor, victims, now_s)
        executor.is_due = False  # what was released just now is in this plan
        most = self._config.max_num_batched_tokens
        num_step_tokens = min(most, executor.pace.num_step_tokens(len(executor.rows)))
        budget = Budget(num_steps=horizon, num_step_tokens=num_step_tokens, num_chunk_tokens=MAX_CHUNK_IDS)
        steps = lay_out(executor.slots, list(executor.prefilling.values()), budget)
        plan = executor.make_plan(self.epoch, steps, now_s)
        if plan is not None:
            self._book.out.append(SendPlan(executor.name, plan))

    # -- figures ---------------------------------------------------------------------------------------------

    @property
    def figures(self) -> Figures:
        """Load over all live executors."""
        return self._overview.figures
