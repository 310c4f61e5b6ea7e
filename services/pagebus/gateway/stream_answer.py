"""Forwards what a streamed answer holds, chunk by chunk. It knows no sockets, only a callable that takes
bytes."""

from collections.abc import Callable, Sequence

import msgspec

from pagebus.gateway.answer_types import UsageBody
from pagebus.gateway.generation_events import PromptEvent, TextEvent
from pagebus.gateway.jobs import Job, PromptTeller
from pagebus.gateway.logprob_shapes import joined_text
from pagebus.gateway.sse import encode_json


class StreamAnswer:
    """One stream: `open`, then a job's events. `on_first` is called with everything written for them."""

    def __init__(
        self,
        job: Job,
        write: Callable[[bytes], None],
        usage_now: Callable[[], UsageBody],
        on_first: Callable[[], None],
    ) -> None:
        self.template = job.shape.chunks(job.has_usage_chunk)
        self._job = job
        self._details = job.shape.details
        self._write = write
        self._usage_now = usage_now
        self._on_first = on_first
        self._teller = PromptTeller(job)

    def open(self) -> None:
        """What comes before the first token: roles, and the echo unless log-probabilities belong to it."""
        for prompt in range(len(self._job.requests)):
            if self._job.shape.is_chat:
                ids = self._ids("prompt_token_ids", self._job.requests[prompt].prompt)
                for choice in self._job.choices_of(prompt):
                    self._write(self.template.role(choice, self._usage(), ids))
            if self._teller.is_complete(prompt):
                self._echo(prompt)

    def on_prompt(self, prompt: int, event: PromptEvent) -> None:
        """Log-probabilities of a prompt."""
        self._teller.take(prompt, event)
        if self._teller.is_complete(prompt):
            self._echo(prompt)
            self._on_first()

    def on_text(self, event: TextEvent) -> None:
        """News of a choice. Tokens are told with the chunk that they came for, also while their text is held
        back."""
        if self._job.is_echo_only:
            return
        choice = event.choice
        logprobs = self._job.shape.logprobs_of(event, self._job.num_before(choice))
        ids = self._ids("token_ids", event.ids) if event.ids else b""
        if event.text or logprobs is not None or ids:
            told = b"null" if logprobs is None else encode_json(logprobs)
            self._write(self.template.text(choice, event.text, self._usage(), told, ids))
        if event.finish_reason is not None:
            self._write(self.template.finish(choice, event.finish_reason, self._usage()))
        self._on_first()

    def _echo(self, prompt: int) -> None:
        """The chunk of the echoed text, and what else a text's choice begins with."""
        job = self._job
        echoed = self._teller.echoed[prompt]
        ids = b"" if job.shape.is_chat else self._ids("prompt_token_ids", job.requests[prompt].prompt)
        for choice in job.choices_of(prompt):
            if job.echoes or ids:
                text = job.echoes[prompt].text if job.echoes else ""
                told = encode_json(joined_text(echoed)) if echoed else b"null"
                self._write(self.template.text(choice, text, self._usage(), told, ids))
            if job.is_echo_only:
                self._write(self.template.finish(choice, "length", self._usage()))

    def _ids(self, name: str, ids: Sequence[int]) -> bytes:
        """A further member of a chunk or choice, where ids are asked for."""
        if not self._details.has_token_ids:
            return b""
        return b',"' + name.encode() + b'":' + msgspec.json.encode(list(ids))

    def _usage(self) -> UsageBody | None:
        return self._usage_now() if self._job.has_usage_everywhere else None
