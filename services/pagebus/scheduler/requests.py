"""Requests and rows as the scheduler holds them, and the rules by which a `Generate` is turned away."""

import enum
import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from pagebus.bus import subjects
from pagebus.bus.messages import (
    DecodeError,
    FinishReason,
    Generate,
    Rejected,
    RowStart,
    Sampling,
    unpack_ids,
)
from pagebus.scheduler.blocks import Tables

MAX_CHOICES = 128
MAX_STOP_IDS = 4096
MAX_QUEUED_TOKENS = 1 << 25
"""Ids that waiting requests may hold in memory (128 MiB)."""


class RowState(enum.Enum):
    """Where a row is in its life."""

    WAITING = "waiting"
    RUNNING = "running"  # has a handle, blocks, and a place in plans
    RETURNING = "returning"  # preempted; the executor has not said yet that it let go
    OVER = "over"


class Row:
    """One (request, choice): its ids so far and, while it runs, its handle, blocks and progress.

    ```
    ids       | prompt | received | made ... |
    num_ids   length of ids when the row was placed: what its prefill covers
    position  positions whose KV the executor has reported
    target    position that the newest plan brings it to
    ```
    """

    __slots__ = (
        "choice",
        "end_position",
        "executor",
        "handle",
        "ids",
        "is_told",
        "num_ids",
        "position",
        "request",
        "serial",
        "state",
        "tables",
        "target",
    )

    def __init__(self, request: "Request", choice: int, ids: "array[int]", serial: int) -> None:
        self.request = request
        self.choice = choice
        self.ids = ids
        self.serial = serial
        self.state = RowState.WAITING
        self.executor = ""
        self.handle = 0
        self.num_ids = len(ids)
        self.position = 0
        self.target = 0
        self.end_position = 0  # KV positions that the whole row needs: the last id's is never computed
        self.tables = Tables(0)
        self.is_told = False  # whether a plan has described it to its executor

    @property
    def age(self) -> tuple[float, int]:
        """Sorts rows by arrival."""
        return (self.request.arrival_s, self.serial)

    def place(self, executor: str, handle: int, num_groups: int) -> None:
        """The row is about to run on an executor, from its first position and under a new handle."""
        self.state = RowState.RUNNING
        self.executor = executor
        self.handle = handle
        self.num_ids = len(self.ids)
        self.position = 0
        self.target = 0
        self.tables = Tables(num_groups)
        self.is_told = False

    def start_message(self) -> RowStart:
        """The descriptor that tells an executor of this row."""
        request = self.request
        return RowStart(
            handle=self.handle,
            request_id=request.request_id,
            attempt=request.attempt,
            choice=self.choice,
            reply=request.reply,
            life=request.life,
            sampling=request.sampling,
            stop_token_ids=request.stop_token_ids,
            num_ids=self.num_ids,
            num_generated=self.num_ids - request.num_prompt,
            max_tokens=request.max_tokens,
            min_tokens=request.min_tokens,
        )


@dataclass(slots=True, eq=False)
class Request:
    """One attempt of a request. Times are monotonic seconds."""

    request_id: str
    attempt: int
    reply: str
    life: str
    sampling: Sampling
    stop_token_ids: bytes
    num_prompt: int
    max_tokens: int
    min_tokens: int
    priority: int
    headers: Mapping[str, str]
    arrival_s: float
    deadline_s: float
    last_told_s: float
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    num_preemptions: int = 0
    num_generated: int = 0
    rows: list[Row] = field(default_factory=list)  # those that are not over
    finishes: dict[int, str] = field(default_factory=dict)  # by choice, of this attempt

    def clip(self, max_model_len: int) -> None:
        """Lower `max_tokens` so that the longest row fits `max_model_len` positions."""
        self.max_tokens = min(self.max_tokens, max_model_len - self.num_prompt)
        for row in self.rows:
            row.end_position = self.num_prompt + self.max_tokens - 1


class Refusal(msgspec.Struct, frozen=True):
    """Why a `Generate` is turned away."""

    code: str
    message: str
    is_client_fault: bool = True
    retry_after_s: float | None = None

    def to_message(self, generate: Generate) -> Rejected:
        """As the requester is told."""
        return Rejected(
            request_id=generate.request_id,
            attempt=generate.attempt,
            code=self.code,
            message=self.message,
            is_client_fault=self.is_client_fault,
            retry_after_s=self.retry_after_s,
        )


