"""`POST /v1/completions`: prompts as text or token ids, several at once, and the answer's shape."""

import time
from collections.abc import Sequence

import msgspec

from pagebus.gateway.answering import Job, answer
from pagebus.gateway.context import GatewayContext
from pagebus.gateway.errors import invalid
from pagebus.gateway.generation import check_prompt
from pagebus.gateway.limits import MAX_PROMPTS, Receive, Scope, Send
from pagebus.gateway.openai_types import (
    Completion,
    CompletionChoice,
    CompletionRequest,
    UsageBody,
    refuse_unserved_completion,
)
from pagebus.gateway.requests import from_text_error, generation_request, read_request, traced
from pagebus.gateway.responder import Endpoint
from pagebus.gateway.shapes import AnswerShape
from pagebus.gateway.text_errors import TextError, TokenizerBusyError
from pagebus.gateway.tracing import RequestTrace

DEFAULT_MAX_TOKENS = 16
"""OpenAI's default for text completions."""


class CompletionShape(AnswerShape):
    """Bodies of one text answer."""

    is_chat = False
    id_prefix = "cmpl-"
    chunk_kind = "text_completion"

    def whole(self, texts: Sequence[str], reasons: Sequence[str], usage: UsageBody) -> bytes:
        """A `text_completion`."""
        choices = [
            CompletionChoice(index=index, text=text, finish_reason=reason)
            for index, (text, reason) in enumerate(zip(texts, reasons, strict=True))
        ]
        return msgspec.json.encode(
            Completion(
                id=self._id,
                created=self._created,
                model=self._model,
                system_fingerprint=self._fingerprint,
                choices=choices,
                usage=usage,
            )
        )


class CompletionEndpoint(Endpoint):
    """The route."""

    def __init__(self, context: GatewayContext) -> None:
        self._context = context
        self._decoder = msgspec.json.Decoder(CompletionRequest)

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, which may hold several prompts."""
        context = self._context
        request = await read_request(context, scope, receive, self._decoder)
        model = context.checked_model(request.model)
        refuse_unserved_completion(request)
        if request.max_tokens == 0 and not request.echo:
            raise invalid("max_tokens must be at least 1 (0 only with echo)", "max_tokens")
        prompts = split_prompts(request.prompt)
        if len(prompts) * request.num_choices > MAX_PROMPTS:
            raise invalid(
                f"{len(prompts)} prompts with n={request.num_choices} exceed {MAX_PROMPTS} choices", "n"
            )
        tenant = context.tenant(scope["headers"])
        with traced(context, scope, request, model) as trace:
            ids = await tokenize(context, request, prompts, trace)
            requests = [
                generation_request(context, tenant, request, prompt, request.max_tokens, DEFAULT_MAX_TOKENS)
                for prompt in ids
            ]
            prefixes: list[str] = []
            if request.echo:
                for prompt, prompt_ids in zip(prompts, ids, strict=True):
                    check_prompt(prompt_ids, context.tokenizer.vocab_size)
                    text = prompt if isinstance(prompt, str) else context.tokenizer.decode(prompt_ids)
                    prefixes += [text] * request.num_choices
            job = Job(
                requests=requests,
                shape=CompletionShape(model, context.fingerprint),
                is_stream=bool(request.stream),
                has_usage_chunk=request.has_usage_chunk,
                has_usage_everywhere=request.has_usage_everywhere,
                prefixes=prefixes,
                is_echo_only=request.max_tokens == 0,
                trace=trace,
            )
            await answer(context, job, scope, receive, send)


def split_prompts(prompt: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """The prompts of a request: texts and lists of ids. Raises a 400 for an empty list or a mixed one."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise invalid("prompt is an empty list", "prompt", "empty_prompt")
    ids = [item for item in prompt if isinstance(item, int)]
    if ids:
        if len(ids) != len(prompt):
            raise invalid("prompt mixes token ids with texts or lists", "prompt")
        return [ids]
    if len(prompt) > MAX_PROMPTS:
        raise invalid(f"{len(prompt)} prompts exceed the limit of {MAX_PROMPTS}", "prompt")
    prompts = [item for item in prompt if not isinstance(item, int)]
    if any(isinstance(item, str) for item in prompts) and any(isinstance(item, list) for item in prompts):
        raise invalid("prompt mixes texts with lists of token ids", "prompt")
    return prompts


async def tokenize(
    context: GatewayContext,
    request: CompletionRequest,
    prompts: Sequence[str | list[int]],
    trace: RequestTrace,
) -> list[list[int]]:
    """The ids of every prompt; ids that the client sent stay as they are, without BOS. Raises `ApiError`."""
    adds_special_tokens = request.add_special_tokens is not False
    start_ns = time.time_ns()
    ids: list[list[int]] = []
    try:
        for prompt in prompts:
            if isinstance(prompt, str):
                ids.append(await context.tokenizer.encode_async(prompt, adds_special_tokens))
            else:
                ids.append(prompt)
    except (TextError, TokenizerBusyError) as error:
        raise from_text_error(error, "prompt") from None
    num_tokens = sum(len(prompt) for prompt in ids)
    trace.phase("tokenize", start_ns, time.time_ns(), {"gen_ai.usage.input_tokens": num_tokens})
    return ids
