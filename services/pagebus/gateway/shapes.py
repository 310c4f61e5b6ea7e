"""What the answers of all routes share: one id, one time and one name for the whole and for every chunk, and
what is told of tokens besides text."""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Self

import msgspec
from msgspec import UNSET, UnsetType

from pagebus.gateway.answer_types import UsageBody
from pagebus.gateway.generation_events import TextEvent
from pagebus.gateway.logprob_shapes import LogprobsBody, LogprobWriter
from pagebus.gateway.request_ids import new_answer_id
from pagebus.gateway.sampling_params import TokenDetails
from pagebus.gateway.sse import ChunkTemplate


@dataclass
class PromptAnswer:
    """What is told of one prompt. `told`: elements of vLLM's `prompt_logprobs`, as JSON without brackets."""

    ids: Sequence[int]
    told: list[bytes] = field(default_factory=lambda: [b"null"])


@dataclass
class ChoiceAnswer:
    """A choice of a whole answer, as it grows."""

    prompt: PromptAnswer
    texts: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    logprobs: list[LogprobsBody] = field(default_factory=list)
    reason: str = "length"

    @property
    def text(self) -> str:
        """Its whole text."""
        return "".join(self.texts)


class AnswerShape(ABC):
    """Base of one answer's bodies."""

    is_chat: ClassVar[bool]
    kind: ClassVar[Literal["chat", "completion"]]
    id_prefix: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(
        self,
        model: str,
        fingerprint: str,
        details: TokenDetails,
        writer: LogprobWriter,
        *,
        answer_id: str = "",
        created: int = 0,
    ) -> None:
        """`answer_id` and `created` (unix seconds): an earlier answer's, to tell the same one again."""
        self._id = answer_id or self.id_prefix + new_answer_id()
        self._created = created or int(time.time())
        self._model = model
        self._fingerprint = fingerprint
        self.details = details
        self.writer = writer

    @property
    def id(self) -> str:
        """The answer's id."""
        return self._id

    @property
    def created(self) -> int:
        """Unix seconds."""
        return self._created

    @property
    def model(self) -> str:
        """The name that the client knows the model by."""
        return self._model

    @property
    def fingerprint(self) -> str:
        """`system_fingerprint`."""
        return self._fingerprint

    def again(self, answer_id: str, created: int) -> Self:
        """The same shape under another answer's id and time."""
        return type(self)(
            self._model, self._fingerprint, self.details, self.writer, answer_id=answer_id, created=created
        )

    @abstractmethod
    def whole(self, choices: Sequence[ChoiceAnswer], usage: UsageBody) -> bytes:
        """The body of an answer that is not streamed."""

    @abstractmethod
    def logprobs_of(self, event: TextEvent, num_before: int) -> LogprobsBody | None:
        """The log-probabilities of an event's tokens, where they are asked for; `num_before`: characters of
        the choice's text before what is generated."""

    def chunks(self, has_usage: bool) -> ChunkTemplate:
        """The template of a stream's chunks."""
        return ChunkTemplate(
            answer_id=self._id,
            kind=self.chunk_kind,
            created=self._created,
            model=self._model,
            fingerprint=self._fingerprint,
            is_chat=self.is_chat,
            usage=has_usage,
        )

    def prompt_logprobs(self, prompt: PromptAnswer) -> msgspec.Raw | UnsetType:
        """vLLM's `prompt_logprobs`, where they are asked for."""
        if self.details.num_prompt_logprobs is None:
            return UNSET
        return msgspec.Raw(b"[" + b",".join(prompt.told) + b"]")

    def token_ids(self, ids: Sequence[int]) -> list[int] | UnsetType:
        """vLLM's `token_ids` and `prompt_token_ids`, where they are asked for."""
        return list(ids) if self.details.has_token_ids else UNSET
