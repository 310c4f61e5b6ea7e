"""Request bodies of OpenAI's chat and text completions as typed structs, vLLM's additions among them.

Unknown fields are ignored. Bounds stand in the types; what needs a sentence to refuse is in `refusals.py`.
It knows nothing of tokens or the bus.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from pagebus.gateway import limits
from pagebus.gateway.generation_events import MAX_TOKEN_COUNT

_MAX_TIMEOUT_S = 86_400.0

TokenCount = Annotated[int, Meta(ge=0, le=MAX_TOKEN_COUNT)]
TokenId = Annotated[int, Meta(ge=0, le=MAX_TOKEN_COUNT)]
Seed = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
NumLogprobs = Annotated[int, Meta(ge=0, le=limits.MAX_LOGPROBS)]
Bias = Annotated[float, Meta(ge=-100.0, le=100.0)]
BadWord = Annotated[str, Meta(min_length=1, max_length=limits.MAX_BAD_WORD_CHARS)]
StopString = Annotated[str, Meta(max_length=limits.MAX_STOP_CHARS)]
StopList = Annotated[list[StopString], Meta(max_length=limits.MAX_STOP_STRINGS)]
JsonObject = dict[str, Any]  # passed on to the chat template as it is


class StreamOptions(msgspec.Struct, frozen=True):
    """`stream_options`."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True):
    """`response_format`; only plain text is served."""

    type: str = "text"


class CommonRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What both kinds of request share."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: TokenCount | None = None
    min_tokens: TokenCount | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=1e6)] | None = None
    top_p: Annotated[float, Meta(ge=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=MAX_TOKEN_COUNT)] | None = None
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] | None = None
    seed: Seed | None = None
    n: Annotated[int, Meta(ge=1, le=limits.MAX_CHOICES)] | None = None
    stop: StopString | StopList | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=limits.MAX_STOP_TOKEN_IDS)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    priority: Annotated[int, Meta(ge=-1_000_000, le=1_000_000)] | None = None
    cache_salt: Annotated[str, Meta(max_length=128)] | None = None
    timeout_s: Annotated[float, Meta(gt=0.0, le=_MAX_TIMEOUT_S)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.001, le=1000.0)] | None = None
    logit_bias: Annotated[dict[str, Bias], Meta(max_length=limits.MAX_LOGIT_BIAS)] | None = None
    bad_words: Annotated[list[BadWord], Meta(max_length=limits.MAX_BAD_WORDS)] | None = None
    allowed_token_ids: (
        Annotated[list[TokenId], Meta(min_length=1, max_length=limits.MAX_ALLOWED_TOKEN_IDS)] | None
    ) = None
    prompt_logprobs: NumLogprobs | None = None
    return_tokens_as_token_ids: bool | None = None
    return_token_ids: bool | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    logprob_token_ids: list[int] | None = None
    response_format: ResponseFormat | None = None

    @property
    def num_choices(self) -> int:
        """`n`, 1 by default."""
        return 1 if self.n is None else self.n

    @property
    def stop_strings(self) -> Sequence[str]:
        """`stop` as a list."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else self.stop

    @property
    def has_usage_chunk(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def has_usage_everywhere(self) -> bool:
        """Whether every chunk of a stream carries the usage so far."""
        return self.has_usage_chunk and bool(
            self.stream_options is not None and self.stream_options.continuous_usage_stats
        )


class ContentPart(msgspec.Struct, frozen=True, omit_defaults=True):
    """One part of a message's content; the text layer refuses what is not text."""

    type: str
    text: str | None = None
    refusal: str | None = None


class FunctionCall(msgspec.Struct, frozen=True):
    """The function of a tool call that an assistant's message reports."""

    name: str
    arguments: str = ""


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A tool call that an assistant's message reports."""

    function: FunctionCall
    id: str | None = None
    type: str = "function"


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class ChatRequest(CommonRequest, frozen=True, kw_only=True):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=limits.MAX_MESSAGES)]
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
    echo: bool | None = None
    tools: list[JsonObject] | None = None
    tool_choice: str | JsonObject | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: JsonObject | None = None


class CompletionRequest(CommonRequest, frozen=True, kw_only=True):
    """Body of `POST /v1/completions`. A prompt is text, token ids, or a list of either."""

    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: NumLogprobs | None = None
    best_of: int | None = None
    suffix: str | None = None
    add_special_tokens: bool | None = None
