"""What must hold in a run at any time, and what must be left at its end: nothing. Changes nothing."""

import contextvars

from pagebus.bus import subjects
from pagebus.bus.memory import MemoryBroker
from pagebus.bus.messages import DecodeError, Tokens, decode
from pagebus.bus.protocol import Handler, Msg
from pagebus.executor.rows import Row
from pagebus.requester.client import Requester
from pagebus.requester.events import RequestFailed, RequestSpec
from pagebus.scheduler import audit
from pagebus.scheduler.core import SchedulerCore
from pagebus.scheduler.executors import ExecutorState
from pagebus.sim.client import LATE_S, TERM_ATTEMPTS, Client, ViolationError
from pagebus.sim.processes import Process, Processes
from pagebus.sim.scenario import Scenario

NOBODY = contextvars.Context()
"""The context of what belongs to no process."""
_DEATHS_TO_CONDEMN = 2
ORPHAN_S = 2.0


def spec_of_term(client: Client, timeout_s: float) -> RequestSpec:
    """What an owner asks for: the first all of it, later ones the rest, with attempts above those before."""
    spec = client.spec
    return RequestSpec(
        request_id=spec.request_id,
        prompt=spec.prompt,
        num_choices=spec.num_choices,
        sampling=spec.sampling,
        stop_token_ids=spec.stop_token_ids,
        max_tokens=spec.max_tokens,
        min_tokens=spec.min_tokens,
        priority=spec.priority,
        tenant=spec.tenant,
        timeout_s=timeout_s,
        received=client.as_received() if client.term else (),
        first_attempt=client.term * TERM_ATTEMPTS + 1,
    )


def is_legitimate(
    client: Client,
    failure: RequestFailed,
    *,
    attempt: int,
    scenario: Scenario,
    num_executor_faults: int,
    now_s: float,
) -> bool:
    """Whether a request may fail like that, then and there."""
    match failure.code:
        case "timeout":
            return now_s >= client.deadline_s - 0.01 and client.spec.timeout_s < 100.0
        case "queue_full":
            return attempt == 1 and scenario.max_num_queued_reqs < 100
        case "poison_request":
            return client.poison_index is not None or num_executor_faults >= _DEATHS_TO_CONDEMN
        case "row_failed":
            return client.raises
        case "shutting_down":
            return True
        case _:
            return False


def tap_rows(broker: MemoryBroker, process: Process) -> "Tap | None":
    """From now on it is noted where a row of another attempt than the current one adds ids to a request."""
    requester = process.requester
    if requester is None:
        return None
    for subscription in broker.subscriptions:
        if subscription.bus is process.bus and subscription.subject == subjects.out(process.name):
            tap = Tap(requester, subscription.handler)
            subscription.handler = tap
            return tap
    return None


class Tap:
    """Stands before a requester's own handler. `flaw`: what was seen that must not be."""

    def __init__(self, requester: Requester, handler: Handler) -> None:
        self.flaw: str | None = None
        self._requester = requester
        self._handler = handler

    def __call__(self, message: Msg) -> None:
        before = self._held(message)
        self._handler(message)
        for (request_id, choice, attempt), (num, current) in before.items():
            live = self._requester._live.get(request_id)
            if live is None or attempt == current:
                continue
            if live.state.num_ids(choice) != num:
                self.flaw = f"{request_id}: ids of attempt {attempt} while {current} is the current one"

    def _held(self, message: Msg) -> dict[tuple[str, int, int], tuple[int, int]]:
        try:
            tokens = decode(message.data)
        except DecodeError:
            return {}
        held = {}
        for row in tokens.rows if isinstance(tokens, Tokens) else ():
            live = self._requester._live.get(row.request_id)
            if live is not None and row.attempt != live.state.attempt:
                key = (row.request_id, row.choice, row.attempt)
                held[key] = (live.state.num_ids(row.choice), live.state.attempt)
        return held


