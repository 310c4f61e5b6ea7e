"""The book of requests: what was asked for, what waits, what ended, and what requesters are told of it.

Pure. Knows executors only as holders of rows, and nothing of plans.
"""

import heapq
import itertools
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from pagebus.bus.messages import (
    Accepted,
    Cancel,
    Failed,
    FinishReason,
    Generate,
    TokenRow,
    Tokens,
)
from pagebus.scheduler.actions import Action, Ended, Outcome, SendReply
from pagebus.scheduler.executors import ExecutorState
from pagebus.scheduler.fairness import VirtualCounters
from pagebus.scheduler.lobby import Lobby
from pagebus.scheduler.requests import (
    MAX_QUEUED_TOKENS,
    Refusal,
    RefusedError,
    Request,
    Row,
    RowState,
    context_refusal,
    finish_of,
    has_valid_addresses,
    read_request,
)
from pagebus.scheduler.suspects import MAX_DEATHS
from pagebus.scheduler.waiting import RefusedAttempts, WaitingQueue

ACCEPTED_INTERVAL_S = 15.0
MAX_PARDONED = 100_000


@dataclass(frozen=True, kw_only=True)
class CoreConfig:
    """What the core needs of the settings."""

    model: str
    horizon: int = 0  # 0: chosen from the step time
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_num_queued_reqs: int = 4096
    max_model_len: int = 0  # 0: what the executors allow
    enable_prefix_caching: bool = True
    patience_s: float = 5.0
    """Who was preempted and has waited so long goes first; who came back stays at least as long."""
    tenant_weights: Mapping[str, float] = field(default_factory=dict)


