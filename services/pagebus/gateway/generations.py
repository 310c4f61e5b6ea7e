"""Starts generations: checks a request against model and context, submits it, and knows the live ones."""

from collections.abc import Callable, Mapping, Sequence

import msgspec

from pagebus.bus import subjects
from pagebus.gateway.counters import Counters
from pagebus.gateway.errors import ApiError, invalid
from pagebus.gateway.generation import Choice, Generation
from pagebus.gateway.generation_events import GenerationRequest, OnEvent
from pagebus.gateway.shedding import Shedding
from pagebus.gateway.submitter import Submitter, Ticket
from pagebus.gateway.tokenizer import Tokenizer
from pagebus.gateway.tracing import NO_TRACE, RequestTrace
from pagebus.requester.events import Event, RequestFailed, RequestSpec

Submit = Callable[[RequestSpec, Callable[[Event], None]], Ticket]
"""Takes a request, and what hears of it: `Submitter.submit`, or a relay's."""


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
        self.is_draining = False  # the process is about to end
        self.is_closed = False  # nothing new is taken
        self.shedding = Shedding()

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

    def resolved(self, request: GenerationRequest) -> GenerationRequest:
        """The request with its limit of tokens, checked against model and context. Raises `ApiError`."""
        max_tokens = self._checked_max_tokens(request)
        return msgspec.structs.replace(request, max_tokens=max_tokens)

    def start(
        self,
        request: GenerationRequest,
        on_event: OnEvent,
        trace: RequestTrace = NO_TRACE,
        submit: Submit | None = None,
    ) -> Generation:
        """Check the request against model and context, and submit it.

        Raises `ApiError` (nothing was submitted, the trace is not ended). `on_event` may be called before
        this returns; it must not raise or block.
        """
        return self._begin(self.resolved(request), on_event, trace, submit, self._counters)

    def again(self, request: GenerationRequest, on_event: OnEvent, submit: Submit) -> Generation:
        """Tell a request again that was checked before, and counted. `submit` gives what is known of it.

        Raises `ApiError` while this gateway drains.
        """
        self._check_draining()
        return self._begin(request, on_event, NO_TRACE, submit, Counters())

    def _begin(
        self,
        request: GenerationRequest,
        on_event: OnEvent,
        trace: RequestTrace,
        submit: Submit | None,
        counters: Counters,
    ) -> Generation:
        max_tokens = request.max_tokens or 1
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
            Choice(
                self._tokenizer.stream(
                    request.stop,
                    include_stop=request.include_stop,
                    skip_special_tokens=request.skip_special_tokens,
                    min_tokens=request.min_tokens,
                    has_offsets=request.has_offsets,
                )
            )
            for _ in range(request.num_choices)
        ]
        generation = Generation(request, choices, stop_ids, counters, on_event, trace)
        self._live.add(generation)
        generation.on_over = lambda: self._live.discard(generation)
        generation.on_failed = lambda failure: self.shedding.note(request.tenant, failure)
        counters.num_prompt_tokens += len(request.prompt)
        generation.attach((submit or self._submitter.submit)(spec, generation.take))
        return generation

    def fail_all(self, code: str, message: str) -> None:
        """End every live generation with an error, and take nothing new."""
        self.is_closed = True
        for generation in list(self._live):
            generation.fail(RequestFailed(code, message))

    def _trace_headers(self, trace: RequestTrace, request_id: str) -> Mapping[str, str]:
        return trace.send(self._destination, request_id)

    def _check_draining(self) -> None:
        if self.is_closed:
            raise ApiError(
                503, "this gateway is shutting down", code="server_shutting_down", retry_after_s=1.0
            )

    def _checked_max_tokens(self, request: GenerationRequest) -> int:
        self._check_draining()
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


def _too_long(message: str, param: str) -> ApiError:
    return invalid(message, param, "context_length_exceeded")
