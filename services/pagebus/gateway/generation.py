"""Turns a running request's ids into text: detokenizes, finds stop strings, counts, tells a callback.

The one place where that happens, for every way in. It knows no HTTP, no JSON and no chat templates.
"""

import logging
import time
from collections.abc import Callable, Sequence

from pagebus.bus.messages import FinishReason
from pagebus.gateway.counters import Counters
from pagebus.gateway.generation_events import (
    Finished,
    GenerationRequest,
    OnEvent,
    PromptEvent,
    TextEvent,
    Usage,
)
from pagebus.gateway.submitter import Ticket
from pagebus.gateway.text_stream import TextStream
from pagebus.gateway.tracing import RequestTrace
from pagebus.requester.events import Event, NewTokens, PromptLogprobs, RequestFailed
from pagebus.requester.packed_logprobs import cut

_log = logging.getLogger(__name__)


def _ignore(event: object) -> None:
    """Nobody listens any more."""


def _nothing() -> None:
    """Nobody waits any more."""


class Choice:
    """What is known of one choice."""

    __slots__ = ("is_done", "is_plain", "last_token_s", "num_ids", "push_plain", "stream")

    def __init__(self, stream: TextStream) -> None:
        self.stream = stream
        self.push_plain = stream.push_plain
        self.num_ids = 0
        self.is_done = False
        self.is_plain = stream.is_plain  # its ids are text and nothing else, until it ends
        self.last_token_s = 0.0