class RequestBook:
    """All attempts of one term that are not over. `executors` is the core's own mapping, by name."""

    def __init__(
        self, config: CoreConfig, epoch: int, executors: Mapping[str, ExecutorState], counters: Counter[str]
    ) -> None:
        self._config = config
        self._epoch = epoch
        self._executors = executors
        self._counters = counters
        self._requests: dict[str, Request] = {}
        self._refused = RefusedAttempts()
        self._pardoned: set[str] = set()
        self._deadlines: list[tuple[float, int, Request]] = []
        self._serials = itertools.count(1)
        self._tenants = VirtualCounters(config.tenant_weights)
        self.lobby = Lobby(WaitingQueue(self._tenants, config.patience_s))
        self.num_prefix_queries = self.num_prefix_hits = self.num_preemptions = 0
        self.out: list[Action] = []

    @property
    def num_requests(self) -> int:
        """Attempts that are not over."""
        return len(self._requests)

    @property
    def max_model_len(self) -> int:
        """Longest sequence that every live executor can hold; 0 while none is known."""
        return min(
            (executor.max_len for executor in self._executors.values() if not executor.is_lost), default=0
        )

    # -- requests --------------------------------------------------------------------------------------------

    def on_generate(self, generate: Generate, now_s: float, headers: Mapping[str, str] | None = None) -> None:
        """Take a request, a new attempt of one, or turn it away."""
        if not has_valid_addresses(generate):
            self._counters["generate_without_address"] += 1
            return
        request_id, attempt = generate.request_id, generate.attempt
        old = self._requests.get(request_id)
        if self._refused.is_refused(request_id, attempt) or (old is not None and attempt < old.attempt):
            self._counters["generate_refused"] += 1
            return
        if old is not None and attempt == old.attempt:
            self._tell_accepted(old, now_s)
            return
        try:
            request, choices = read_request(
                generate, self._config.model, self.max_model_len, headers or {}, now_s
            )
            if generate.attempt == 1:
                self._check_load(request.tenant, request.num_prompt * len(choices))
        except RefusedError as error:
            if old is not None:
                self.end(old, "replaced", now_s)
            self.out.append(SendReply(generate.reply, error.refusal.to_message(generate)))
            return
        if old is not None:
            request.arrival_s = old.arrival_s
            self.end(old, "replaced", now_s)
        is_pardoned = request_id in self._pardoned
        if is_pardoned:
            self._pardoned.discard(request_id)
            request.is_suspect, request.num_deaths = False, 0
        self._start(request, choices, now_s)
        if is_pardoned and request.rows:
            self._tell_accepted(request, now_s, is_cleared=True)
        if request.num_deaths >= MAX_DEATHS and request.rows:
            why = f"{request.num_deaths} executors died while they ran this request"
            self._counters["poison"] += 1
            self.fail(request, "poison_request", why, now_s)

    def _check_load(self, tenant: str, num_tokens: int) -> None:
        num_waiting, limit = self.lobby.num_rows, self._config.max_num_queued_reqs
        # One tenant's flood keeps nobody else out: who has less than a share of the queue gets in behind it.
        is_modest = num_waiting < 2 * limit and self.lobby.queue.has_less_than_its_share(tenant, limit)
        if num_waiting < limit or is_modest:
            if self.lobby.queue.num_tokens + num_tokens <= MAX_QUEUED_TOKENS or num_waiting == 0:
                return
            why = f"{self.lobby.queue.num_tokens} prompt tokens wait, at most {MAX_QUEUED_TOKENS} may"
        else:
            why = f"{num_waiting} rows wait, at most {limit} may"
        num_running = max(1, sum(len(executor.rows) for executor in self._executors.values()))
        raise RefusedError(
            Refusal(
                "queue_full",
                why,
                is_client_fault=False,
                retry_after_s=min(60, 1 + num_waiting // num_running),
            )
        )

    def _start(self, request: Request, choices: dict[int, "array[int]"], now_s: float) -> None:
        if self.max_model_len:
            request.clip(self.max_model_len)
        refused = self._refused.refused_choices(request.request_id, request.attempt)
        self._requests[request.request_id] = request
        for choice, ids in choices.items():
            if choice in refused:
                request.finishes[choice] = "cancelled"
                continue
            reason = finish_of(request, ids)
            if reason is not None:
                request.finishes[choice] = reason
                self._tell_finished(request, choice, len(ids) - request.num_prompt, reason)
                continue
            row = Row(request, choice, ids, next(self._serials))
            row.end_position = request.num_prompt + request.max_tokens - 1
            row.state = RowState.HELD
            request.rows.append(row)
        if not request.rows:
            self.end(request, "finished", now_s)
            return
        request.prompt_choice = request.rows[0].choice
        self.lobby.enter(request)
        heapq.heappush(self._deadlines, (request.deadline_s, request.rows[0].serial, request))
        self._tell_accepted(request, now_s)

    def pardon(self, request_id: str, now_s: float) -> None:
        """An executor that was thought to have died of this request, perhaps, had not."""
        request = self._requests.get(request_id)
        if request is None:
            if len(self._pardoned) < MAX_PARDONED:
                self._pardoned.add(request_id)  # it may be on its way
        else:
            request.is_suspect, request.num_deaths = False, 0
            self._tell_accepted(request, now_s, is_cleared=True)

    def _tell_accepted(self, request: Request, now_s: float, *, is_cleared: bool = False) -> None:
        request.last_told_s = now_s
        is_running = any(row.state is RowState.RUNNING for row in request.rows)
        message = Accepted(
            request_id=request.request_id,
            attempt=request.attempt,
            epoch=self._epoch,
            state="running" if is_running else "queued",
            is_cleared=is_cleared,
        )
        self.out.append(SendReply(request.reply, message))

    def _tell_finished(self, request: Request, choice: int, index: int, reason: FinishReason) -> None:
        # Its last message was lost, so no executor will say it again: an end without ids.
        row = TokenRow(
            request_id=request.request_id,
            attempt=request.attempt,
            choice=choice,
            index=index,
            finish_reason=reason,
        )
        self.out.append(SendReply(request.reply, Tokens(epoch=self._epoch, rows=(row,))))

    def on_cancel(self, cancel: Cancel, now_s: float) -> None:
        """Stop and free rows; nothing more is sent for them."""
        request = self._requests.get(cancel.request_id)
        if request is not None and request.attempt > cancel.attempt:
            return
        if not cancel.choices:
            self._refused.refuse(cancel.request_id, cancel.attempt, now_s)
            if request is not None:
                self.end(request, "cancelled", now_s)
            return
        if request is None or request.attempt < cancel.attempt:
            self._refused.refuse_choices(cancel.request_id, cancel.attempt, cancel.choices, now_s)
        if request is None:
            return
        for row in [row for row in request.rows if row.choice in cancel.choices]:
            self.end_row(row, "cancelled", is_finished=False)
        if not request.rows:
            self.end(request, "cancelled", now_s)

    def on_fault(self, generate: Generate, now_s: float) -> None:
        """Something of ours went wrong while this was handled: it fails alone."""
        if not has_valid_addresses(generate):
            return
        request = self._requests.get(generate.request_id)
        if request is not None and request.attempt == generate.attempt:
            self.fail(request, "internal_error", "the scheduler failed to handle this request", now_s)
        elif request is None:
            failed = Failed(
                request_id=generate.request_id,
                attempt=generate.attempt,
                code="internal_error",
                message="the scheduler failed to handle this request",
            )
            self.out.append(SendReply(generate.reply, failed))

    def fail(
        self,
        request: Request,
        code: str,
        message: str,
        now_s: float,
        *,
        is_client_fault: bool = False,
        is_retryable: bool = False,
        is_suspect: bool = False,
        was_sole_suspect: bool = False,
    ) -> None:
        """End an attempt and tell its requester why."""
        failed = Failed(
            request_id=request.request_id,
            attempt=request.attempt,
            code=code,
            message=message,
            is_client_fault=is_client_fault,
            is_retryable=is_retryable,
            is_suspect=is_suspect,
            was_sole_suspect=was_sole_suspect,
        )
        self.out.append(SendReply(request.reply, failed))
        self.end(request, "failed", now_s, code)

    def end(self, request: Request, outcome: Outcome, now_s: float, code: str = "") -> None:
        """End an attempt; its rows leave, and nothing is sent."""
        for row in list(request.rows):
            self.end_row(row, outcome, is_finished=False)
        del self._requests[request.request_id]
        self._refused.refuse(request.request_id, request.attempt, now_s)
        self.out.append(
            Ended(
                request_id=request.request_id,
                attempt=request.attempt,
                outcome=outcome,
                code=code,
                finish_reasons=tuple(request.finishes[choice] for choice in sorted(request.finishes)),
                arrival_s=request.arrival_s,
                first_scheduled_s=request.first_scheduled_s,
                first_token_s=request.first_token_s,
                end_s=now_s,
                num_prompt_tokens=request.num_prompt,
                num_generated_tokens=request.num_generated,
                num_preemptions=request.num_preemptions,
                headers=request.headers,
            )
        )

    def end_row(self, row: Row, reason: str, *, is_finished: bool) -> None:
        """A row is over. `is_finished`: its executor said so, and writes nothing for it any more."""
        state = row.state
        if state is RowState.RUNNING:
            executor = self._executors[row.executor]
            executor.settle_ids(row)
            executor.remove(row, is_finished=is_finished)
            if self.lobby.queue or not executor.rows:
                executor.is_due = True
        elif state is not RowState.FINISHED:
            self.lobby.leave(row)
        self.close_row(row, reason)
        self.lobby.release_siblings(row.request)

    def close_row(self, row: Row, reason: str) -> None:
        """A row that no executor runs and that does not wait is over."""
        request = row.request
        row.state = RowState.OVER
        request.rows.remove(row)
        request.finishes[row.choice] = reason
        request.num_generated += len(row.ids) - request.num_prompt - row.num_received

    def row_placed(self, row: Row, executor: ExecutorState, now_s: float) -> None:
        """A row is about to run."""
        request = row.request
        if request.first_scheduled_s is None:
            request.first_scheduled_s = now_s
        executor.slots.tenant[row.slot] = self._tenants.number(request.tenant)
        self.num_prefix_queries += row.num_ids
        self.num_prefix_hits += row.num_cached
        if not row.is_charged:
            row.is_charged = True
            self._tenants.pay_input(request.tenant, row.num_ids - row.num_cached)

    def prefill_done(self, row: Row, now_s: float) -> None:
        """A row's prompt is computed, and its first id made."""
        request = row.request
        request.last_told_s = now_s
        if request.first_token_s is None:
            request.first_token_s = now_s
        if len(request.rows) > 1:
            self.lobby.release_siblings(request)

    def pay(self, service: Mapping[int, int]) -> None:
        """Ids were made: their numbers, by the tenant's number."""
        for number, num_ids in service.items():
            self._tenants.pay_output(number, num_ids)

    def fit_waiting(self, now_s: float) -> None:
        """What waits was perhaps accepted before the context's limit was known."""
        max_model_len = self.max_model_len
        for request in {row.request: None for row in self.lobby.queue}:
            if request.first_scheduled_s is not None:
                continue  # it runs elsewhere, within its limits
            refusal = context_refusal(max(len(row.ids) for row in request.rows), max_model_len)
            if refusal is not None:
                self.fail(request, refusal.code, refusal.message, now_s, is_client_fault=True)
            else:
                request.clip(max_model_len)

    # -- time ------------------------------------------------------------------------------------------------

    def end_overdue(self, now_s: float) -> None:
        """Fail the requests whose time is over."""
        while self._deadlines and self._deadlines[0][0] <= now_s:
            _, _, request = heapq.heappop(self._deadlines)
            if self._requests.get(request.request_id) is request:
                allowed_s = request.deadline_s - request.arrival_s
                self.fail(request, "timeout", f"the request's time of {allowed_s:.1f} s is over", now_s)

    def keep_up(self, now_s: float) -> None:
        """Once a second: signs of life to requesters that heard nothing for long, and forgetting."""
        self._refused.prune(now_s)
        for request in self._requests.values():
            if now_s - request.last_told_s >= ACCEPTED_INTERVAL_S:
                request.last_told_s = max(request.last_told_s, self._made_s(request))
            if now_s - request.last_told_s >= ACCEPTED_INTERVAL_S:
                self._tell_accepted(request, now_s)
        if len(self._deadlines) > 2 * len(self._requests) + 64:
            self._deadlines = [
                entry for entry in self._deadlines if self._requests.get(entry[2].request_id) is entry[2]
            ]
            heapq.heapify(self._deadlines)

    def _made_s(self, request: Request) -> float:
        """When the newest id of the request came."""
        return max(
            (
                float(self._executors[row.executor].slots.made_s[row.slot])
                for row in request.rows
                if row.state is RowState.RUNNING
            ),
            default=0.0,
        )
