"""What leaves the executor after a step: `Report`, and the `Outbox` of `StepDone`s not acknowledged yet.

Pure: knows messages and times given to it, neither the bus nor a clock.
"""

from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pagebus.bus.messages import (
    Failed,
    FinishReason,
    Logprobs,
    PromptRow,
    StepDone,
    TokenRow,
    Tokens,
    pack_handles,
    pack_ids,
)
from pagebus.executor.rows import Row

REPEAT_INTERVAL_S = 0.2


class RowResult(NamedTuple):
    """What a step did to a row: the id it made, or None. The row has been advanced already."""

    row: Row
    made: int | None
    logprobs: Logprobs | None = None  # of `made`
    prompt: tuple[int, Logprobs] | None = None  # log-probabilities of the prompt's ids from a position on


class RowFailure(NamedTuple):
    """A row that ended without a finish reason: retryable where the fault was not the row's own."""

    row: Row
    message: str
    code: str
    is_retryable: bool


@dataclass(slots=True)
class Report:
    """The messages of one step."""

    done: StepDone
    tokens: dict[str, Tokens] = field(default_factory=dict)  # by reply subject
    failures: list[tuple[str, Failed]] = field(default_factory=list)  # (reply subject, message)


def make_report(
    *,
    executor: str,
    epoch: int,
    plan: int,
    num_steps: int,
    results: Sequence[RowResult] = (),
    failures: Iterable[RowFailure] = (),
    duration_s: float = 0.0,
) -> Report:
    """A step's messages: one `StepDone`, one `Tokens` a reply subject, one `Failed` a request and attempt."""
    handles: list[int] = []
    positions: list[int] = []
    counts = bytearray()
    ids: list[int] = []
    finished: dict[int, FinishReason] = {}
    for result in results:
        row = result.row
        handles.append(row.start.handle)
        positions.append(row.position)
        counts.append(result.made is not None)
        if result.made is not None:
            ids.append(result.made)
            if row.finish_reason is not None:
                finished[row.start.handle] = row.finish_reason
    failed: dict[int, str] = {}
    told: dict[tuple[str, str, int], Failed] = {}
    for failure in failures:
        start = failure.row.start
        handles.append(start.handle)
        positions.append(failure.row.position)
        counts.append(0)
        failed[start.handle] = failure.message
        told.setdefault((start.reply, start.request_id, start.attempt), _told(failure))
    done = StepDone(
        executor=executor,
        epoch=epoch,
        plan=plan,
        num_steps=num_steps,
        handles=pack_handles(handles),
        num_computed=pack_handles(positions),
        num_made=bytes(counts),
        ids=pack_ids(ids),
        finished=finished,
        failed=failed,
        duration_us=round(duration_s * 1e6),
    )
    return Report(
        done=done,
        tokens=_tokens(epoch, results),
        failures=[(reply, message) for (reply, _, _), message in told.items()],
    )


def _tokens(epoch: int, results: Sequence[RowResult]) -> dict[str, Tokens]:
    """What a step tells requesters, by reply subject."""
    rows: defaultdict[str, list[TokenRow]] = defaultdict(list)
    prompts: defaultdict[str, list[PromptRow]] = defaultdict(list)
    for row, made, logprobs, prompt in results:
        if prompt is not None:
            prompts[row.start.reply].append(_prompt_row(row, *prompt))
        if made is not None:
            rows[row.start.reply].append(row.token_row(pack_ids((made,)), logprobs))
    return {
        reply: Tokens(epoch=epoch, rows=tuple(rows[reply]), prompts=tuple(prompts[reply]))
        for reply in [*rows, *(reply for reply in prompts if reply not in rows)]
    }


def _prompt_row(row: Row, start: int, logprobs: Logprobs) -> PromptRow:
    return PromptRow(
        request_id=row.start.request_id, attempt=row.start.attempt, start=start, logprobs=logprobs
    )


def _told(failure: RowFailure) -> Failed:
    return Failed(
        request_id=failure.row.start.request_id,
        attempt=failure.row.start.attempt,
        code=failure.code,
        message=failure.message,
        is_retryable=failure.is_retryable,
    )


class Outbox:
    """`StepDone`s in order, each kept and repeated until a plan of its epoch acknowledges it."""

    def __init__(self) -> None:
        self._epoch = 0
        self._waiting: deque[StepDone] = deque()
        self._sent_at_s = 0.0

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, done: StepDone, now_s: float) -> None:
        """Keep one that is being sent at `now_s`. The first of a higher epoch drops all of the former one."""
        if done.epoch < self._epoch:
            return
        self._enter(done.epoch)
        if not self._waiting:
            self._sent_at_s = now_s
        self._waiting.append(done)

    def acknowledge(self, epoch: int, num_steps: int) -> None:
        """A plan of `epoch` says that `StepDone`s up to `num_steps` arrived."""
        if epoch < self._epoch:
            return
        self._enter(epoch)
        while self._waiting and self._waiting[0].num_steps <= num_steps:
            self._waiting.popleft()

    def due(self, now_s: float) -> list[StepDone]:
        """All that wait, in order, where the oldest was sent `REPEAT_INTERVAL_S` ago or earlier."""
        if not self._waiting or now_s - self._sent_at_s < REPEAT_INTERVAL_S:
            return []
        self._sent_at_s = now_s
        return list(self._waiting)

    def _enter(self, epoch: int) -> None:
        if epoch > self._epoch:
            self._epoch = epoch
            self._waiting.clear()