class RefusedError(Exception):
    """A `Generate` is turned away."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


def has_valid_addresses(generate: Generate) -> bool:
    """Whether its id and its subjects can be used at all: an answer goes nowhere otherwise."""
    if not subjects.is_part(generate.request_id) or not 1 <= generate.attempt < 1 << 31:
        return False
    out_part, life_part = generate.reply.rpartition(".")[2], generate.life.rpartition(".")[2]
    if not subjects.is_part(out_part) or subjects.out(out_part) != generate.reply:
        return False
    return not generate.life or (subjects.is_part(life_part) and subjects.life(life_part) == generate.life)


def context_refusal(num_prompt: int, max_model_len: int) -> Refusal | None:
    """A prompt that leaves no room for one more token."""
    if num_prompt + 1 <= max_model_len:
        return None
    return Refusal(
        "context_length_exceeded",
        f"the prompt has {num_prompt} tokens; with at least one generated token that exceeds the maximum "
        f"context length of {max_model_len} tokens",
    )


def read_ids(data: bytes, what: str) -> "array[int]":
    """Packed ids. Raises `RefusedError` for a broken length or a negative id."""
    try:
        ids = unpack_ids(data)
    except DecodeError as error:
        raise RefusedError(Refusal("invalid_request", f"{what}: {error}")) from error
    if ids and min(ids) < 0:
        raise RefusedError(Refusal("invalid_request", f"{what} holds the negative id {min(ids)}"))
    return ids


def _check_limits(generate: Generate, model: str) -> None:
    if generate.model != model:
        raise RefusedError(Refusal("model_not_found", f"model {generate.model[:200]!r} is not {model!r}"))
    num_choices = len(generate.choices)
    if not 1 <= num_choices <= MAX_CHOICES:
        raise RefusedError(
            Refusal("invalid_request", f"{num_choices} choices; from 1 to {MAX_CHOICES} are possible")
        )
    indices = {choice.index for choice in generate.choices}
    if len(indices) != num_choices or min(indices) < 0 or max(indices) >= 1 << 31:
        raise RefusedError(Refusal("invalid_request", "the choices' indices must differ and be 0 or more"))
    if generate.max_tokens < 1:
        raise RefusedError(
            Refusal("invalid_request", f"max_tokens is {generate.max_tokens}; at least 1 is needed")
        )
    sampling = generate.sampling
    numbers = (sampling.temperature, sampling.top_p, sampling.min_p)
    if not all(math.isfinite(number) for number in numbers):
        raise RefusedError(Refusal("invalid_request", "temperature, top_p and min_p must be finite numbers"))
    if len(read_ids(generate.stop_token_ids, "stop_token_ids")) > MAX_STOP_IDS:
        raise RefusedError(Refusal("invalid_request", f"more than {MAX_STOP_IDS} stop ids"))


def read_request(
    generate: Generate, model: str, max_model_len: int, headers: Mapping[str, str], now_s: float
) -> tuple[Request, dict[int, "array[int]"]]:
    """The request, without rows, and by choice that is still open its ids (the prompt's and those received).

    `max_model_len` 0: not known yet. Raises `RefusedError`.
    """
    _check_limits(generate, model)
    prompt = read_ids(generate.prompt, "prompt")
    if not prompt:
        raise RefusedError(Refusal("invalid_request", "the prompt is empty; at least 1 token is needed"))
    refusal = context_refusal(len(prompt), max_model_len) if max_model_len else None
    if refusal is not None:
        raise RefusedError(refusal)
    request = Request(
        request_id=generate.request_id,
        attempt=generate.attempt,
        reply=generate.reply,
        life=generate.life,
        sampling=generate.sampling,
        stop_token_ids=generate.stop_token_ids,
        num_prompt=len(prompt),
        max_tokens=generate.max_tokens,
        min_tokens=generate.min_tokens,
        priority=generate.priority,
        headers=headers,
        arrival_s=now_s,
        deadline_s=now_s + generate.time_left_ms / 1000,
        last_told_s=now_s,
    )
    open_choices = {
        choice.index: prompt + read_ids(choice.ids, f"choice {choice.index}")
        for choice in generate.choices
        if choice.finish_reason is None
    }
    return request, open_choices


def finish_of(request: Request, ids: "array[int]") -> FinishReason | None:
    """Why a choice with `ids` (prompt and received) has ended already, or None. Its last message was lost."""
    num_generated = len(ids) - request.num_prompt
    if num_generated == 0:
        return None
    if ids[-1] in unpack_ids(request.stop_token_ids) and num_generated >= request.min_tokens:
        return "stop"
    return "length" if num_generated >= request.max_tokens else None
