"""The public NATS interface: JSON requests of restricted clients in, text and tokens out on a subject each.

The same requests as over HTTP, with an `id` of the client's choice; see `shared/pagebus/client` for the other
side. It knows nothing of HTTP.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

import msgspec

from pagebus.bus import subjects
from pagebus.bus.messages import (
    ApiAlive,
    ApiCancel,
    ApiDone,
    ApiError,
    ApiErrorBody,
    ApiEvent,
    ApiTokenLogprob,
    ApiTokens,
    ApiUsage,
)
from pagebus.bus.protocol import Bus, BusError, Msg, Subscription
from pagebus.gateway import chat, completions, errors
from pagebus.gateway.context import GatewayContext
from pagebus.gateway.generation import Generation
from pagebus.gateway.generation_events import (
    Finished,
    GenerationEvent,
    GenerationRequest,
    PromptEvent,
    TextEvent,
)
from pagebus.gateway.jobs import check_told
from pagebus.gateway.logprob_shapes import LogprobWriter
from pagebus.gateway.openai_types import ChatRequest, CompletionRequest
from pagebus.gateway.refusals import refuse_unserved_chat, refuse_unserved_completion
from pagebus.gateway.requests import generation_request
from pagebus.gateway.sampling_params import TokenDetails, completion_details, sampling_of
from pagebus.gateway.tracing import RequestTrace
from pagebus.requester.packed_logprobs import cut, num_tokens

_log = logging.getLogger(__name__)

MAX_LIVE = 4096
"""Most requests of NATS clients that one gateway runs at once."""
MAX_UNSENT = 100_000
"""Most events that wait to be published; beyond it they are dropped, and readers see a gap."""
ALIVE_INTERVAL_S = 5.0
PROMPT_TOKENS_AN_EVENT = 256
"""Log-probabilities of longer prompts come in several events, each far below the bus's `max_payload`."""

_Request = TypeVar("_Request")


class _Head(msgspec.Struct, frozen=True, kw_only=True):
    """What decides how a request is read."""

    id: str
    messages: msgspec.Raw = msgspec.Raw(b"null")


class _Live:
    """A running request of a NATS client."""

    __slots__ = ("generation", "is_cancelled", "last_sent_s")

    def __init__(self) -> None:
        self.generation: Generation | None = None
        self.is_cancelled = False  # before it could start
        self.last_sent_s = time.monotonic()


