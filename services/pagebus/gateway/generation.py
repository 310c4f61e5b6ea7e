"""Turns a parsed request into text: submits it, detokenizes, finds stop strings, counts, tells a callback.

The one place where that happens, for every way in. It knows no HTTP, no JSON and no chat templates.
"""

import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence

import msgspec

from pagebus.bus import subjects
from pagebus.bus.messages import FinishReason, Sampling
from pagebus.gateway.counters import Counters
from pagebus.gateway.errors import ApiError, invalid
from pagebus.gateway.submitter import Submitter, Ticket
from pagebus.gateway.text_stream import TextStream
from pagebus.gateway.tokenizer import Tokenizer
from pagebus.gateway.tracing import NO_TRACE, RequestTrace
from pagebus.requester.events import Event, NewTokens, RequestFailed, RequestSpec

_log = logging.getLogger(__name__)

MAX_TOKEN_COUNT = (1 << 31) - 1


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt and how to go on from it. `sampling.seed` is fixed (`new_seed` where the client gave none).

    `max_tokens` None: `default_max_tokens`, or what the context leaves if that is less or None too.
    """

    request_id: str  # our own, see request_ids.new_request_id
    prompt: Sequence[int]
    num_choices: int = 1
    sampling: Sampling
    max_tokens: int | None = None
    default_max_tokens: int | None = None
    min_tokens: int = 0
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    include_stop: bool = False
    skip_special_tokens: bool = True
    priority: int = 0
    tenant: str = ""
    cache_salt: str = ""
    timeout_s: float = 600.0


class Usage(msgspec.Struct, frozen=True):
    """Token counts of a request; ids after a stop string do not count."""

    num_prompt_tokens: int
    num_generated_tokens: int


class TextEvent(msgspec.Struct, frozen=True):
    """News of a choice. `text` may lag behind `ids`; `index` is the first id's among the generated ones.

    A finish reason ends the choice."""

    choice: int
    index: int
    ids: Sequence[int]
    text: str
    finish_reason: FinishReason | None


class Finished(msgspec.Struct, frozen=True):
    """All choices ended; nothing follows."""

    usage: Usage


GenerationEvent = TextEvent | Finished | RequestFailed
OnEvent = Callable[[GenerationEvent], None]


class _Choice:
    """What is known of one choice."""

    __slots__ = ("is_done", "num_ids", "stream")

    def __init__(self, stream: TextStream) -> None:
        self.stream = stream
        self.num_ids = 0
        self.is_done = False


class Generation:
    """One running request. Ends with `Finished`, with `RequestFailed`, or silently by `cancel`."""

    def __init__(
        self,
        request: GenerationRequest,
        choices: Sequence[_Choice],
        stop_ids: frozenset[int],
        counters: Counters,
        on_event: OnEvent,
        trace: RequestTrace,
    ) -> None:
        self._request = request
        self._choices = choices
        self._stop_ids = stop_ids
        self._counters = counters
        self._on_event = on_event
        self._trace = trace
        self._ticket: Ticket | None = None
        self._started_s = time.monotonic()
        self._first_token_s: float | None = None
        self._first_token_ns = 0
        self._last_token_s = [0.0] * len(choices)
        self._num_open = len(choices)
        self.is_over = False
        self.on_over: Callable[[], None] = lambda: None

    @property
    def usage(self) -> Usage:
        """Token counts so far."""
        return Usage(len(self._request.prompt), sum(choice.num_ids for choice in self._choices))

    def num_generated(self, choice: int) -> int:
        """Ids of one choice so far."""
        return self._choices[choice].num_ids

    def attach(self, ticket: Ticket) -> None:
        """Take the submitted request's ticket; what ended before it came is told to it now."""
        self._ticket = ticket
        if self.is_over:
            ticket.cancel()
            return
        for index, choice in enumerate(self._choices):
            if choice.is_done:
                ticket.end_choice(index)

    def cancel(self) -> None:
        """The reader went away: stop at once. Does nothing when it is over already."""
        if not self.is_over:
            self._end("abort")
            if self._ticket is not None:
                self._ticket.cancel()

    def fail(self, failure: RequestFailed) -> None:
        """End it with an error that is not the requester's."""
        if not self.is_over:
            self._end("error", failure.code)
            if self._ticket is not None:
                self._ticket.cancel()
            self._on_event(failure)

    def take(self, event: Event) -> None:
        """The requester's callback. Whatever goes wrong in here ends this request and no other."""
        if self.is_over:
            return
        try:
            if isinstance(event, NewTokens):
                self._take_tokens(event)
            else:
                self._end("error", event.code)
                self._on_event(event)
        except Exception:
            _log.exception("request %s failed in the gateway", self._request.request_id)
            self.fail(RequestFailed("internal_error", "the gateway failed to process this request"))

    def _take_tokens(self, event: NewTokens) -> None:
        choice = self._choices[event.choice]
        if choice.is_done:
            return
        ids, reason = event.ids, event.finish_reason
        # The id that stopped the choice counts, but its text is not the answer's.
        has_stop_id = reason == "stop" and len(ids) > 0 and ids[-1] in self._stop_ids
        delta = choice.stream.push(ids[:-1] if has_stop_id else ids)
        text, stop, num_ids = delta.text, delta.stop, delta.num_ids
        if stop is None and reason is not None:
            rest = choice.stream.finish()
            text, stop = text + rest.text, rest.stop
            num_ids = len(ids)
        self._count(event.choice, num_ids)
        index = choice.num_ids
        choice.num_ids += num_ids
        if stop is not None and reason is None and self._ticket is not None:
            self._ticket.end_choice(event.choice)
        if stop is not None:
            reason = "stop"
        if num_ids or text or reason:
            self._on_event(TextEvent(event.choice, index, ids[:num_ids], text, reason))
        if reason is not None and not self.is_over:
            self._end_choice(choice, reason)

    def _end_choice(self, choice: _Choice, reason: FinishReason) -> None:
        choice.is_done = True
        self._num_open -= 1
        self._counters.finished[reason] += 1
        if self._num_open == 0:
            self._end(None)
            self._on_event(Finished(self.usage))

    def _count(self, choice: int, num_ids: int) -> None:
        if not num_ids:
            return
        now = time.monotonic()
        counters = self._counters
        counters.num_generated_tokens += num_ids
        last = self._last_token_s[choice]
        self._last_token_s[choice] = now
        if last:
            counters.between_tokens_s.observe((now - last) / num_ids, num_ids)
        if self._first_token_s is None:
            self._first_token_s = now
            self._first_token_ns = time.time_ns()
            counters.first_token_s.observe(now - self._started_s)
            self._trace.event("first token")

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


