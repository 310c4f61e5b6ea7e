"""Answers a parsed request as a stream or as a whole: starts its generations, hands their events to what
collects (`whole_answer.py`) or forwards (`stream_answer.py`) them.

It knows neither the request's fields nor the answer's shape: a `Job` brings the one, its shape the other.
"""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Protocol

import msgspec

from pagebus.gateway.answer_types import UsageBody, usage_body
from pagebus.gateway.context import GatewayContext
from pagebus.gateway.errors import ApiError, from_failure
from pagebus.gateway.generation import Generation
from pagebus.gateway.generation_events import Finished, GenerationEvent, PromptEvent, TextEvent, Usage
from pagebus.gateway.jobs import Job
from pagebus.gateway.limits import ClientGoneError, Receive, Scope, Send
from pagebus.gateway.responder import send_bytes, watching
from pagebus.gateway.sse import DONE, SseStream, error_event
from pagebus.gateway.stream_answer import StreamAnswer
from pagebus.gateway.tracing import NO_TRACE
from pagebus.gateway.whole_answer import WholeAnswer

ABORT = "pagebus.abort"
"""Key in the ASGI scope's extensions: a callable that drops the connection at once."""


class _Answer(Protocol):
    """What takes the events of a job's generations, choices and prompts numbered through."""

    def on_prompt(self, prompt: int, event: PromptEvent) -> None:
        """Log-probabilities of a prompt."""

    def on_text(self, event: TextEvent) -> None:
        """News of a choice."""


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
        usages = [item.usage for item in self._generations]
        num_generated = 0 if self._job.is_echo_only else sum(item.num_generated_tokens for item in usages)
        num_cached = sum(item.num_cached_tokens for item in usages)
        return usage_body(Usage(self.usage.num_prompt_tokens, num_generated, num_cached))

    def start(self, answer: _Answer, on_over: Callable[[], None]) -> None:
        """Submit everything; raises `ApiError`, and then nothing runs."""
        if not self._job.needs_run:
            self._num_open = 0
            on_over()
            return
        try:
            for index, request in enumerate(self._job.requests):
                handler = self._handler(index, answer, on_over)
                trace = self._job.trace if index == 0 else NO_TRACE
                self._generations.append(self._context.generations.start(request, handler, trace))
        except ApiError:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Stop what still runs."""
        for generation in self._generations:
            generation.cancel()

    def _handler(
        self, prompt: int, answer: _Answer, on_over: Callable[[], None]
    ) -> Callable[[GenerationEvent], None]:
        offset = prompt * self._job.num_choices_each

        def take(event: GenerationEvent) -> None:
            if self.is_over:
                return
            match event:
                case TextEvent():
                    if offset:
                        event = msgspec.structs.replace(event, choice=event.choice + offset)
                    answer.on_text(event)
                case PromptEvent():
                    answer.on_prompt(prompt, event)
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
    whole = WholeAnswer(job)
    over = asyncio.Event()
    is_gone = False

    def on_gone() -> None:
        nonlocal is_gone
        is_gone = True
        run.cancel()
        over.set()

    async with watching(receive, on_gone):
        run.start(whole, over.set)
        await over.wait()
    if run.failure is not None:
        raise run.failure
    if is_gone:
        raise ClientGoneError
    await send_bytes(send, 200, job.shape.whole(whole.choices, run.usage_now))


async def _stream(
    context: GatewayContext, job: Job, run: _Run, scope: Scope, receive: Receive, send: Send
) -> None:
    extensions = scope.get("extensions") or {}
    stream = SseStream(send, extensions.get(ABORT))
    first = asyncio.Event()
    answer = StreamAnswer(job, stream.write, lambda: run.usage_now, first.set)

    def on_over() -> None:
        if run.failure is not None:
            stream.write(error_event(run.failure.body))
        else:
            if job.has_usage_chunk:
                stream.write(answer.template.usage(run.usage_now))
            stream.write(DONE)
        stream.finish()
        first.set()

    def on_gone() -> None:
        run.cancel()
        stream.leave()
        first.set()

    answer.open()
    async with watching(receive, on_gone):
        run.start(answer, on_over)
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
