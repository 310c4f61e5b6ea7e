"""Answers a parsed request as a stream or as a whole: starts its generations, hands their events to what
collects (`whole_answer.py`) or forwards (`stream_answer.py`) them.

It knows neither the request's fields nor the answer's shape: a `Job` brings the one, its shape the other.
"""

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable
from typing import Protocol

import msgspec

from pagebus.gateway.answer_types import UsageBody, usage_body
from pagebus.gateway.context import GatewayContext
from pagebus.gateway.errors import ApiError, from_failure
from pagebus.gateway.event_ids import Position, past_the_end, start
from pagebus.gateway.generation import Generation
from pagebus.gateway.generation_events import (
    Finished,
    GenerationEvent,
    GenerationRequest,
    OnEvent,
    PromptEvent,
    TextEvent,
    Usage,
)
from pagebus.gateway.jobs import Job
from pagebus.gateway.limits import ClientGoneError, Receive, Scope, Send
from pagebus.gateway.responder import send_bytes, watching
from pagebus.gateway.splitting import Splitter
from pagebus.gateway.sse import SseStream, error_event
from pagebus.gateway.stored_streams import Admission
from pagebus.gateway.stream_answer import StreamAnswer
from pagebus.gateway.tracing import NO_TRACE
from pagebus.gateway.whole_answer import WholeAnswer

ABORT = "pagebus.abort"
"""Key in the ASGI scope's extensions: a callable that drops the connection at once."""
DIRECT = "pagebus.direct"
"""Key in the ASGI scope's extensions: what writes parts of a response that has begun (`DirectWriter`)."""
RESUMABLE = b"x-pagebus-resumable"
"""Header of streams, and of answers to requests with a key: whether they can be had again."""


class _Answer(Protocol):
    """What takes the events of a job's generations, choices and prompts numbered through."""

    def on_prompt(self, prompt: int, event: PromptEvent) -> None:
        """Log-probabilities of a prompt."""

    def on_text(self, event: TextEvent) -> None:
        """News of a choice."""


class JobRun:
    """The generations of one job, seen as one: choices numbered through, one end."""

    def __init__(self, context: GatewayContext, admission: Admission, position: Position | None) -> None:
        self._context = context
        self._job = job = admission.job
        self._relay = admission.relay
        self._position = position or start(job.num_choices)
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
        usages = [item.usage for item in self._generations]
        num_generated = 0 if self._job.is_echo_only else sum(item.num_generated_tokens for item in usages)
        num_cached = sum(item.num_cached_tokens for item in usages)
        return usage_body(Usage(self.usage.num_prompt_tokens, num_generated, num_cached))

    def begin(self, answer: _Answer, on_over: Callable[[], None]) -> None:
        """Submit everything; raises `ApiError`, and then nothing runs."""
        if not self._job.needs_run:
            self._num_open = 0
            on_over()
            return
        try:
            for index, request in enumerate(self._job.requests):
                handler = self._handler(index, answer, on_over)
                self._generations.append(self._generate(index, request, handler))
        except ApiError:
            self.cancel()
            raise
        if self._relay is not None and self._context.streams is not None:
            self._relay.start()
            self._context.streams.submitted(self._relay)

    def _generate(self, index: int, request: GenerationRequest, handler: OnEvent) -> Generation:
        relay, generations = self._relay, self._context.generations
        if relay is None or relay.is_owner:
            trace = self._job.trace if index == 0 else NO_TRACE
            submit = None if relay is None else relay.submit
            return generations.start(request, handler, trace, submit)
        sent = [self._position.choices[choice] for choice in self._job.choices_of(index)]
        return generations.again(
            request, handler, lambda spec, on_event: relay.submit(spec, Splitter(on_event, sent).take)
        )

    def cancel(self) -> None:
        """Stop what still runs."""
        for generation in self._generations:
            generation.cancel()

    def _handler(
        self, prompt: int, answer: _Answer, on_over: Callable[[], None]
    ) -> Callable[[GenerationEvent], None]:
        offset = prompt * self._job.num_choices_each

        def take(event: GenerationEvent) -> None:
            if type(event) is TextEvent and event.finish_reason is None and not offset:
                if self.failure is None:
                    answer.on_text(event)
                return
            if self.is_over:
                return
            match event:
                case TextEvent():
                    if offset:
                        event = msgspec.structs.replace(event, choice=event.choice + offset)
                    if event.finish_reason is not None and self._is_past(event):
                        self._fail(past_the_end(event.index + len(event.ids)), on_over)
                        return
                    answer.on_text(event)
                case PromptEvent():
                    answer.on_prompt(prompt, event)
                case Finished():
                    self._num_open -= 1
                    if self._num_open == 0:
                        on_over()
                case _:
                    self._fail(from_failure(event), on_over)

        return take

    def _is_past(self, end: TextEvent) -> bool:
        """Whether the reader says that it has more of a choice than there is."""
        return end.index + len(end.ids) < self._position.choices[end.choice].num_ids

    def _fail(self, error: ApiError, on_over: Callable[[], None]) -> None:
        self.failure = error
        self.cancel()
        on_over()


