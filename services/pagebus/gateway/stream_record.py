"""What is kept of a request so that any gateway can tell its answer again: the record, and where it lies.

Pure. It knows neither the bucket nor HTTP.
"""

import hashlib
from typing import Literal

import msgspec

from pagebus.gateway.generation_events import GenerationRequest
from pagebus.gateway.jobs import Echo, Job
from pagebus.gateway.request_ids import LOCATOR_CHARS
from pagebus.gateway.sampling_params import TokenDetails
from pagebus.gateway.shapes import AnswerShape
from pagebus.gateway.tracing import NO_TRACE, RequestTrace

Kind = Literal["chat", "completion", "api"]

RECORD_VERSION = 1


class Segment(msgspec.Struct, frozen=True):
    """A time of ownership: whose reply subject the tokens went to, from which message of the log on (at
    most; it may begin later)."""

    owner: str
    first_sequence: int


class StreamRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One request of a client, whoever owns it. Changed by compare-and-set only.

    `term` rises with each owner; attempts of a term are all higher than those of the terms before.
    """

    version: int = RECORD_VERSION
    id: str  # the answer's id, or the one that a NATS client chose
    kind: Kind
    tenant: str
    model: str
    fingerprint: str
    created: int
    details: TokenDetails
    requests: tuple[GenerationRequest, ...]
    is_stream: bool = True
    has_usage_chunk: bool = False
    has_usage_everywhere: bool = False
    echoes: tuple[Echo, ...] = ()
    is_echo_only: bool = False
    deadline_s: float  # unix time
    body_digest: bytes = b""  # of the route and body, where an idempotency key came with it
    term: int = 0
    segments: tuple[Segment, ...]
    is_cancelled: bool = False  # by its client, for good
    is_void: bool = False  # refused before it began: its place may be taken

    @property
    def owner(self) -> str:
        """The process that owns it, unless it is gone."""
        return self.segments[-1].owner

    @property
    def first_attempt(self) -> int:
        """The first attempt of this term."""
        return self.term * ATTEMPTS_A_TERM + 1

    def taken_by(self, owner: str, first_sequence: int) -> "StreamRecord":
        """The record of the next term."""
        segments = (*self.segments, Segment(owner, first_sequence))
        return msgspec.structs.replace(self, term=self.term + 1, segments=segments)

    @property
    def max_tokens(self) -> int:
        """Most tokens of a choice."""
        return max(request.max_tokens or 1 for request in self.requests)

    @property
    def num_choices(self) -> int:
        """Choices of all prompts together."""
        return sum(request.num_choices for request in self.requests)


ATTEMPTS_A_TERM = 1 << 16
MAX_TERM = (1 << 14) - 1
"""Attempts stay below 2^31 on the bus."""

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(StreamRecord)


class BrokenRecordError(Exception):
    """A value of the bucket is no record of this version."""


def encode_record(record: StreamRecord) -> bytes:
    """The record as bytes."""
    return _encoder.encode(record)


def decode_record(data: bytes) -> StreamRecord:
    """The record in `data`; raises `BrokenRecordError`."""
    try:
        record = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BrokenRecordError(str(error)[:200]) from error
    if record.version != RECORD_VERSION or not record.requests or not record.segments:
        raise BrokenRecordError(f"version {record.version}, this is {RECORD_VERSION}")
    return record


def record_key(tenant: str, locator: str) -> str:
    """Where a tenant's record lies. Nobody else finds it, whatever id they ask for."""
    return hashlib.sha256(b"%b\0%b" % (tenant.encode(), locator.encode())).hexdigest()


def locator_of(answer_id: str) -> str:
    """The part of an answer's id that says where its record lies; "" where it is none."""
    _, dash, rest = answer_id.rpartition("-")
    return rest[:LOCATOR_CHARS] if dash and len(rest) > LOCATOR_CHARS else ""


def api_locator(request_id: str) -> str:
    """The same for the id that a NATS client chose; never that of an answer."""
    return f"api:{request_id}"


def idempotent_locator(tenant: str, key: str) -> str:
    """Where the request with this `Idempotency-Key` lies: the second one finds the first."""
    return hashlib.sha256(b"idempotency\0%b\0%b" % (tenant.encode(), key.encode())).hexdigest()[
        :LOCATOR_CHARS
    ]


def record_of(job: Job, segment: Segment, deadline_s: float) -> StreamRecord:
    """The first record of a job whose requests are resolved."""
    shape = job.shape
    return StreamRecord(
        id=shape.id,
        kind=shape.kind,
        tenant=job.requests[0].tenant,
        model=shape.model,
        fingerprint=shape.fingerprint,
        created=shape.created,
        details=shape.details,
        requests=tuple(job.requests),
        is_stream=job.is_stream,
        has_usage_chunk=job.has_usage_chunk,
        has_usage_everywhere=job.has_usage_everywhere,
        echoes=tuple(job.echoes),
        is_echo_only=job.is_echo_only,
        deadline_s=deadline_s,
        body_digest=b"" if job.idempotency is None else job.idempotency.body_digest,
        segments=(segment,),
    )


def job_of(record: StreamRecord, shape: AnswerShape, trace: RequestTrace = NO_TRACE) -> Job:
    """The job to tell again; `shape` bears the record's id and time."""
    return Job(
        requests=record.requests,
        shape=shape,
        is_stream=record.is_stream,
        has_usage_chunk=record.has_usage_chunk,
        has_usage_everywhere=record.has_usage_everywhere,
        echoes=record.echoes,
        is_echo_only=record.is_echo_only,
        trace=trace,
    )