class Generation:
    """One running request. Ends with `Finished`, with `RequestFailed`, or silently by `cancel`."""

    def __init__(
        self,
        request: GenerationRequest,
        choices: Sequence[Choice],
        stop_ids: frozenset[int],
        counters: Counters,
        on_event: OnEvent,
        trace: RequestTrace,
    ) -> None:
        self._request = request
        self._choices = choices
        if request.sampling.num_logprobs is not None:
            for choice in choices:
                choice.is_plain = False
        self._stop_ids = stop_ids
        self._counters = counters
        self._on_event = on_event
        self._trace = trace
        self._ticket: Ticket | None = None
        self._num_cached: int | None = None  # once there is no ticket any more
        self._started_s = time.monotonic()
        self._first_token_s: float | None = None
        self._first_token_ns = 0
        self._num_open = len(choices)
        self.is_over = False
        self.on_over: Callable[[], None] = lambda: None
        self.on_failed: Callable[[RequestFailed], None] = lambda failure: None

    @property
    def usage(self) -> Usage:
        """Token counts so far."""
        num_cached = self._ticket.num_cached_tokens if self._ticket is not None else self._num_cached
        num_generated = sum(choice.num_ids for choice in self._choices)
        return Usage(len(self._request.prompt), num_generated, num_cached or 0)

    def num_generated(self, choice: int) -> int:
        """Ids of one choice so far."""
        return self._choices[choice].num_ids

    def attach(self, ticket: Ticket) -> None:
        """Take the submitted request's ticket; what ended before it came is told to it now."""
        if self.is_over:
            ticket.cancel()
            return
        self._ticket = ticket
        for index, choice in enumerate(self._choices):
            if choice.is_done:
                ticket.end_choice(index)

    def cancel(self) -> None:
        """The reader went away: stop at once. Does nothing when it is over already."""
        if not self.is_over:
            self._end("abort")
            self._leave(cancels=True)

    def fail(self, failure: RequestFailed) -> None:
        """End it with an error that is not the requester's."""
        if not self.is_over:
            self._end("error", failure.code)
            on_event = self._on_event
            self._leave(cancels=True)
            on_event(failure)

    def take(self, event: Event) -> None:
        """The requester's callback. Whatever goes wrong in here ends this request and no other."""
        if self.is_over:
            return
        try:
            if type(event) is NewTokens and event.finish_reason is None and event.logprobs is None:
                choice = self._choices[event.choice]
                if choice.is_plain:
                    self._take_plain(choice, event)
                    return
            match event:
                case NewTokens():
                    self._take_tokens(event)
                case PromptLogprobs():
                    self._on_event(PromptEvent(event.start, event.logprobs))
                case _:
                    self._end("error", event.code)
                    self.on_failed(event)
                    on_event = self._on_event
                    self._leave()
                    on_event(event)
        except Exception:
            _log.exception("request %s failed in the gateway", self._request.request_id)
            self.fail(RequestFailed("internal_error", "the gateway failed to process this request"))

    def _take_plain(self, choice: Choice, event: NewTokens) -> None:
        """The common case of `_take_tokens`: nothing ends, nothing is told beside text."""
        ids, index, counters = event.ids, choice.num_ids, self._counters
        num_ids = len(ids)
        last_s = choice.last_token_s
        if last_s and num_ids:
            choice.last_token_s = now_s = time.monotonic()
            counters.num_generated_tokens += num_ids
            counters.between_tokens_s.observe((now_s - last_s) / num_ids, num_ids)
        else:
            self._count(choice, num_ids)
        choice.num_ids = index + num_ids
        self._on_event(TextEvent(event.choice, index, ids, choice.push_plain(ids), None))

    def _take_tokens(self, event: NewTokens) -> None:
        choice = self._choices[event.choice]
        if choice.is_done:
            return
        ids, reason, request = event.ids, event.finish_reason, self._request
        if request.sampling.num_logprobs is not None and ids and event.logprobs is None:
            raise RuntimeError("the executor told no log-probabilities")
        # The id that stopped the choice counts, but its text is not the answer's.
        has_stop_id = (
            reason == "stop" and len(ids) > 0 and ids[-1] in self._stop_ids and not request.include_stop
        )
        delta = choice.stream.push(ids[:-1] if has_stop_id else ids)
        text, stop, num_ids, offsets = delta.text, delta.stop, delta.num_ids, delta.offsets
        if stop is None and reason is not None:
            if has_stop_id and request.has_offsets:
                offsets = [*offsets, choice.stream.offset]
            rest = choice.stream.finish()
            text, stop = text + rest.text, rest.stop
            num_ids = len(ids)
        self._count(choice, num_ids)
        index = choice.num_ids
        choice.num_ids += num_ids
        if stop is not None and reason is None and self._ticket is not None:
            self._ticket.end_choice(event.choice)
        if stop is not None:
            reason = "stop"
        if num_ids or text or reason:
            logprobs = None if event.logprobs is None else cut(event.logprobs, 0, num_ids)
            self._on_event(TextEvent(event.choice, index, ids[:num_ids], text, reason, logprobs, offsets))
        if reason is not None and not self.is_over:
            self._end_choice(choice, reason)

    def _end_choice(self, choice: Choice, reason: FinishReason) -> None:
        choice.is_done = True
        choice.is_plain = False
        self._num_open -= 1
        self._counters.finished[reason] += 1
        if self._num_open == 0:
            self._end(None)
            on_event = self._on_event
            self._leave()
            on_event(Finished(self.usage))

    def _count(self, choice: Choice, num_ids: int) -> None:
        if not num_ids:
            return
        now = time.monotonic()
        counters = self._counters
        counters.num_generated_tokens += num_ids
        last, choice.last_token_s = choice.last_token_s, now
        if last:
            counters.between_tokens_s.observe((now - last) / num_ids, num_ids)
        if self._first_token_s is None:
            self._first_token_s = now
            self._first_token_ns = time.time_ns()
            counters.first_token_s.observe(now - self._started_s)
            self._trace.event("first token")

    def _leave(self, *, cancels: bool = False) -> None:
        """Let go of whoever listens and of the request's owner, who hold this one: nothing goes in circles
        that only a collection would find."""
        ticket, self._ticket = self._ticket, None
        if ticket is not None:
            self._num_cached = ticket.num_cached_tokens
            if cancels:
                ticket.cancel()
        self._on_event = _ignore
        self.on_over = _nothing
        self.on_failed = _ignore

    def _end(self, reason: str | None, error: str | None = None) -> None:
        """Close the books; `reason` is counted for the choices that are still open."""
        self.is_over = True
        counters, now = self._counters, time.monotonic()
        if reason is not None:
            counters.finished[reason] += self._num_open
        num_generated = self.usage.num_generated_tokens
        counters.whole_request_s.observe(now - self._started_s)
        counters.prompt_lengths.observe(len(self._request.prompt))
        counters.generation_lengths.observe(num_generated)
        if self._first_token_s is not None:
            if num_generated > len(self._choices):
                counters.per_output_token_s.observe((now - self._first_token_s) / (num_generated - 1))
            self._trace.phase("stream", self._first_token_ns, time.time_ns())
        self._trace.end(
            {
                "gen_ai.usage.input_tokens": len(self._request.prompt),
                "gen_ai.usage.output_tokens": num_generated,
            },
            error=error or ("cancelled" if reason == "abort" else None),
        )
        self.on_over()
