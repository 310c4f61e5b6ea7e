"""Every message that crosses the bus: msgspec Structs, frozen, tagged by class name, encoded as msgpack.

Rules: only additions, only with defaults. Token ids and per-row arrays are packed little-endian `bytes`
(`pack_ids`/`unpack_ids`: int32; `pack_handles`/`unpack_handles`: uint32). Decode once at the edge with
`decode`, then match on the type; `DecodeError` is all that a malformed message raises.

A *row* is one (request, choice). A row that an executor holds has a *handle*, unique within an epoch.
A row's *ids* are the prompt's and then the generated ones; position p of a row is ids[p].
"""

import sys
from array import array
from collections.abc import Iterable
from typing import Literal, NamedTuple

import msgspec

PROTOCOL_VERSION = 1

FinishReason = Literal["stop", "length"]
"""Why a choice ended: "stop" for a stop id (or, decided by the requester, a stop string), "length"."""


ExecutorPhase = Literal["loading", "compiling", "serving", "draining", "left"]
"""What an executor is at, as its `Hello` says."""


class DecodeError(Exception):
    """Bytes from the bus are not a message of this protocol version."""


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="type", tag=True):
    """Base of all messages. `version` rises only when receivers must not guess."""

    version: int = PROTOCOL_VERSION


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a row's next id is chosen. `seed` is always fixed by the requester.

    Noise is a function of (seed, choice, index of the generated id) alone. Log-probabilities are those of the
    model's own distribution, before anything here changes it.
    """

    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    seed: int = 0
    presence_penalty: float = 0.0  # of ids generated so far, as is the frequency penalty
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0  # of ids of the prompt and generated ones
    logit_bias: dict[int, float] = {}
    allowed_token_ids: bytes = b""  # int32; empty: all
    bad_words: tuple[bytes, ...] = ()  # each int32: the last id is never made right after the others
    num_logprobs: int | None = None  # best ids told beside each one made; None: no log-probabilities
    num_prompt_logprobs: int | None = None  # the same for the prompt's ids

    @property
    def needs_history(self) -> bool:
        """Whether a row's ids so far, prompt included, matter beyond what attention sees."""
        return bool(
            self.presence_penalty
            or self.frequency_penalty
            or self.repetition_penalty != 1.0
            or self.bad_words
            or self.num_prompt_logprobs is not None
        )


