"""`POST /v1/chat/completions`: messages to token ids through the chat template, and the answer's shape."""

import time
from collections.abc import Sequence

import msgspec

from pagebus.gateway.answering import Job, answer
from pagebus.gateway.context import GatewayContext
from pagebus.gateway.errors import ApiError, invalid
from pagebus.gateway.limits import Receive, Scope, Send
from pagebus.gateway.openai_types import (
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatMessage,
    ChatRequest,
    UsageBody,
    refuse_unserved_chat,
)
from pagebus.gateway.requests import from_text_error, generation_request, read_request, traced
from pagebus.gateway.responder import Endpoint
from pagebus.gateway.shapes import AnswerShape
from pagebus.gateway.text_errors import TextError, TokenizerBusyError
from pagebus.gateway.tracing import RequestTrace


class ChatShape(AnswerShape):
    """Bodies of one chat answer."""

    is_chat = True
    id_prefix = "chatcmpl-"
    chunk_kind = "chat.completion.chunk"

    def whole(self, texts: Sequence[str], reasons: Sequence[str], usage: UsageBody) -> bytes:
        """A `chat.completion`."""
        choices = [
            ChatChoice(index=index, message=AnswerMessage(content=text), finish_reason=reason)
            for index, (text, reason) in enumerate(zip(texts, reasons, strict=True))
        ]
        return msgspec.json.encode(
            ChatCompletion(
                id=self._id,
                created=self._created,
                model=self._model,
                system_fingerprint=self._fingerprint,
                choices=choices,
                usage=usage,
            )
        )


class ChatEndpoint(Endpoint):
    """The route."""

    def __init__(self, context: GatewayContext) -> None:
        self._context = context
        self._decoder = msgspec.json.Decoder(ChatRequest)

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one chat."""
        context = self._context
        request = await read_request(context, scope, receive, self._decoder)
        model = context.checked_model(request.model)
        refuse_unserved_chat(request)
        if request.max_completion_tokens is None:
            limit_name, max_tokens = "max_tokens", request.max_tokens
        else:
            limit_name, max_tokens = "max_completion_tokens", request.max_completion_tokens
        if max_tokens == 0:
            raise invalid(f"{limit_name} must be at least 1", limit_name)
        tenant = context.tenant(scope["headers"])
        with traced(context, scope, request, model) as trace:
            prompt = await tokenize(context, request, trace)
            job = Job(
                requests=[generation_request(context, tenant, request, prompt, max_tokens, None)],
                shape=ChatShape(model, context.fingerprint),
                is_stream=bool(request.stream),
                has_usage_chunk=request.has_usage_chunk,
                has_usage_everywhere=request.has_usage_everywhere,
                trace=trace,
            )
            try:
                await answer(context, job, scope, receive, send)
            except ApiError as error:  # a generation's words for what chats call otherwise
                names = {"prompt": "messages", "max_tokens": limit_name}
                error.param = names.get(error.param or "", error.param)
                raise


async def tokenize(context: GatewayContext, request: ChatRequest, trace: RequestTrace) -> list[int]:
    """The ids of the rendered messages; raises `ApiError`."""
    if not context.tokenizer.has_chat_template:
        raise invalid("this model has no chat template; use /v1/completions", "messages", "no_chat_template")
    does_continue = bool(request.continue_final_message)
    adds_prompt = request.add_generation_prompt
    if adds_prompt is None:
        adds_prompt = not does_continue
    if does_continue and adds_prompt:
        raise invalid(
            "continue_final_message and add_generation_prompt exclude each other", "continue_final_message"
        )
    start_ns = time.time_ns()
    try:
        prompt = await context.tokenizer.encode_chat_async(
            [template_message(index, message) for index, message in enumerate(request.messages)],
            tools=request.tools,
            add_generation_prompt=adds_prompt,
            continue_final_message=does_continue,
            template_kwargs=request.chat_template_kwargs,
        )
    except (TextError, TokenizerBusyError) as error:
        raise from_text_error(error, "messages") from None
    trace.phase("tokenize", start_ns, time.time_ns(), {"gen_ai.usage.input_tokens": len(prompt)})
    return prompt


def template_message(index: int, message: ChatMessage) -> dict[str, object]:
    """A message as templates expect it: `developer` is `system`, tool arguments are objects."""
    if message.content is None and message.role != "assistant":
        raise invalid(
            f"messages[{index}].content: null is allowed for the assistant only", f"messages[{index}].content"
        )
    fields = msgspec.to_builtins(message)
    result: dict[str, object] = dict(fields)
    if message.role == "developer":
        result["role"] = "system"
    if message.content is None:
        result["content"] = ""
    if message.tool_calls:
        result["tool_calls"] = [
            {
                "id": call.id,
                "type": call.type,
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return result


def _arguments(text: str) -> object:
    try:
        return msgspec.json.decode(text) if text else {}
    except (msgspec.DecodeError, RecursionError):
        return text
