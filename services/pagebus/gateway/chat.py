"""`POST /v1/chat/completions`: messages to token ids through the chat template, and the answer's shape."""

import time
from collections.abc import Sequence

import msgspec

from pagebus.gateway.answer_types import AnswerMessage, ChatChoice, ChatCompletion, UsageBody
from pagebus.gateway.answering import answer
from pagebus.gateway.context import GatewayContext
from pagebus.gateway.errors import ApiError, invalid
from pagebus.gateway.generation_events import GenerationRequest, TextEvent
from pagebus.gateway.jobs import Echo, Job, check_told
from pagebus.gateway.limits import Receive, Scope, Send
from pagebus.gateway.logprob_shapes import ChatLogprobs, LogprobWriter, joined_chat
from pagebus.gateway.openai_types import ChatMessage, ChatRequest
from pagebus.gateway.refusals import refuse_unserved_chat
from pagebus.gateway.requests import from_text_error, generation_request, read_request, traced
from pagebus.gateway.responder import Endpoint
from pagebus.gateway.sampling_params import TokenDetails, chat_details, sampling_of
from pagebus.gateway.shapes import AnswerShape, ChoiceAnswer
from pagebus.gateway.text_errors import TextError, TokenizerBusyError
from pagebus.gateway.tracing import RequestTrace


class ChatShape(AnswerShape):
    """Bodies of one chat answer."""

    is_chat = True
    kind = "chat"
    id_prefix = "chatcmpl-"
    chunk_kind = "chat.completion.chunk"

    def whole(self, choices: Sequence[ChoiceAnswer], usage: UsageBody) -> bytes:
        """A `chat.completion`."""
        has_logprobs = self.details.num_logprobs is not None
        prompt = choices[0].prompt
        return msgspec.json.encode(
            ChatCompletion(
                id=self._id,
                created=self._created,
                model=self._model,
                system_fingerprint=self._fingerprint,
                choices=[
                    ChatChoice(
                        index=index,
                        message=AnswerMessage(content=choice.text),
                        logprobs=joined_chat(choice.logprobs) if has_logprobs else None,
                        finish_reason=choice.reason,
                        token_ids=self.token_ids(choice.ids),
                    )
                    for index, choice in enumerate(choices)
                ],
                usage=usage,
                prompt_logprobs=self.prompt_logprobs(prompt),
                prompt_token_ids=self.token_ids(prompt.ids),
            )
        )

    def logprobs_of(self, event: TextEvent, num_before: int) -> ChatLogprobs | None:
        """The tokens of an event."""
        num_top = self.details.num_logprobs
        if num_top is None or event.logprobs is None or not event.ids:
            return None
        return self.writer.chat(event.logprobs, num_top)


class ChatEndpoint(Endpoint):
    """The route."""

    def __init__(self, context: GatewayContext) -> None:
        self._context = context
        self._decoder = msgspec.json.Decoder(ChatRequest)

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one chat."""
        context = self._context
        request, idempotency = await read_request(context, scope, receive, self._decoder)
        model = context.checked_model(request.model)
        refuse_unserved_chat(request)
        limit_name = chat_limit_name(request)
        tenant = context.tenant(scope["headers"])
        with traced(context, scope, request, model) as trace:
            context.generations.shedding.check(tenant)
            generation, details = await prepare(context, tenant, request, trace)
            echo = _echoed_text(request)
            job = Job(
                requests=[generation],
                shape=ChatShape(
                    model,
                    context.fingerprint,
                    details,
                    LogprobWriter(context.tokenizer.texts, details.as_ids),
                ),
                is_stream=bool(request.stream),
                has_usage_chunk=request.has_usage_chunk,
                has_usage_everywhere=request.has_usage_everywhere,
                echoes=[Echo(echo)] if echo else (),
                trace=trace,
                idempotency=idempotency,
            )
            try:
                await answer(context, job, scope, receive, send)
            except ApiError as error:  # a generation's words for what chats call otherwise
                names = {"prompt": "messages", "max_tokens": limit_name}
                error.param = names.get(error.param or "", error.param)
                raise


def chat_limit_name(request: ChatRequest) -> str:
    """Which of its two names the client gave to the limit of tokens."""
    return "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"


async def prepare(
    context: GatewayContext, tenant: str, request: ChatRequest, trace: RequestTrace
) -> tuple[GenerationRequest, TokenDetails]:
    """What to generate, and what to tell of it; raises `ApiError`."""
    max_tokens = (
        request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    )
    if max_tokens == 0:
        name = chat_limit_name(request)
        raise invalid(f"{name} must be at least 1", name)
    details = chat_details(request)
    sampling = sampling_of(request, details, context.defaults, context.tokenizer)
    prompt = await tokenize(context, request, trace)
    check_told([prompt], details, "prompt_logprobs")
    generation = generation_request(
        context, tenant, request, prompt, sampling, max_tokens, context.defaults.max_tokens
    )
    return generation, details


def _echoed_text(request: ChatRequest) -> str:
    """With `echo`, as in vLLM: the last message, where the answer goes on in its role."""
    last = request.messages[-1]
    adds_prompt = request.add_generation_prompt
    if adds_prompt is None:
        adds_prompt = not request.continue_final_message
    if not request.echo or (adds_prompt and last.role != "assistant") or last.content is None:
        return ""
    if isinstance(last.content, str):
        return last.content
    return "\n".join(part.text or "" for part in last.content)


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
