"""`GET /v1/streams/{id}`: the rest of a stored answer as a stream, at any gateway.

It knows how a reader says what it has, nothing of owners and logs.
"""

import urllib.parse

from pagebus.bus.protocol import BusError
from pagebus.gateway.answering import answer_again
from pagebus.gateway.chat import ChatShape
from pagebus.gateway.completions import CompletionShape
from pagebus.gateway.context import GatewayContext
from pagebus.gateway.errors import ApiError
from pagebus.gateway.event_ids import read_position, start
from pagebus.gateway.limits import Receive, Scope, Send, header
from pagebus.gateway.logprob_shapes import LogprobWriter
from pagebus.gateway.responder import Endpoint
from pagebus.gateway.shapes import AnswerShape
from pagebus.gateway.stored_streams import Admission
from pagebus.gateway.stream_record import StreamRecord, job_of

_MAX_ID_CHARS = 128


class StreamsEndpoint(Endpoint):
    """The route."""

    def __init__(self, context: GatewayContext) -> None:
        self._context = context

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with what follows the event that the reader has last."""
        context = self._context
        stream_id = str(scope["path_params"]["stream_id"])
        if context.streams is None:
            raise ApiError(
                404,
                "this gateway runs with --no-resume: it stores no streams",
                code="resume_disabled",
            )
        after = _after(scope)
        try:
            is_id = len(stream_id) <= _MAX_ID_CHARS and stream_id.isascii()
            relay = await context.streams.find(context.tenant(scope["headers"]), stream_id) if is_id else None
        except BusError as error:
            raise ApiError(
                503, f"stored streams cannot be reached now: {error}", code="not_ready", retry_after_s=1.0
            ) from None
        if relay is None:
            raise ApiError(
                404,
                f"there is no stream {stream_id[:_MAX_ID_CHARS]!r}, or not any more",
                code="stream_not_found",
            )
        record = relay.record
        num_choices = record.num_choices
        position = read_position(after, num_choices, record.max_tokens) if after else start(num_choices)
        job = job_of(record, _shape(context, record))
        await answer_again(context, Admission(job, relay), position, scope, receive, send)


def _after(scope: Scope) -> str:
    """What the reader says that it has: `after` in the query, else `Last-Event-ID`; "" for nothing."""
    raw: bytes = scope["query_string"]
    query = urllib.parse.parse_qs(raw.decode("latin-1"), keep_blank_values=True)
    if "after" in query:
        return query["after"][-1].strip()
    return (header(scope, b"last-event-id") or b"").decode("latin-1").strip()


def _shape(context: GatewayContext, record: StreamRecord) -> AnswerShape:
    kind = ChatShape if record.kind == "chat" else CompletionShape
    return kind(
        record.model,
        record.fingerprint,
        record.details,
        LogprobWriter(context.tokenizer.texts, record.details.as_ids),
        answer_id=record.id,
        created=record.created,
    )
