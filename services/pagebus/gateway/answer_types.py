"""The shapes of OpenAI's answers to chat and text completions, and of the list of models.

Fields that are vLLM's additions are left out (`UNSET`) where nobody asked for them. It knows nothing of how
they are filled.
"""

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from pagebus.gateway.generation_events import Usage
from pagebus.gateway.logprob_shapes import ChatLogprobs, TextLogprobs


class PromptDetails(msgspec.Struct, frozen=True):
    """`usage.prompt_tokens_details`; `cached_tokens` came from the prefix cache."""

    audio_tokens: int = 0
    cached_tokens: int = 0


class CompletionDetails(msgspec.Struct, frozen=True):
    """`usage.completion_tokens_details`."""

    accepted_prediction_tokens: int = 0
    audio_tokens: int = 0
    reasoning_tokens: int = 0
    rejected_prediction_tokens: int = 0


class UsageBody(msgspec.Struct, frozen=True, kw_only=True):
    """`usage`."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails = PromptDetails()
    completion_tokens_details: CompletionDetails = CompletionDetails()


def usage_body(usage: Usage) -> UsageBody:
    """A generation's counts in OpenAI's shape."""
    return UsageBody(
        prompt_tokens=usage.num_prompt_tokens,
        completion_tokens=usage.num_generated_tokens,
        total_tokens=usage.num_prompt_tokens + usage.num_generated_tokens,
        prompt_tokens_details=PromptDetails(cached_tokens=usage.num_cached_tokens),
    )


class AnswerMessage(msgspec.Struct, frozen=True, kw_only=True):
    """The message of a chat's choice."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A choice of a whole chat answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    """A whole chat answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: UsageBody
    prompt_logprobs: msgspec.Raw | UnsetType = UNSET  # list of objects by token id, the first null
    prompt_token_ids: list[int] | UnsetType = UNSET


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A choice of a whole text answer."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: str
    prompt_logprobs: msgspec.Raw | UnsetType = UNSET  # list of objects by token id, the first null
    prompt_token_ids: list[int] | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """A whole text answer."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: UsageBody


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """A model in the list; `max_model_len` (tokens) is vLLM's addition, null while nobody has said it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "pagebus"
    max_model_len: int | None = None


class ModelList(msgspec.Struct, frozen=True):
    """`GET /v1/models`."""

    data: list[ModelCard]
    object: Literal["list"] = "list"
