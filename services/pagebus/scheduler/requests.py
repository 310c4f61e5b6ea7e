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
    pack_ids,
    unpack_ids,
)
from pagebus.scheduler.prefix import root_digest

MAX_CHOICES = 128
MAX_STOP_IDS = 4096
MAX_QUEUED_TOKENS = 1 << 25
"""Ids that waiting requests may hold in memory (128 MiB)."""


class RowState(enum.Enum):
    """Where a row is in its life."""

    WAITING = "waiting"
    HELD = "held"  # waits for the prefill of a sibling choice, whose blocks it will share
    RUNNING = "running"  # has a handle, blocks, and a place in plans
    RETURNING = "returning"  # preempted; the executor has not said yet that it let go
    FINISHED = "finished"  # its executor said so; the books are closed after the next plan
    OVER = "over"


class Row:
    """One (request, choice): its ids so far and, while it runs, where it does.

    Progress of a running row stands in its executor's `SlotTable`; `ids` lag behind it by a block at most.
    """

    __slots__ = (
        "choice",
        "copies",
        "digests",
        "end_position",
        "executor",
        "handle",
        "ids",
        "is_charged",
        "is_told",
        "num_cached",
        "num_ids",
        "num_preemptions",
        "num_received",
        "placed_s",
        "request",
        "serial",
        "slot",
        "state",
        "ticket",
        "waiting_since_s",
    )

    def __init__(self, request: "Request", choice: int, ids: "array[int]", serial: int) -> None:
        self.request = request
        self.choice = choice
        self.ids = ids
        self.serial = serial
        self.state = RowState.WAITING
        self.executor = ""
        self.handle = 0
        self.slot = -1
        self.num_ids = len(ids)  # when it was placed: what its prefill covers
        self.num_received = len(ids) - request.num_prompt  # ids that the attempt came with
        self.num_cached = 0
        self.copies: array[int] = array("i")
        self.digests: list[bytes] = []  # of the full blocks of ids, as far as they were needed
        self.end_position = 0  # KV positions that the whole row needs: the last id's is never computed
        self.is_told = False  # whether a plan has described it to its executor
        self.is_charged = False  # whether its tenant has paid for the prompt
        self.num_preemptions = 0
        self.ticket = 0  # its place in the queue
        self.placed_s = 0.0
        self.waiting_since_s = request.arrival_s

    @property
    def rank(self) -> tuple[int, float, int]:
        """Sorts rows by who goes first: priority, then arrival."""
        return (self.request.priority, self.request.arrival_s, self.serial)

    def place(self, executor: str, now_s: float) -> None:
        """The row is about to run on an executor, under a new handle."""
        self.state = RowState.RUNNING
        self.executor = executor
        self.num_ids = len(self.ids)
        self.num_cached = 0
        self.copies = array("i")
        self.is_told = False
        self.placed_s = now_s

    def start_message(self) -> RowStart:
        """The descriptor that tells an executor of this row."""
        request = self.request
        sampling = request.sampling
        if sampling.num_prompt_logprobs is not None and request.prompt_choice != self.choice:
            sampling = msgspec.structs.replace(sampling, num_prompt_logprobs=None)
        return RowStart(
            handle=self.handle,
            request_id=request.request_id,
            attempt=request.attempt,
            choice=self.choice,
            reply=request.reply,
            life=request.life,
            sampling=sampling,
            stop_token_ids=request.stop_token_ids,
            num_ids=self.num_ids,
            num_generated=self.num_ids - request.num_prompt,
            num_cached=self.num_cached,
            copies=pack_ids(self.copies),
            max_tokens=request.max_tokens,
            min_tokens=request.min_tokens,
            all_ids=pack_ids(self.ids) if sampling.needs_history else b"",
        )

    @property
    def may_hit(self) -> bool:
        """Whether the row may begin after cached positions: not where the prompt's logits are asked for."""
        request = self.request
        return request.sampling.num_prompt_logprobs is None or request.prompt_choice != self.choice


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
    tenant: str
    root: bytes  # where the chain of its blocks' digests begins
    headers: Mapping[str, str]
    arrival_s: float
    deadline_s: float
    last_told_s: float
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    num_preemptions: int = 0
    num_generated: int = 0
    is_suspect: bool = False  # its executor died, perhaps of it; until it has shown that it is harmless
    is_held_back: bool = False  # a suspect whose turn has not come
    num_deaths: int = 0  # of executors that had it as their only suspect
    prompt_choice: int = 0  # whose row tells the prompt's log-probabilities
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
    numbers = (
        sampling.temperature,
        sampling.top_p,
        sampling.min_p,
        sampling.presence_penalty,
        sampling.frequency_penalty,
        sampling.repetition_penalty,
        *sampling.logit_bias.values(),
    )
    if not all(math.isfinite(number) for number in numbers):
        raise RefusedError(Refusal("invalid_request", "the numbers of the sampling must be finite"))
    if sampling.repetition_penalty <= 0:
        raise RefusedError(Refusal("invalid_request", "repetition_penalty must be above 0"))
    for data in (sampling.allowed_token_ids, *sampling.bad_words):
        read_ids(data, "allowed_token_ids or bad_words")
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
        tenant=generate.tenant,
        root=root_digest(generate.tenant, generate.cache_salt),
        is_suspect=generate.is_suspect,
        num_deaths=generate.num_sole_suspect_deaths,
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
