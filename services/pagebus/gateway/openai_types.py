"""Request bodies of OpenAI's chat and text completions as typed structs, and the shapes of the answers.

Unknown fields are ignored. Bounds stand in the types; what needs a sentence to refuse is in `sampling_of` and
`refuse_unserved`. It knows nothing of tokens or the bus.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from pagebus.bus.messages import Sampling
from pagebus.gateway import limits
from pagebus.gateway.errors import invalid, unsupported
from pagebus.gateway.generation import MAX_TOKEN_COUNT, Usage, new_seed

_SEED_MASK = (1 << 63) - 1
_MAX_TIMEOUT_S = 86_400.0

TokenCount = Annotated[int, Meta(ge=0, le=MAX_TOKEN_COUNT)]
TokenId = Annotated[int, Meta(ge=0, le=MAX_TOKEN_COUNT)]
Seed = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
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
    repetition_penalty: Annotated[float, Meta(gt=0.0, le=1e6)] | None = None
    logit_bias: dict[str, float] | None = None
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
    top_logprobs: int | None = None
    tools: list[JsonObject] | None = None
    tool_choice: str | JsonObject | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: JsonObject | None = None


class CompletionRequest(CommonRequest, frozen=True, kw_only=True):
    """Body of `POST /v1/completions`. A prompt is text, token ids, or a list of either."""

    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    suffix: str | None = None
    add_special_tokens: bool | None = None


def sampling_of(request: CommonRequest) -> Sampling:
    """The request's sampling, with a seed fixed now if it has none."""
    top_k = max(request.top_k or 0, 0)
    top_p = 1.0 if request.top_p is None else request.top_p
    if top_p == 0.0:  # a nucleus of nothing: the best id alone
        top_p, top_k = 1.0, 1
    return Sampling(
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=request.min_p or 0.0,
        seed=new_seed() if request.seed is None else request.seed & _SEED_MASK,
    )


def refuse_unserved(request: CommonRequest) -> None:
    """Raises a 400 for parameters that would change the answer and that are not served."""
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options is only allowed with stream=true", "stream_options")
    if request.presence_penalty or request.frequency_penalty:
        name = "presence_penalty" if request.presence_penalty else "frequency_penalty"
        raise unsupported(name, f"{name} is not supported yet; leave it out or send 0")
    if request.repetition_penalty not in (None, 1.0):
        message = "repetition_penalty is not supported yet; leave it out or send 1"
        raise unsupported("repetition_penalty", message)
    if request.logit_bias:
        raise unsupported("logit_bias", "logit_bias is not supported yet; leave it out")
    if request.response_format is not None and request.response_format.type != "text":
        raise unsupported("response_format", "only response_format of type 'text' is supported yet")
    if any(not stop for stop in request.stop_strings):
        raise invalid("a stop string must not be empty", "stop")


def refuse_unserved_chat(request: ChatRequest) -> None:
    """`refuse_unserved`, and what only chats have."""
    refuse_unserved(request)
    if request.logprobs or request.top_logprobs:
        name = "logprobs" if request.logprobs else "top_logprobs"
        raise unsupported(name, f"{name}: log-probabilities are not supported yet; leave it out")
    if request.tools and request.tool_choice != "none":
        raise unsupported("tools", "tool calls are not supported yet; send tool_choice 'none' or no tools")


def refuse_unserved_completion(request: CompletionRequest) -> None:
    """`refuse_unserved`, and what only text completions have."""
    refuse_unserved(request)
    if request.logprobs is not None:
        raise unsupported("logprobs", "logprobs: log-probabilities are not supported yet; leave it out")
    if request.best_of is not None and request.best_of != request.num_choices:
        raise unsupported("best_of", "best_of is not supported; leave it out and use n")
    if request.suffix:
        raise unsupported("suffix", "suffix is not supported; leave it out")


class PromptDetails(msgspec.Struct, frozen=True):
    """`usage.prompt_tokens_details`; nothing is taken from a cache yet."""

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
    logprobs: None = None
    finish_reason: str


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    """A whole chat answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: UsageBody


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A choice of a whole text answer."""

    index: int
    text: str
    logprobs: None = None
    finish_reason: str


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
