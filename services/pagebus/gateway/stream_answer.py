"""Forwards what a streamed answer holds, chunk by chunk. It knows no sockets, only a callable that takes
bytes."""

from collections.abc import Callable, Sequence

import msgspec

from pagebus.gateway.answer_types import UsageBody
from pagebus.gateway.event_ids import FINISH, NOTHING, OPEN, ROLE, TEXT, IdLines, Position, start
from pagebus.gateway.generation_events import PromptEvent, TextEvent
from pagebus.gateway.jobs import Job, PromptTeller
from pagebus.gateway.logprob_shapes import joined_text
from pagebus.gateway.sse import DONE, encode_json, encode_text


class StreamAnswer:
    """One stream: `open`, then a job's events, then `finish`. `on_first` is called with everything written
    for the first of them.

    With a `position`, what its reader has is left out, and every event that a reader can go on from has an
    id (`event_ids.py`).
    """

    def __init__(
        self,
        job: Job,
        write: Callable[[bytes], None],
        usage_now: Callable[[], UsageBody],
        on_first: Callable[[], None],
        position: Position | None = None,
    ) -> None:
        self.template = job.shape.chunks(job.has_usage_chunk)
        self._job = job
        self._details = job.shape.details
        self._write = write
        self._usage_now = usage_now
        self._on_first = on_first
        self._has_begun = False
        self._teller = PromptTeller(job)
        self._position = position or start(job.num_choices)
        self._sent = self._position.choices
        self._ids = None if position is None else IdLines(self._sent)
        # Events that hold nothing but text, for a reader from the beginning: nearly all there are.
        self._halves = [self.template.halves(choice) for choice in range(job.num_choices)]
        self._is_plain = (
            all(choice.stage == NOTHING for choice in self._sent)
            and not job.is_echo_only
            and not job.has_usage_everywhere
            and self._details.num_logprobs is None
            and not self._details.has_token_ids
        )

    def open(self) -> None:
        """What comes before the first token: roles, and the echo unless log-probabilities belong to it."""
        for prompt in range(len(self._job.requests)):
            if self._job.shape.is_chat:
                ids = self._told_ids("prompt_token_ids", self._job.requests[prompt].prompt)
                part = b"r" if self._job.echoes else b"0"
                for choice in self._job.choices_of(prompt):
                    if self._sent[choice].stage < ROLE:
                        self._emit(choice, part, self.template.role(choice, self._usage(), ids))
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
        choice, reason = event.choice, event.finish_reason
        if self._is_plain and reason is None:
            if event.text:
                before, after = self._halves[choice]
                chunk = before + encode_text(event.text) + after
                if self._ids is not None:
                    chunk = self._ids.plain(choice, event.index + len(event.ids), chunk)
                self._write(chunk)
            if not self._has_begun:
                self._has_begun = True
                self._on_first()
            return
        end = event.index + len(event.ids)
        sent = self._sent[choice]
        # The reader's own part ends where an event ends (`splitting.py`).
        is_old = end <= sent.num_ids if event.ids else sent.stage >= TEXT
        if not (is_old or sent.stage >= TEXT):
            self._text(event, b"%de" % end if reason else b"%d" % end)
        if reason is not None and sent.stage < FINISH:
            self._emit(choice, b"%df" % end, self.template.finish(choice, reason, self._usage()))
        if reason is not None or not is_old:
            self._on_first()

    def finish(self) -> None:
        """All choices ended."""
        if self._job.has_usage_chunk and not self._position.has_usage:
            line = b"" if self._ids is None else self._ids.usage_line()
            self._write(line + self.template.usage(self._usage_now()))
        self._write(DONE)

    def _text(self, event: TextEvent, part: bytes) -> None:
        choice = event.choice
        logprobs = self._job.shape.logprobs_of(event, self._job.num_before(choice))
        ids = self._told_ids("token_ids", event.ids) if event.ids else b""
        if event.text or logprobs is not None or ids:
            told = b"null" if logprobs is None else encode_json(logprobs)
            self._emit(choice, part, self.template.text(choice, event.text, self._usage(), told, ids))

    def _echo(self, prompt: int) -> None:
        """The chunk of the echoed text, and what else a text's choice begins with."""
        job = self._job
        echoed = self._teller.echoed[prompt]
        ids = b"" if job.shape.is_chat else self._told_ids("prompt_token_ids", job.requests[prompt].prompt)
        for choice in job.choices_of(prompt):
            if (job.echoes or ids) and self._sent[choice].stage < OPEN:
                text = job.echoes[prompt].text if job.echoes else ""
                told = encode_json(joined_text(echoed)) if echoed else b"null"
                self._emit(choice, b"0", self.template.text(choice, text, self._usage(), told, ids))
            if job.is_echo_only and self._sent[choice].stage < FINISH:
                self._emit(choice, b"0f", self.template.finish(choice, "length", self._usage()))

    def _emit(self, choice: int, part: bytes, chunk: bytes) -> None:
        """Write an event after which its reader has `part` of the choice."""
        self._write(chunk if self._ids is None else self._ids.before(choice, part, chunk))

    def _told_ids(self, name: str, ids: Sequence[int]) -> bytes:
        """A further member of a chunk or choice, where ids are asked for."""
        if not self._details.has_token_ids:
            return b""
        return b',"' + name.encode() + b'":' + msgspec.json.encode(list(ids))

    def _usage(self) -> UsageBody | None:
        return self._usage_now() if self._job.has_usage_everywhere else None
