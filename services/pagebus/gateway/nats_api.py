"""The public NATS interface: JSON requests of restricted clients in, text and tokens out on a subject each.

The same requests as over HTTP, with an `id` of the client's choice; see `shared/pagebus/client` for the other
side. It knows nothing of HTTP.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import msgspec

from pagebus.bus import subjects
from pagebus.bus.messages import ApiAlive, ApiCancel, ApiEvent
from pagebus.bus.protocol import Bus, BusError, Msg, Subscription
from pagebus.gateway import chat, completions, errors
from pagebus.gateway.api_events import done_event, error_event, only_the_end, prompt_events, tokens_event
from pagebus.gateway.api_head import ApiHead, read_head
from pagebus.gateway.api_outbox import ApiOutbox, Readers
from pagebus.gateway.api_told import Ended, Told
from pagebus.gateway.context import GatewayContext
from pagebus.gateway.event_ids import OPEN, Sent
from pagebus.gateway.generation import Generation
from pagebus.gateway.generation_events import (
    Finished,
    GenerationEvent,
    GenerationRequest,
    PromptEvent,
    TextEvent,
)
from pagebus.gateway.generations import Submit
from pagebus.gateway.jobs import check_told
from pagebus.gateway.logprob_shapes import LogprobWriter
from pagebus.gateway.openai_types import ChatRequest, CompletionRequest
from pagebus.gateway.refusals import refuse_unserved_chat, refuse_unserved_completion
from pagebus.gateway.relay import Relay
from pagebus.gateway.relay_parts import Change
from pagebus.gateway.requests import generation_request
from pagebus.gateway.sampling_params import TokenDetails, completion_details, sampling_of
from pagebus.gateway.splitting import Splitter, one_by_one
from pagebus.gateway.tracing import RequestTrace
from pagebus.requester.packed_logprobs import num_tokens

_log = logging.getLogger(__name__)

MAX_LIVE = 4096
"""Most requests of NATS clients that one gateway runs at once."""
ALIVE_INTERVAL_S = 2.0
ELSEWHERE_S = 0.2
"""How long the other gateways may take to say that they run a request."""
FIND_S = 0.2
"""How long a request that may as well begin waits for its record."""

_Request = TypeVar("_Request")


class _Live:
    """A running request of a NATS client."""

    __slots__ = ("generation", "is_cancelled", "relay", "told")

    def __init__(self, relay: Relay | None = None) -> None:
        self.generation: Generation | None = None
        self.relay = relay  # where it is stored
        self.told: Told | None = None  # what went to its readers
        self.is_cancelled = False  # before it could start


class NatsApi:
    """Serves requests and cancels of NATS clients until closed."""

    def __init__(self, context: GatewayContext, bus: Bus, model: str) -> None:
        """`model` is the name on the bus."""
        self._context = context
        self._bus = bus
        self._model = model
        self._live: dict[str, _Live] = {}
        self._joining: dict[str, _Live] = {}  # reads again what was missed, while another gateway owns it
        self._outbox = ApiOutbox(bus)
        self._readers = Readers(bus)
        self._ended = Ended()
        self._tasks: set[asyncio.Task[None]] = set()
        self._subscriptions: list[Subscription] = []
        self._chat = msgspec.json.Decoder(ChatRequest)
        self._completion = msgspec.json.Decoder(CompletionRequest)

    async def start(self) -> None:
        """Subscribe, and start publishing."""
        generate, cancel = subjects.api_generate(self._model), subjects.api_cancel(self._model)
        queue = subjects.GATEWAY_QUEUE
        self._subscriptions = [
            await self._bus.subscribe(generate, self._on_request, queue=queue),
            await self._bus.subscribe(cancel, self._on_cancel),
            await self._bus.subscribe(subjects.api_join(self._model), self._on_joined_elsewhere),
        ]
        self._keep(self._outbox.run())
        self._keep(self._stay_alive())

    async def leave(self) -> None:
        """Take no more requests: other gateways of the queue group get them. Those that run go on."""
        requests, *self._subscriptions = self._subscriptions
        with contextlib.suppress(BusError):
            await requests.unsubscribe()

    async def close(self) -> None:
        """Take no more requests, cancel the running ones, and stop."""
        for subscription in self._subscriptions:
            with contextlib.suppress(BusError):
                await subscription.unsubscribe()
        for identity, live in [*self._live.items(), *self._joining.items()]:
            self._drop(identity, live)
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
                if live.relay is not None and self._context.streams is not None:
                    self._context.streams.cancelled(live.relay)
                self._drop(cancel.id, live)
                self._send(cancel.id, error_event(cancel.id, _CANCELLED))

    async def _serve(self, msg: Msg) -> None:
        """One request: whatever goes wrong with it is answered, and touches no other."""
        identity, is_own = "", False
        try:
            head = read_head(msg.data, self._context.max_body_bytes)
            identity = head.id
            if len(self._live) >= MAX_LIVE:
                raise errors.ApiError(429, f"{MAX_LIVE} requests are running here", code="queue_full")
            if head.have is not None and await self._join(head, head.have):
                self._answer(msg, ApiAlive(id=identity))
                return
            if identity in self._live:
                raise errors.ApiError(
                    409, f"request {identity} is running already", code="id_in_use", param="id"
                )
            is_own = True
            self._ended.forget(identity)
            live = self._live[identity] = _Live()
            try:
                await self._start(head, msg, live)
            except BaseException:
                self._drop(identity, live)
                raise
            self._answer(msg, ApiAlive(id=identity))
        except errors.ApiError as error:
            self._refuse(msg, identity, error, is_own=is_own)
        except Exception:
            _log.exception("a request of a NATS client failed in the gateway")
            fault = errors.ApiError(500, "the gateway failed to process this request")
            self._refuse(msg, identity, fault, is_own=is_own)

    async def _start(self, head: ApiHead, msg: Msg, live: _Live) -> None:
        context = self._context
        trace = context.telemetry.start_request(
            "process pagebus.api.generate", msg.headers, {"messaging.system": "nats"}
        )
        try:
            context.generations.shedding.check("")
            if bytes(head.messages) != b"null":
                request, details = await self._chat_request(msg.data, trace)
            else:
                request, details = await self._completion_request(msg.data, trace)
            if live.is_cancelled:
                raise _CANCELLED
            submit: Submit | None = None
            if context.streams is not None:
                request = context.generations.resolved(request)
                live.relay = await context.streams.admit_api(head.id, request, details)
            if live.relay is not None:
                live.relay.on_change = self._changes_of(head.id, live)
                submit = live.relay.submit
            live.told = Told(request, details)
            take = self._events_to(head.id, live, details)
            live.generation = context.generations.start(request, take, trace, submit)
            if live.relay is not None and context.streams is not None:
                context.streams.submitted(live.relay)
            if live.generation.is_over or live.is_cancelled:
                self._drop(head.id, live)
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

    async def _join(self, head: ApiHead, have: list[int]) -> bool:
        """Tell again what somebody missed of a stored request, and own it if its owner is gone. False where
        nothing is known of the request and nothing was missed: it may begin. Raises `ApiError`."""
        context, streams = self._context, self._context.streams
        relay: Relay | None = None
        if self._tell_again(head.id, have) or await self._is_told_elsewhere(head, have):
            return True
        may_begin = head.has_prompt and not any(have) and head.id not in self._live
        if streams is not None:
            try:
                async with asyncio.timeout(FIND_S if may_begin and head.has_seed else None):
                    relay = await streams.find_api("", head.id)
            except (BusError, TimeoutError) as error:
                if may_begin and head.has_seed:  # if it runs, it makes the same tokens
                    return False
                raise errors.ApiError(
                    503, f"stored streams cannot be reached: {error}", code="not_ready"
                ) from None
        if relay is None or streams is None:
            if may_begin:
                return False
            raise errors.ApiError(404, f"nothing is kept of request {head.id}", code="stream_not_found")
        record = relay.record
        if len(have) != record.num_choices or max(have) > record.max_tokens:
            raise errors.invalid(f"request {head.id} has no such tokens", "have")
        if (former := self._joining.get(head.id)) is not None:
            self._drop(head.id, former)
        live = self._joining[head.id] = _Live(relay)
        live.told = Told(record.requests[0], record.details)
        relay.on_change = self._changes_of(head.id, live)
        take = self._events_to(head.id, live, record.details, have, head.have_prompt)
        sent = [Sent(OPEN, num_ids) for num_ids in have]
        live.generation = context.generations.again(
            record.requests[0],
            take,
            lambda spec, on_event: relay.submit(spec, Splitter(one_by_one(on_event), sent).take),
        )
        relay.start()
        return True

    async def _is_told_elsewhere(self, head: ApiHead, have: list[int]) -> bool:
        """Whether another gateway runs the request and tells its reader what is missing."""
        if head.id in self._live:
            return False
        question = msgspec.json.encode({"id": head.id, "have": have})
        try:
            await self._bus.request(subjects.api_join(self._model), question, timeout_s=ELSEWHERE_S)
        except BusError:
            return False
        return True

    def _on_joined_elsewhere(self, msg: Msg) -> None:
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError, errors.ApiError):
            head = msgspec.json.decode(msg.data, type=ApiHead)
            if head.have is not None and self._tell_again(head.id, head.have):
                self._answer(msg, ApiAlive(id=head.id))

    def _tell_again(self, identity: str, have: list[int]) -> bool:
        """Repeat from memory what went to the readers of a request that runs here, or ended a moment ago."""
        running = self._live.get(identity)
        told = self._ended.get(identity) if running is None else running.told
        if told is None or not told.can_tell(have):  # about to begin: its first event comes to all
            return running is not None and told is None and not any(have)
        take = self._events_to(identity, _Live(), told.details, have)
        self._context.generations.again(told.request, take, told.submit(have)).cancel()
        return True

    def _changes_of(self, identity: str, live: _Live) -> Callable[[Change], None]:
        def change(now: Change) -> None:
            if now == "owner":
                self._joining.pop(identity, None)
                self._live[identity] = live
            else:  # another gateway owns it and publishes
                self._drop(identity, live)

        return change

    def _drop(self, identity: str, live: _Live) -> None:
        """Nothing more of it comes from here."""
        for known in (self._live, self._joining):
            if known.get(identity) is live:
                del known[identity]
        if live.generation is not None:
            live.generation.cancel()
        if live.relay is not None and self._context.streams is not None:
            self._context.streams.forget(live.relay)

    def _events_to(
        self,
        identity: str,
        live: _Live,
        details: TokenDetails,
        have: Sequence[int] = (),
        have_prompt: int = 0,
    ) -> Callable[[GenerationEvent], None]:
        """Publishes what a generation tells, but for what `have` says is known."""
        writer = LogprobWriter(self._context.tokenizer.texts, details.as_ids)

        def take(event: GenerationEvent) -> None:
            match event:
                case TextEvent():
                    if live.told is not None:
                        live.told.note(event)
                    if have and event.ids and event.index + len(event.ids) <= have[event.choice]:
                        if event.finish_reason is None:
                            return
                        event = only_the_end(event)
                    self._send(identity, tokens_event(identity, event, details, writer))
                case PromptEvent():
                    if event.start + num_tokens(event.logprobs) > have_prompt:
                        for prompt_event in prompt_events(identity, event, details, writer):
                            self._send(identity, prompt_event)
                case Finished():
                    self._send(identity, done_event(identity, event.usage))
                    self._drop(identity, live)
                    if live.told is not None:
                        self._ended.add(identity, live.told)
                case _:
                    self._send(identity, error_event(identity, errors.from_failure(event)))
                    self._drop(identity, live)

        return take

    def _refuse(self, msg: Msg, identity: str, error: errors.ApiError, *, is_own: bool) -> None:
        """Answer a refusal to the asker, and to followers of the stream unless it belongs to another."""
        event = error_event(identity, error)
        self._answer(msg, event)
        if is_own and error.code != "id_in_use":
            self._send(identity, event)

    def _answer(self, msg: Msg, event: ApiEvent) -> None:
        if msg.reply:
            self._outbox.put(msg.reply, event)

    def _send(self, identity: str, event: ApiEvent) -> None:
        self._outbox.put(subjects.stream(identity), event)

    async def _stay_alive(self) -> None:
        """A sign of life to every reader; streams that nobody reads end, and their blocks are free."""
        while True:
            await asyncio.sleep(ALIVE_INTERVAL_S)
            for identity in await self._readers.unread(list(self._live)):
                if (live := self._live.get(identity)) is not None:
                    _log.info("nobody reads the stream of a NATS client: it ends")
                    self._drop(identity, live)


_CANCELLED = errors.ApiError(499, "the request was cancelled", code="cancelled")


def _decoded(decoder: msgspec.json.Decoder[_Request], data: bytes) -> _Request:
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise errors.from_decode_error(error) from None