class NatsApi:
    """Serves requests and cancels of NATS clients until closed."""

    def __init__(self, context: GatewayContext, bus: Bus, model: str) -> None:
        """`model` is the name on the bus."""
        self._context = context
        self._bus = bus
        self._model = model
        self._live: dict[str, _Live] = {}
        self._unsent: deque[tuple[str, bytes]] = deque()
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._subscriptions: list[Subscription] = []
        self._chat = msgspec.json.Decoder(ChatRequest)
        self._completion = msgspec.json.Decoder(CompletionRequest)
        self.num_dropped = 0

    async def start(self) -> None:
        """Subscribe, and start publishing."""
        generate, cancel = subjects.api_generate(self._model), subjects.api_cancel(self._model)
        queue = subjects.GATEWAY_QUEUE
        self._subscriptions = [
            await self._bus.subscribe(generate, self._on_request, queue=queue),
            await self._bus.subscribe(cancel, self._on_cancel),
        ]
        self._keep(self._publish())
        self._keep(self._stay_alive())

    async def close(self) -> None:
        """Take no more requests, cancel the running ones, and stop."""
        for subscription in self._subscriptions:
            with contextlib.suppress(BusError):
                await subscription.unsubscribe()
        for live in list(self._live.values()):
            if live.generation is not None:
                live.generation.cancel()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _keep(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _on_request(self, msg: Msg) -> None:
        self._keep(self._serve(msg))

    def _on_cancel(self, msg: Msg) -> None:
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            cancel = msgspec.json.decode(msg.data, type=ApiCancel)
            live = self._live.get(cancel.id)
            if live is None:
                return
            live.is_cancelled = True
            if live.generation is not None:
                live.generation.cancel()
                self._live.pop(cancel.id, None)
                self._send(cancel.id, _error_event(cancel.id, _CANCELLED))

    async def _serve(self, msg: Msg) -> None:
        """One request: whatever goes wrong with it is answered, and touches no other."""
        identity = ""
        try:
            head = self._head(msg.data)
            identity = head.id
            live = self._live[identity] = _Live()
            try:
                await self._start(head, msg, live)
            except BaseException:
                self._live.pop(identity, None)
                raise
            self._answer(msg, ApiAlive(id=identity))
        except errors.ApiError as error:
            self._refuse(msg, identity, error)
        except Exception:
            _log.exception("a request of a NATS client failed in the gateway")
            self._refuse(msg, identity, errors.ApiError(500, "the gateway failed to process this request"))

    def _head(self, data: bytes) -> _Head:
        if len(data) > self._context.max_body_bytes:
            raise errors.ApiError(413, f"the request exceeds {self._context.max_body_bytes} bytes")
        try:
            head = msgspec.json.decode(data, type=_Head)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise errors.from_decode_error(error) from None
        if not subjects.is_part(head.id):
            raise errors.invalid("id must match [A-Za-z0-9_-]{1,64}", "id")
        if head.id in self._live:
            raise errors.ApiError(409, f"request {head.id} is running already", code="id_in_use", param="id")
        if len(self._live) >= MAX_LIVE:
            raise errors.ApiError(429, f"{MAX_LIVE} requests are running here", code="queue_full")
        return head

    async def _start(self, head: _Head, msg: Msg, live: _Live) -> None:
        context = self._context
        trace = context.telemetry.start_request(
            "process pagebus.api.generate", msg.headers, {"messaging.system": "nats"}
        )
        try:
            if bytes(head.messages) != b"null":
                request, details = await self._chat_request(msg.data, trace)
            else:
                request, details = await self._completion_request(msg.data, trace)
            if live.is_cancelled:
                raise _CANCELLED
            take = self._events_to(head.id, live, details)
            live.generation = context.generations.start(request, take, trace)
            if live.generation.is_over:
                self._live.pop(head.id, None)
        except BaseException as error:
            trace.end(error=type(error).__name__)
            raise

    async def _chat_request(self, data: bytes, trace: RequestTrace) -> tuple[GenerationRequest, TokenDetails]:
        request = _decoded(self._chat, data)
        self._context.checked_model(request.model)
        refuse_unserved_chat(request)
        if request.echo:
            raise errors.unsupported("echo", "echo is served over HTTP only")
        return await chat.prepare(self._context, "", request, trace)

    async def _completion_request(
        self, data: bytes, trace: RequestTrace
    ) -> tuple[GenerationRequest, TokenDetails]:
        context, request = self._context, _decoded(self._completion, data)
        context.checked_model(request.model)
        refuse_unserved_completion(request)
        if request.echo:
            raise errors.unsupported("echo", "echo is served over HTTP only")
        prompts = completions.split_prompts(request.prompt)
        if len(prompts) != 1:
            raise errors.unsupported("prompt", "send one prompt a request")
        (ids,) = await completions.tokenize(context, request, prompts, trace)
        details = completion_details(request)
        check_told([ids], details, "prompt_logprobs")
        sampling = sampling_of(request, details, context.defaults, context.tokenizer)
        default = completions.DEFAULT_MAX_TOKENS
        generation = generation_request(context, "", request, ids, sampling, request.max_tokens, default)
        return generation, details

    def _events_to(
        self, identity: str, live: _Live, details: TokenDetails
    ) -> Callable[[GenerationEvent], None]:
        writer = LogprobWriter(self._context.tokenizer.texts, details.as_ids)

        def take(event: GenerationEvent) -> None:
            live.last_sent_s = time.monotonic()
            match event:
                case TextEvent():
                    self._send(identity, _tokens_event(identity, event, details, writer))
                case PromptEvent():
                    for prompt_event in _prompt_events(identity, event, details, writer):
                        self._send(identity, prompt_event)
                case Finished():
                    self._live.pop(identity, None)
                    usage = event.usage
                    self._send(
                        identity,
                        ApiDone(
                            id=identity,
                            usage=ApiUsage(
                                prompt_tokens=usage.num_prompt_tokens,
                                completion_tokens=usage.num_generated_tokens,
                                total_tokens=usage.num_prompt_tokens + usage.num_generated_tokens,
                                cached_tokens=usage.num_cached_tokens,
                            ),
                        ),
                    )
                case _:
                    self._live.pop(identity, None)
                    self._send(identity, _error_event(identity, errors.from_failure(event)))

        return take

    def _refuse(self, msg: Msg, identity: str, error: errors.ApiError) -> None:
        """Answer a refusal to the asker, and to followers of the stream unless it belongs to another."""
        event = _error_event(identity, error)
        self._answer(msg, event)
        if subjects.is_part(identity) and identity not in self._live:
            self._send(identity, event)

    def _answer(self, msg: Msg, event: ApiEvent) -> None:
        if msg.reply:
            self._put(msg.reply, event)

    def _send(self, identity: str, event: ApiEvent) -> None:
        self._put(subjects.stream(identity), event)

    def _put(self, subject: str, event: ApiEvent) -> None:
        if len(self._unsent) >= MAX_UNSENT:
            self.num_dropped += 1
            return
        self._unsent.append((subject, msgspec.json.encode(event)))
        self._wake.set()

    async def _publish(self) -> None:
        """One publisher for all streams keeps their events in order."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._unsent:
                subject, data = self._unsent.popleft()
                try:
                    await self._bus.publish(subject, data)
                except (BusError, ValueError):  # not connected, or a reply subject that nobody may use
                    self.num_dropped += 1

    async def _stay_alive(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            now = time.monotonic()
            for identity, live in self._live.items():
                if now - live.last_sent_s >= ALIVE_INTERVAL_S:
                    live.last_sent_s = now
                    self._send(identity, ApiAlive(id=identity))


_CANCELLED = errors.ApiError(499, "the request was cancelled", code="cancelled")


def _tokens_event(identity: str, event: TextEvent, details: TokenDetails, writer: LogprobWriter) -> ApiTokens:
    num_top, logprobs = details.num_logprobs, event.logprobs
    return ApiTokens(
        id=identity,
        choice=event.choice,
        index=event.index,
        token_ids=list(event.ids),
        text=event.text,
        finish_reason=event.finish_reason,
        logprobs=None if num_top is None or logprobs is None else writer.api(logprobs, num_top),
    )


def _prompt_events(
    identity: str, event: PromptEvent, details: TokenDetails, writer: LogprobWriter
) -> Iterator[ApiTokens]:
    """Events without tokens, the first of all with a null for the prompt's first token."""
    num_top = details.num_prompt_logprobs or 0
    for start in range(0, num_tokens(event.logprobs), PROMPT_TOKENS_AN_EVENT):
        some = cut(event.logprobs, start, start + PROMPT_TOKENS_AN_EVENT)
        told: list[ApiTokenLogprob | None] = [None] if event.start + start == 1 else []
        told += writer.api(some, num_top)
        yield ApiTokens(id=identity, choice=0, index=0, token_ids=[], text="", prompt_logprobs=told)


def _error_event(identity: str, error: errors.ApiError) -> ApiError:
    body = error.body
    return ApiError(
        id=identity,
        error=ApiErrorBody(message=body.message, type=body.type, param=body.param, code=body.code),
    )


def _decoded(decoder: msgspec.json.Decoder[_Request], data: bytes) -> _Request:
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise errors.from_decode_error(error) from None