async def answer(context: GatewayContext, job: Job, scope: Scope, receive: Receive, send: Send) -> None:
    """Run the job and send its answer. Raises `ApiError` while the response has not begun, and
    `ClientGoneError`; in both cases nothing runs any more."""
    if context.streams is None:
        await _answer(context, Admission(job), None, scope, receive, send)
        return
    if job.needs_run:
        requests = [context.generations.resolved(request) for request in job.requests]
        job = dataclasses.replace(job, requests=requests)
    admission = await context.streams.admit(job)
    position = start(job.num_choices) if admission.relay is not None else None
    try:
        await _answer(context, admission, position, scope, receive, send)
    finally:
        if admission.relay is not None:
            context.streams.forget(admission.relay)


async def answer_again(
    context: GatewayContext,
    admission: Admission,
    position: Position,
    scope: Scope,
    receive: Receive,
    send: Send,
) -> None:
    """Send what a reader lacks of a stored answer, as a stream. Raises as `answer` does."""
    run = JobRun(context, admission, position)
    try:
        await _stream(context, admission, run, position, scope, receive, send)
    finally:
        run.cancel()
        if admission.relay is not None and context.streams is not None:
            context.streams.forget(admission.relay)


async def _answer(
    context: GatewayContext,
    admission: Admission,
    position: Position | None,
    scope: Scope,
    receive: Receive,
    send: Send,
) -> None:
    run = JobRun(context, admission, position)
    try:
        if admission.job.is_stream:
            await _stream(context, admission, run, position, scope, receive, send)
        else:
            await _whole(context, admission, run, scope, receive, send)
    finally:
        run.cancel()
        if run.failure is not None and admission.relay is not None and context.streams is not None:
            context.streams.void(admission.relay)


async def _resumable(context: GatewayContext, admission: Admission) -> list[tuple[bytes, bytes]]:
    """The header that says whether the answer can be had again."""
    job = admission.job
    if context.streams is None or not (job.is_stream or job.idempotency is not None):
        return []
    is_stored = await admission.is_stored()
    return [(RESUMABLE, b"true" if is_stored else b"false")]


async def _whole(
    context: GatewayContext,
    admission: Admission,
    run: JobRun,
    scope: Scope,
    receive: Receive,
    send: Send,
) -> None:
    job = admission.job
    whole = WholeAnswer(job)
    over = asyncio.Event()
    is_gone = False

    def on_gone() -> None:
        nonlocal is_gone
        is_gone = True
        run.cancel()
        over.set()

    async with watching(receive, on_gone):
        run.begin(whole, over.set)
        headers = await _resumable(context, admission)
        await over.wait()
    if run.failure is not None:
        raise run.failure
    if is_gone:
        raise ClientGoneError
    try:
        async with asyncio.timeout(context.clock.slow_reader_s):
            await send_bytes(send, 200, job.shape.whole(whole.choices, run.usage_now), headers)
    except TimeoutError:  # a client that does not read
        if abort := (scope.get("extensions") or {}).get(ABORT):
            abort()
        raise ClientGoneError from None


async def _stream(
    context: GatewayContext,
    admission: Admission,
    run: JobRun,
    position: Position | None,
    scope: Scope,
    receive: Receive,
    send: Send,
) -> None:
    extensions = scope.get("extensions") or {}
    stream = SseStream(send, extensions.get(ABORT), extensions.get(DIRECT))
    first = asyncio.Event()
    answer = StreamAnswer(admission.job, stream.write, lambda: run.usage_now, first.set, position)

    def on_over() -> None:
        if run.failure is not None:
            stream.write(error_event(run.failure.body))
        else:
            answer.finish()
        stream.finish()
        first.set()

    def on_gone() -> None:
        run.cancel()
        stream.leave()
        first.set()

    answer.open()
    async with watching(receive, on_gone):
        run.begin(answer, on_over)
        stream.headers += await _resumable(context, admission)
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