def check_executors(processes: Processes) -> None:
    """An executor holds each choice of a request once, and no row writes where another one reads."""
    for name, process in processes.live.items():
        state = process.steps.state if process.steps else None
        if state is None:
            continue
        choices = state.live_choices
        if len(set(choices)) != len(choices):
            raise ViolationError(f"{name} runs a choice twice: {sorted(choices)}")


def check_orphans(processes: Processes, now_s: float) -> None:
    """Where only processes die: rows of a requester that is gone end within two seconds.

    Counted from when the executor has both: a row that had to wait comes to it after its owner's death.
    """
    since_s = processes.orphaned_s
    orphaned = {}
    for name, process in processes.live.items():
        state = process.steps.state if process.steps else None
        for row in state.live_rows if state is not None else ():
            if row.start.life not in processes.gone_s:
                continue
            key = (name, processes.began_s[name], row.start.handle)
            orphaned[key] = since_s.get(key, now_s)
            if now_s > orphaned[key] + ORPHAN_S:
                raise ViolationError(
                    f"{name} runs {row.start.request_id} without an owner since {orphaned[key]}"
                )
    processes.orphaned_s = orphaned


def check_books(processes: Processes) -> None:
    """Every leader's books are right, and executors of its term write only what is theirs by these."""
    for name, process in processes.live.items():
        core = process.scheduler.core if process.scheduler else None
        if core is None or not core.epoch:
            continue
        flaw = audit.flaw_of(core)
        if flaw is not None:
            raise ViolationError(f"{name}: {flaw}")
        for executor in core._executors.values():
            other = processes.live.get(executor.name)
            if other is not None and not executor.is_lost and not executor.needs_snapshot:
                _compare(core, executor, other)


def _compare(core: SchedulerCore, executor: ExecutorState, process: Process) -> None:
    state = process.steps.state if process.steps else None
    if state is None or state.view.epoch != core.epoch or state.view.plan < executor.snapshot_sequence:
        return
    if state.view.plan > executor.sequence:
        return  # it was met anew, by an older Hello
    for row in state.live_rows:
        flaw = _flaw_of_row(executor, row)
        if flaw is not None:
            raise ViolationError(f"{executor.name} runs {row.start.request_id}.{row.start.choice}: {flaw}")


def _flaw_of_row(executor: ExecutorState, row: Row) -> str | None:
    known = executor.row_of(row.start.handle)
    if known is None:
        return "its blocks are free"
    slots, slot = executor.slots, known.slot
    for g, table in enumerate(row.tables):
        first = max(row.position // row.block_size, int(slots.num_dropped[g, slot]))
        if first < int(slots.num_dropped[g, slot]):
            return "blocks that it will write are free"
        ours = slots.tables[g][slot, first : slots.num_entries[g, slot]].tolist()
        if list(table[first:]) != ours[: max(0, len(table) - first)]:
            return f"it writes blocks {list(table[first:])}, and {ours} are its own"
    return None


def leftovers(processes: Processes, scenario: Scenario) -> list[str]:
    """What is still held, or not there; nothing, when all is idle and well."""
    left = []
    leaders = [
        process.scheduler.core
        for process in processes.live.values()
        if process.scheduler and process.scheduler.core.epoch
    ]
    if len(leaders) != 1:
        left.append(f"{len(leaders)} leaders")
    for core in leaders:
        left += [f"{name}: {count}" for name, count in audit.leftovers(core).items()]
        if sum(executor.is_ready for executor in core._executors.values()) != scenario.num_executors:
            left.append("not all executors are ready")
    for name, process in processes.live.items():
        state = process.steps.state if process.steps else None
        if state is not None and (state.live_rows or state.num_steps_left):
            left.append(f"{name}: rows or steps")
        if process.requester is not None and process.requester.num_live:
            left.append(f"{name}: {process.requester.num_live} requests")
    if len(processes.live) != scenario.num_executors + scenario.num_schedulers + scenario.num_gateways:
        left.append(f"{len(processes.live)} processes")
    return left


__all__ = ["LATE_S", "NOBODY", "RequestSpec"]
