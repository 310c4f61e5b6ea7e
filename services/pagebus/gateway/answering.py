"""Answers a parsed request as a stream or as a whole: starts its generations, collects or forwards text.

It knows neither the request's fields nor the answer's shape: a `Job` brings the one, its `Shape` the other.
"""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from pagebus.gateway.context import GatewayContext
from pagebus.gateway.errors import ApiError, from_failure
from pagebus.gateway.generation import (
    Finished,
    Generation,
    GenerationEvent,
    GenerationRequest,
    TextEvent,
    Usage,
)
from pagebus.gateway.limits import ClientGoneError, Receive, Scope, Send
from pagebus.gateway.openai_types import UsageBody, usage_body
from pagebus.gateway.responder import send_bytes, watching
from pagebus.gateway.sse import DONE, ChunkTemplate, SseStream, error_event
from pagebus.gateway.tracing import NO_TRACE, RequestTrace

ABORT = "pagebus.abort"
"""Key in the ASGI scope's extensions: a callable that drops the connection at once."""


class Shape(Protocol):
    """Makes the bodies of one kind of answer. `texts` and `reasons` are by choice."""

    is_chat: ClassVar[bool]

    def chunks(self, has_usage: bool) -> ChunkTemplate:
        """The template of a stream's chunks."""

    def whole(self, texts: Sequence[str], reasons: Sequence[str], usage: UsageBody) -> bytes:
        """The body of an answer that is not streamed."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One HTTP request: one or more prompts with equally many choices each, and how to answer."""

    requests: Sequence[GenerationRequest]
    shape: Shape
    is_stream: bool
    has_usage_chunk: bool = False
    has_usage_everywhere: bool = False
    prefixes: Sequence[str] = ()  # by choice: echoed text before what is generated
    is_echo_only: bool = False  # nothing is generated: max_tokens is 0
    trace: RequestTrace = field(default=NO_TRACE)

    @property
    def num_choices(self) -> int:
        """Choices of all prompts together."""
        return sum(request.num_choices for request in self.requests)


class _Run:
    """The generations of one job, seen as one: choices numbered through, one end."""

    def __init__(self, context: GatewayContext, job: Job) -> None:
        self._context = context
        self._job = job
        self._generations: list[Generation] = []
        self._num_open = len(job.requests)
        self.failure: ApiError | None = None
        self.usage = Usage(sum(len(request.prompt) for request in job.requests), 0)

    @property
    def is_over(self) -> bool:
        """Whether all ended or one failed."""
        return self._num_open == 0 or self.failure is not None

    @property
    def usage_now(self) -> UsageBody:
        """Counts so far, of all prompts."""
        num_generated = sum(item.usage.num_generated_tokens for item in self._generations)
        return usage_body(Usage(self.usage.num_prompt_tokens, num_generated))

    def start(self, on_text: Callable[[TextEvent], None], on_over: Callable[[], None]) -> None:
        """Submit everything; raises `ApiError`, and then nothing runs."""
        if self._job.is_echo_only:
            self._num_open = 0
            on_over()
            return
        offset = 0
        try:
            for request in self._job.requests:
                handler = self._handler(offset, on_text, on_over)
                trace = self._job.trace if offset == 0 else NO_TRACE
                self._generations.append(self._context.generations.start(request, handler, trace))
                offset += request.num_choices
        except ApiError:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Stop what still runs."""
        for generation in self._generations:
            generation.cancel()

    def _handler(
        self, offset: int, on_text: Callable[[TextEvent], None], on_over: Callable[[], None]
    ) -> Callable[[GenerationEvent], None]:
        def take(event: GenerationEvent) -> None:
            if self.is_over:
                return
            match event:
                case TextEvent():
                    if offset:
                        event = TextEvent(
                            event.choice + offset, event.index, event.ids, event.text, event.finish_reason
                        )
                    on_text(event)
                case Finished():
                    self._num_open -= 1
                    if self._num_open == 0:
                        on_over()
                case _:
                    self.failure = from_failure(event)
                    self.cancel()
                    on_over()

        return take


async def answer(context: GatewayContext, job: Job, scope: Scope, receive: Receive, send: Send) -> None:
    """Run the job and send its answer. Raises `ApiError` while the response has not begun, and
    `ClientGoneError`; in both cases nothing runs any more."""
    run = _Run(context, job)
    try:
        if job.is_stream:
            await _stream(context, job, run, scope, receive, send)
        else:
            await _whole(job, run, receive, send)
    finally:
        run.cancel()


async def _whole(job: Job, run: _Run, receive: Receive, send: Send) -> None:
    texts = [[prefix] for prefix in job.prefixes] or [[""] for _ in range(job.num_choices)]
    reasons = ["length"] * job.num_choices
    over = asyncio.Event()
    is_gone = False

    def on_text(event: TextEvent) -> None:
        texts[event.choice].append(event.text)
        if event.finish_reason is not None:
            reasons[event.choice] = event.finish_reason

    def on_gone() -> None:
        nonlocal is_gone
        is_gone = True
        run.cancel()
        over.set()

    async with watching(receive, on_gone):
        run.start(on_text, over.set)
        await over.wait()
    if run.failure is not None:
        raise run.failure
    if is_gone:
        raise ClientGoneError
    await send_bytes(send, 200, job.shape.whole(["".join(parts) for parts in texts], reasons, run.usage_now))


async def _stream(
    context: GatewayContext, job: Job, run: _Run, scope: Scope, receive: Receive, send: Send
) -> None:
    extensions = scope.get("extensions") or {}
    stream = SseStream(send, extensions.get(ABORT))
    template = job.shape.chunks(job.has_usage_chunk)
    first = asyncio.Event()

    def usage() -> UsageBody | None:
        return run.usage_now if job.has_usage_everywhere else None

    def on_text(event: TextEvent) -> None:
        if event.text:
            stream.write(template.text(event.choice, event.text, usage()))
        if event.finish_reason is not None:
            stream.write(template.finish(event.choice, event.finish_reason, usage()))
        first.set()

    def on_over() -> None:
        if run.failure is not None:
            stream.write(error_event(run.failure.body))
        else:
            if job.has_usage_chunk:
                stream.write(template.usage(run.usage_now))
            stream.write(DONE)
        stream.finish()
        first.set()

    def on_gone() -> None:
        run.cancel()
        stream.leave()
        first.set()

    for choice in range(job.num_choices):
        if job.shape.is_chat:
            stream.write(template.role(choice, usage()))
        if job.prefixes:
            stream.write(template.text(choice, job.prefixes[choice], usage()))
        if job.is_echo_only:
            stream.write(template.finish(choice, "length", usage()))
    async with watching(receive, on_gone):
        run.start(on_text, on_over)
        # What is refused gets a real status; what waits long in a queue gets its stream, and comments.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(first.wait(), context.clock.keep_alive_interval_s)
        if run.failure is not None:
            raise run.failure
        context.clock.add(stream)
        try:
            await stream.run()
        finally:
            context.clock.discard(stream)
