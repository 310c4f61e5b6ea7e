"""One HTTP request, ready to run: its prompts, how to answer, and what is echoed.

It knows no HTTP and no JSON.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from pagebus.gateway.errors import invalid
from pagebus.gateway.generation_events import GenerationRequest, PromptEvent
from pagebus.gateway.limits import MAX_TOLD_LOGPROBS
from pagebus.gateway.logprob_shapes import TextLogprobs
from pagebus.gateway.sampling_params import TokenDetails
from pagebus.gateway.shapes import AnswerShape, PromptAnswer
from pagebus.gateway.tracing import NO_TRACE, RequestTrace
from pagebus.requester.packed_logprobs import num_tokens


@dataclass(frozen=True)
class Echo:
    """Text that stands before what is generated; `offsets`: where in it each of the prompt's tokens begins,
    where their log-probabilities are echoed too."""

    text: str
    offsets: Sequence[int] = ()


@dataclass(frozen=True)
class Idempotency:
    """A client's `Idempotency-Key`, and a digest of the route and body that came with it."""

    key: str
    body_digest: bytes


@dataclass(frozen=True, kw_only=True)
class Job:
    """One or more prompts with equally many choices each, and how to answer."""

    requests: Sequence[GenerationRequest]
    shape: AnswerShape
    is_stream: bool
    has_usage_chunk: bool = False
    has_usage_everywhere: bool = False
    echoes: Sequence[Echo] = ()  # by prompt, or none
    is_echo_only: bool = (
        False  # max_tokens is 0: one token is made where the prompt must be told, and dropped
    )
    trace: RequestTrace = field(default=NO_TRACE)
    idempotency: Idempotency | None = None

    @property
    def num_choices_each(self) -> int:
        """Choices of one prompt."""
        return self.requests[0].num_choices

    @property
    def num_choices(self) -> int:
        """Choices of all prompts together."""
        return self.num_choices_each * len(self.requests)

    @property
    def needs_run(self) -> bool:
        """Whether an executor has anything to do."""
        return not self.is_echo_only or self.shape.details.num_asked_of_prompt is not None

    def choices_of(self, prompt: int) -> range:
        """The numbers of a prompt's choices."""
        return range(prompt * self.num_choices_each, (prompt + 1) * self.num_choices_each)

    def num_before(self, choice: int) -> int:
        """Characters that are echoed before what is generated."""
        return len(self.echoes[choice // self.num_choices_each].text) if self.echoes else 0


class PromptTeller:
    """What is told of a job's prompts, as it comes."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._details = job.shape.details
        self._writer = job.shape.writer
        self._num_told = [1] * len(job.requests)
        self.prompts = [PromptAnswer(request.prompt) for request in job.requests]
        self.echoed: list[list[TextLogprobs]] = [
            [self._writer.first_of_text(request.prompt[0])] if self._details.has_echoed_logprobs else []
            for request in job.requests
        ]

    def take(self, prompt: int, event: PromptEvent) -> None:
        """More of one prompt's log-probabilities."""
        details, logprobs = self._details, event.logprobs
        end = event.start + num_tokens(logprobs)
        if details.num_prompt_logprobs is not None:
            self.prompts[prompt].told.append(self._writer.prompt(logprobs, details.num_prompt_logprobs))
        if details.has_echoed_logprobs and details.num_logprobs is not None:
            offsets = self._job.echoes[prompt].offsets[event.start : end]
            self.echoed[prompt].append(self._writer.text(logprobs, details.num_logprobs, offsets))
        self._num_told[prompt] = end

    def is_complete(self, prompt: int) -> bool:
        """Whether nothing of this prompt is waited for."""
        is_asked = self._details.num_asked_of_prompt is not None
        return not is_asked or self._num_told[prompt] >= len(self._job.requests[prompt].prompt)


def check_told(prompts: Sequence[Sequence[int]], details: TokenDetails, param: str) -> None:
    """Raises a 400 where more log-probabilities of prompts are asked for than one answer may hold."""
    num_top = details.num_asked_of_prompt
    if num_top is None:
        return
    num_told = sum(map(len, prompts)) * (1 + num_top)
    if num_told > MAX_TOLD_LOGPROBS:
        raise invalid(
            f"{num_told} log-probabilities of the prompt exceed the limit of {MAX_TOLD_LOGPROBS}; ask for "
            "fewer beside each token, or send fewer tokens",
            param,
        )