class Generations:
    """Starts generations and knows the live ones."""

    def __init__(
        self,
        submitter: Submitter,
        tokenizer: Tokenizer,
        counters: Counters,
        *,
        model: str,
        max_model_len: int = 0,
    ) -> None:
        """`model` is the name on the bus; `max_model_len` 0: what the heartbeats say."""
        self._submitter = submitter
        self._tokenizer = tokenizer
        self._counters = counters
        self._destination = subjects.generate(model)
        self._limit = max_model_len
        self._known_max_model_len = 0
        self._live: set[Generation] = set()
        self.is_draining = False

    @property
    def num_live(self) -> int:
        """Generations that have not ended."""
        return len(self._live)

    @property
    def max_model_len(self) -> int:
        """The context in tokens; 0 while nobody has said so. A leader that knows no executor yet changes
        nothing."""
        beat = self._submitter.heartbeat
        if beat is not None and beat.max_model_len:
            self._known_max_model_len = beat.max_model_len
        known = self._known_max_model_len
        return min(known, self._limit) if known and self._limit else known

    def start(
        self, request: GenerationRequest, on_event: OnEvent, trace: RequestTrace = NO_TRACE
    ) -> Generation:
        """Check the request against model and context, and submit it.

        Raises `ApiError` (nothing was submitted, the trace is not ended). `on_event` may be called before
        this returns; it must not raise or block.
        """
        max_tokens = self._checked_max_tokens(request)
        stop_ids = frozenset(request.stop_token_ids)
        if not request.ignore_eos:
            stop_ids |= self._tokenizer.eos_token_ids
        spec = RequestSpec(
            request_id=request.request_id,
            prompt=request.prompt,
            num_choices=request.num_choices,
            sampling=request.sampling,
            stop_token_ids=sorted(stop_ids),
            max_tokens=max_tokens,
            min_tokens=min(request.min_tokens, max_tokens),
            priority=request.priority,
            tenant=request.tenant,
            cache_salt=request.cache_salt,
            timeout_s=request.timeout_s,
            headers=self._trace_headers(trace, request.request_id),
        )
        choices = [
            _Choice(
                self._tokenizer.stream(
                    request.stop,
                    include_stop=request.include_stop,
                    skip_special_tokens=request.skip_special_tokens,
                    min_tokens=request.min_tokens,
                )
            )
            for _ in range(request.num_choices)
        ]
        generation = Generation(request, choices, stop_ids, self._counters, on_event, trace)
        self._live.add(generation)
        generation.on_over = lambda: self._live.discard(generation)
        self._counters.num_prompt_tokens += len(request.prompt)
        generation.attach(self._submitter.submit(spec, generation.take))
        return generation

    def fail_all(self, code: str, message: str) -> None:
        """End every live generation with an error."""
        for generation in list(self._live):
            generation.fail(RequestFailed(code, message))

    def _trace_headers(self, trace: RequestTrace, request_id: str) -> Mapping[str, str]:
        return trace.send(self._destination, request_id)

    def _checked_max_tokens(self, request: GenerationRequest) -> int:
        if self.is_draining:
            raise ApiError(
                503, "this gateway is shutting down", code="server_shutting_down", retry_after_s=1.0
            )
        context = self.max_model_len
        if not context:
            raise ApiError(
                503, "no scheduler with an executor has been heard yet", code="not_ready", retry_after_s=1.0
            )
        num_prompt = len(request.prompt)
        check_prompt(request.prompt, self._tokenizer.vocab_size)
        room = context - num_prompt
        if room < 1:
            raise _too_long(
                f"the prompt has {num_prompt} tokens; with at least one to generate it exceeds the context "
                f"of {context} tokens",
                "prompt",
            )
        wanted = request.max_tokens
        if wanted is None:
            return room if request.default_max_tokens is None else min(room, request.default_max_tokens)
        if wanted > room:
            raise _too_long(
                f"the prompt has {num_prompt} tokens and max_tokens is {wanted}: {num_prompt + wanted} "
                f"exceed the context of {context} tokens; ask for at most {room}",
                "max_tokens",
            )
        return wanted


def check_prompt(prompt: Sequence[int], vocab_size: int) -> None:
    """Raises a 400 for an empty prompt or ids that the model has no logits for."""
    if not prompt:
        raise invalid("the prompt has no tokens", "prompt", "empty_prompt")
    lowest, highest = min(prompt), max(prompt)
    if lowest < 0 or highest >= vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise invalid(
            f"token id {wrong} is outside the vocabulary of {vocab_size}", "prompt", "invalid_token_id"
        )


def new_seed() -> int:
    """A random 63-bit seed for a request that gave none."""
    return secrets.randbits(63)


def _too_long(message: str, param: str) -> ApiError:
    return invalid(message, param, "context_length_exceeded")