class Logprobs(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Log-probabilities (natural) of n consecutive ids, each with `num_top` best ones.

    ```
    ids, values   row i: the id itself | the best | the second best | ...     width 1 + num_top
    ranks         i: how many ids of the vocabulary are at least as probable as the id itself; 1: the best
    ```
    """

    num_top: int = 0
    ids: bytes  # int32 [n, 1 + num_top]
    values: bytes  # float32 [n, 1 + num_top]
    ranks: bytes  # int32 [n]


class ChoiceState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the requester already has of one choice. A choice with a finish reason gets no row."""

    index: int
    ids: bytes = b""  # int32: generated ids received so far
    finish_reason: str | None = None


class Generate(Message, frozen=True, kw_only=True):
    """requester -> scheduler: make these choices, starting after the ids that they have.

    The same `request_id` with a higher `attempt` replaces a lower one. Trace context rides in the bus
    message's headers. `stop_token_ids` end a row with "stop" after the id was made (and delivered) once at
    least `min_tokens` were made; end-of-sequence ids are among them unless the client ignores them.
    `max_tokens` counts all generated ids of a choice, those received included.
    """

    request_id: str
    attempt: int = 1
    model: str
    prompt: bytes  # int32
    choices: tuple[ChoiceState, ...] = (ChoiceState(index=0),)
    sampling: Sampling = Sampling()
    stop_token_ids: bytes = b""  # int32
    max_tokens: int
    min_tokens: int = 0
    priority: int = 0  # lower first
    tenant: str = ""
    cache_salt: str = ""
    time_left_ms: int = 600_000
    is_suspect: bool = False
    num_sole_suspect_deaths: int = 0
    reply: str  # subject for Accepted, Rejected, Tokens, Failed
    life: str  # subject that answers probes


class Accepted(Message, frozen=True, kw_only=True):
    """scheduler -> requester: the attempt is known; repeated every 15 s while nothing else is sent.

    `is_cleared`: an executor thought dead had only been away; what was suspected for that is not any more.
    """

    request_id: str
    attempt: int
    epoch: int
    state: Literal["queued", "running"] = "queued"
    is_cleared: bool = False


class Rejected(Message, frozen=True, kw_only=True):
    """scheduler -> requester: not taken. `code` is machine-readable, `message` carries the numbers."""

    request_id: str
    attempt: int
    code: str  # e.g. "context_length_exceeded", "queue_full"
    message: str
    is_client_fault: bool = True
    retry_after_s: float | None = None


class Cancel(Message, frozen=True, kw_only=True):
    """requester -> scheduler: stop and free these choices (none named: all) of `attempt` and lower ones."""

    request_id: str
    attempt: int
    choices: tuple[int, ...] = ()


class Failed(Message, frozen=True, kw_only=True):
    """anyone -> requester: the attempt ended; `is_retryable` says ask again, else the request ended.

    `is_suspect`: its executor died, perhaps of it; the next `Generate` says so. `was_sole_suspect`: nothing
    else that ran there was under suspicion; the next `Generate` counts these deaths.
    """

    request_id: str
    attempt: int
    code: str
    message: str
    is_client_fault: bool = False
    is_retryable: bool = False
    is_suspect: bool = False
    was_sole_suspect: bool = False


class RowStart(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Descriptor of a row that is new to the executor.

    `num_ids` ids (prompt and received ones) are prefilled in chunks; the first id that the row makes has
    index `num_generated` among the choice's generated ids. The row ends with "length" when that count
    reaches `max_tokens`. Positions below `num_cached` have their KV in the granted blocks already, once
    `copies` (int32 triples: KV group, source block, the row's own block) are done; prefill starts there.
    """

    handle: int
    request_id: str
    attempt: int = 1
    choice: int = 0
    reply: str
    life: str = ""
    sampling: Sampling = Sampling()
    stop_token_ids: bytes = b""  # int32
    num_ids: int
    num_generated: int = 0
    num_cached: int = 0
    copies: bytes = b""
    max_tokens: int
    min_tokens: int = 0
    all_ids: bytes = b""  # int32, `num_ids` of them; only where `sampling.needs_history`


class Chunk(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Prefill positions [start, end) of a row; `ids` are those `end - start` ids (int32).

    The chunk that ends at the row's `num_ids` also samples the row's first id.
    """

    handle: int
    start: int
    end: int
    ids: bytes


class Grant(NamedTuple):
    """Blocks of one KV group put into a row's table from entry `offset` on (absolute, idempotent)."""

    handle: int
    group: int
    offset: int
    blocks: "array[int]"


class Step(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One step of a lease: chunks to prefill and rows that decode one id each; or so many alike."""

    chunks: tuple[Chunk, ...] = ()
    decode: bytes = b""  # uint32 handles
    num_times: int = 1  # more only without chunks


class Plan(Message, frozen=True, kw_only=True):
    """scheduler -> executor: the next steps, a lease. Replaces all steps that are not launched yet.

    Applied in this order: a higher epoch drops every row; a snapshot drops those that `rows` does not name
    (the others keep the executor's own position); `released` handles are dropped;
    new `rows` are added (a handle that exists is left as it is); `grants` are written into the tables;
    blocks are copied for new rows;
    `steps` become the lease. In a step the executor skips rows that finished or are unknown, rows whose
    prefill is not complete (decode), rows whose table has no slot for the next position. A chunk of n
    positions lets the row compute n positions from its own on, as far as the lease brings their ids:
    positions below its own are never computed again.

    `sequence` rises by one a plan within an epoch, from 1. A gap makes the executor say `Hello`. Every
    plan is acknowledged by the next `StepDone`, at once when the executor is idle; one that is not
    acknowledged in 200 ms is sent again. `num_steps_acknowledged`: `StepDone`s up to this count need not be
    repeated.
    """

    executor: str
    epoch: int
    sequence: int
    num_steps_acknowledged: int = 0
    is_snapshot: bool = False
    released: bytes = b""  # uint32 handles
    rows: tuple[RowStart, ...] = ()
    grants: bytes = b""  # uint32 quadruples: handle, KV group, offset, number of blocks (`pack_grants`)
    granted: bytes = b""  # int32: the blocks of all grants, one after the other
    steps: tuple[Step, ...] = ()


class StepDone(Message, frozen=True, kw_only=True):
    """executor -> scheduler: one step is done, or (no handles, `num_steps` unchanged) a bare acknowledgement.

    `num_steps` counts the executor's steps within the epoch, this one included, from 1; the scheduler takes
    them in order and drops what it has. `plan` is the sequence of the last plan taken before this step was
    launched: rows which that plan released are in no later step. For each of `handles`: how many of its
    positions now have their KV in the pages, how many ids it made (0 or 1 for now) and these ids in
    order. Repeated every 200 ms until a plan acknowledges it.
    """

    executor: str
    epoch: int
    plan: int
    num_steps: int
    handles: bytes = b""  # uint32
    num_computed: bytes = b""  # uint32, one a handle
    num_made: bytes = b""  # uint8, one a handle
    ids: bytes = b""  # int32, sum(num_made)
    finished: dict[int, FinishReason] = {}
    failed: dict[int, str] = {}  # handles whose row failed alone, with a message
    duration_us: int = 0


class TokenRow(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """New ids of one row; `index` is the first one's index among the choice's generated ids."""

    request_id: str
    attempt: int = 1
    choice: int = 0
    index: int
    ids: bytes = b""  # int32
    finish_reason: FinishReason | None = None
    logprobs: Logprobs | None = None  # of `ids`
    num_cached: int | None = None  # with a row's first id: positions that the prefix cache gave it


class PromptRow(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Log-probabilities of the prompt's ids at positions `start`, `start` + 1, ... (position 0 has none)."""

    request_id: str
    attempt: int = 1
    start: int
    logprobs: Logprobs


class Tokens(Message, frozen=True, kw_only=True):
    """executor -> requester: all rows of one step that go to one reply subject."""

    epoch: int
    rows: tuple[TokenRow, ...]
    prompts: tuple[PromptRow, ...] = ()


class PoolGroup(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One KV group of an executor's pool: full attention (`window` None) or a sliding window in tokens."""

    num_blocks: int
    block_size: int = 16
    window: int | None = None


class Hello(Message, frozen=True, kw_only=True):
    """executor -> scheduler: at start, each second, on a sequence gap, and when a higher epoch is heard.

    `epoch` and `plan` say what was obeyed last (0, 0 at start). `handles` are the rows held. The leader
    answers with a snapshot when they differ from what it believes.

    `state`: "loading" has no pool yet and takes no rows; "compiling" makes no progress for a good reason;
    "draining" finishes what it has and takes nothing new; "left" is the last word of a process that ends.
    """

    executor: str
    model: str
    epoch: int = 0
    plan: int = 0
    num_steps: int = 0
    handles: bytes = b""  # uint32, ascending
    pool: tuple[PoolGroup, ...]
    max_model_len: int  # what the model itself can do, before the pool's limit
    max_num_seqs: int = 256
    has_gap: bool = False
    state: ExecutorPhase = "serving"
    progress: int = 0  # rises with each part of a step (a layer) that is computed
    slowest_ms: int = 0  # the longest that one such part took so far


class Heartbeat(Message, frozen=True, kw_only=True):
    """scheduler -> all, twice a second while leading. With `is_leaving` it is the last one of the term: the
    leader has sent its last plan, and a standby takes over at once."""

    scheduler: str
    model: str
    epoch: int
    num_running: int = 0
    num_waiting: int = 0
    num_executors: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    block_size: int = 16
    max_model_len: int = 0  # after it was lowered to what the pool holds; 0 while no executor is known
    full_model_len: int = 0  # before that
    num_prefix_queries: int = 0  # tokens of rows that were placed in this term, of which the prefix cache
    num_prefix_hits: int = 0  # had so many
    num_preemptions: int = 0  # rows, in this term
    num_loading: int = 0  # executors that load or compile
    stalled_ms: int = 0  # how long rows run or wait and no executor makes progress, loads or compiles
    is_leaving: bool = False


AnyMessage = Generate | Accepted | Rejected | Cancel | Failed | Plan | StepDone | Tokens | Hello | Heartbeat

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: Message) -> bytes:
    """The message as msgpack bytes."""
    return _encoder.encode(message)


def decode(data: bytes) -> AnyMessage:
    """The message in `data`; raises `DecodeError`, and nothing else, whatever `data` is."""
    try:
        message = _decoder.decode(data)
    except Exception as error:  # deep nesting and bad UTF-8 raise outside msgspec's own errors
        raise DecodeError(f"not a pagebus message: {type(error).__name__}: {error}"[:300]) from error
    if message.version != PROTOCOL_VERSION:
        raise DecodeError(f"protocol version {message.version}, this is {PROTOCOL_VERSION}")
    return message


def _pack(typecode: str, values: Iterable[int]) -> bytes:
    packed = array(typecode, values)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _unpack(typecode: str, data: bytes) -> "array[int]":
    unpacked = array(typecode)
    if len(data) % unpacked.itemsize:
        raise DecodeError(f"{len(data)} bytes are no whole number of {unpacked.itemsize}-byte items")
    unpacked.frombytes(data)
    if sys.byteorder == "big":
        unpacked.byteswap()
    return unpacked


def pack_ids(ids: Iterable[int]) -> bytes:
    """Token or block ids as little-endian int32. Raises `OverflowError` for what does not fit."""
    return _pack("i", ids)


def unpack_ids(data: bytes) -> "array[int]":
    """The inverse of `pack_ids`; raises `DecodeError` for a broken length."""
    return _unpack("i", data)


def pack_handles(handles: Iterable[int]) -> bytes:
    """Handles and counts as little-endian uint32."""
    return _pack("I", handles)


def unpack_handles(data: bytes) -> "array[int]":
    """The inverse of `pack_handles`; raises `DecodeError` for a broken length."""
    return _unpack("I", data)


def pack_grants(grants: Iterable[Grant]) -> tuple[bytes, bytes]:
    """`Plan.grants` and `Plan.granted`."""
    heads, blocks = array("I"), array("i")
    for grant in grants:
        heads.extend((grant.handle, grant.group, grant.offset, len(grant.blocks)))
        blocks.extend(grant.blocks)
    return _pack("I", heads), _pack("i", blocks)


def unpack_grants(plan: Plan) -> list[Grant]:
    """The inverse of `pack_grants`; raises `DecodeError` where lengths do not fit."""
    heads, blocks = unpack_handles(plan.grants), unpack_ids(plan.granted)
    if len(heads) % 4 or sum(heads[3::4]) != len(blocks):
        raise DecodeError(f"{len(heads)} numbers and {len(blocks)} blocks are no grants")
    grants, at = [], 0
    for first in range(0, len(heads), 4):
        handle, group, offset, num_blocks = heads[first : first + 4]
        grants.append(Grant(handle, group, offset, blocks[at : at + num_blocks]))
        at += num_blocks
    return grants


class ApiEvent(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """Base of the public JSON events that a gateway publishes on `subjects.stream(id)`."""

    id: str


class ApiTopLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """One of the most probable tokens at a place; `bytes` are its true ones, also of half a character."""

    token: str
    token_id: int
    logprob: float
    bytes: list[int]


class ApiTokenLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """The log-probability of a token. `rank`: how many ids are at least as probable; 1: the best."""

    token: str
    token_id: int
    logprob: float
    rank: int
    bytes: list[int]
    top_logprobs: list[ApiTopLogprob]


class ApiTokens(ApiEvent, frozen=True, kw_only=True, tag="tokens"):
    """New text of a choice. `index` is the first token's index among the choice's generated tokens.

    Text may lag behind the tokens (a character or a stop string that is not complete yet). Where they were
    asked for, `logprobs` are those of `token_ids`; `prompt_logprobs` come in order before the first token, in
    events without tokens, the first one null; `prompt_start` is the first one's place in the prompt.

    What a reader has already may come again, also in other portions: the index tells.
    """

    choice: int
    index: int
    token_ids: list[int]
    text: str
    finish_reason: FinishReason | None = None
    logprobs: list[ApiTokenLogprob] | None = None
    prompt_logprobs: list[ApiTokenLogprob | None] | None = None
    prompt_start: int | msgspec.UnsetType = msgspec.UNSET


class ApiUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts of a whole request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int = 0  # of the prompt's, from the prefix cache


class ApiDone(ApiEvent, frozen=True, kw_only=True, tag="done"):
    """Every choice ended; nothing follows."""

    usage: ApiUsage


class ApiErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """An error in OpenAI's shape."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ApiError(ApiEvent, frozen=True, kw_only=True, tag="error"):
    """The request ended with an error; nothing follows."""

    error: ApiErrorBody


class ApiAlive(ApiEvent, frozen=True, kw_only=True, tag="alive"):
    """A sign of life while nothing else is sent, every 5 s; also the answer to an accepted request."""


class ApiCancel(msgspec.Struct, frozen=True, kw_only=True):
    """NATS client -> gateways, JSON on `subjects.api_cancel(model)`: stop this request."""

    id: str


AnyApiEvent = ApiTokens | ApiDone | ApiError | ApiAlive
