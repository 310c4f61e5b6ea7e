"""`POST /v1/completions`: prompts as text or token ids, several at once, and the answer's shape."""

import time
from collections.abc import Sequence

import msgspec

from pagebus.gateway.answer_types import Completion, CompletionChoice, UsageBody
from pagebus.gateway.answering import answer
from pagebus.gateway.context import GatewayContext
from pagebus.gateway.errors import invalid
from pagebus.gateway.generation_events import TextEvent
from pagebus.gateway.generations import check_prompt
from pagebus.gateway.jobs import Echo, Job, check_told
from pagebus.gateway.limits import MAX_PROMPTS, Receive, Scope, Send
from pagebus.gateway.logprob_shapes import LogprobWriter, TextLogprobs, joined_text
from pagebus.gateway.openai_types import CompletionRequest
from pagebus.gateway.refusals import refuse_unserved_completion
from pagebus.gateway.requests import from_text_error, generation_request, read_request, traced
from pagebus.gateway.responder import Endpoint
from pagebus.gateway.sampling_params import TokenDetails, completion_details, sampling_of, with_own_seed
from pagebus.gateway.shapes import AnswerShape, ChoiceAnswer
from pagebus.gateway.text_errors import TextError, TokenizerBusyError
from pagebus.gateway.tracing import RequestTrace

DEFAULT_MAX_TOKENS = 16
"""OpenAI's default for text completions."""


class CompletionShape(AnswerShape):
    """Bodies of one text answer."""

    is_chat = False
    kind = "completion"
    id_prefix = "cmpl-"
    chunk_kind = "text_completion"

    def whole(self, choices: Sequence[ChoiceAnswer], usage: UsageBody) -> bytes:
        """A `text_completion`."""
        has_logprobs = self.details.num_logprobs is not None
        return msgspec.json.encode(
            Completion(
                id=self._id,
                created=self._created,
                model=self._model,
                system_fingerprint=self._fingerprint,
                choices=[
                    CompletionChoice(
                        index=index,
                        text=choice.text,
                        logprobs=joined_text(choice.logprobs) if has_logprobs else None,
                        finish_reason=choice.reason,
                        prompt_logprobs=self.prompt_logprobs(choice.prompt),
                        prompt_token_ids=self.token_ids(choice.prompt.ids),
                        token_ids=self.token_ids(choice.ids),
                    )
                    for index, choice in enumerate(choices)
                ],
                usage=usage,
            )
        )

    def logprobs_of(self, event: TextEvent, num_before: int) -> TextLogprobs | None:
        """The tokens of an event."""
        num_top = self.details.num_logprobs
        if num_top is None or event.logprobs is None or not event.ids:
            return None
        offsets = [num_before + offset for offset in event.offsets]
        return self.writer.text(event.logprobs, num_top, offsets)


class CompletionEndpoint(Endpoint):
    """The route."""

    def __init__(self, context: GatewayContext) -> None:
        self._context = context
        self._decoder = msgspec.json.Decoder(CompletionRequest)

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, which may hold several prompts."""
        context = self._context
        request, idempotency = await read_request(context, scope, receive, self._decoder)
        model = context.checked_model(request.model)
        refuse_unserved_completion(request)
        prompts = split_prompts(request.prompt)
        if len(prompts) * request.num_choices > MAX_PROMPTS:
            raise invalid(
                f"{len(prompts)} prompts with n={request.num_choices} exceed {MAX_PROMPTS} choices", "n"
            )
        tenant = context.tenant(scope["headers"])
        with traced(context, scope, request, model) as trace:
            context.generations.shedding.check(tenant)
            ids = await tokenize(context, request, prompts, trace)
            details = completion_details(request)
            check_told(ids, details, "logprobs" if details.has_echoed_logprobs else "prompt_logprobs")
            sampling = sampling_of(request, details, context.defaults, context.tokenizer)
            is_echo_only = request.max_tokens == 0
            requests = [
                generation_request(
                    context,
                    tenant,
                    request,
                    prompt,
                    sampling if index == 0 else with_own_seed(sampling, request),
                    1 if is_echo_only else request.max_tokens,
                    DEFAULT_MAX_TOKENS,
                    has_offsets=details.num_logprobs is not None,
                )
                for index, prompt in enumerate(ids)
            ]
            job = Job(
                requests=requests,
                shape=CompletionShape(
                    model,
                    context.fingerprint,
                    details,
                    LogprobWriter(context.tokenizer.texts, details.as_ids),
                ),
                is_stream=bool(request.stream),
                has_usage_chunk=request.has_usage_chunk,
                has_usage_everywhere=request.has_usage_everywhere,
                echoes=_echoes(context, prompts, ids, details) if request.echo else (),
                is_echo_only=is_echo_only,
                trace=trace,
                idempotency=idempotency,
            )
            await answer(context, job, scope, receive, send)


def _echoes(
    context: GatewayContext,
    prompts: Sequence[str | list[int]],
    ids: Sequence[list[int]],
    details: TokenDetails,
) -> list[Echo]:
    """The prompts' texts, as they were sent or decoded. Raises `ApiError`."""
    echoes: list[Echo] = []
    for prompt, prompt_ids in zip(prompts, ids, strict=True):
        check_prompt(prompt_ids, context.tokenizer.vocab_size)
        text = prompt if isinstance(prompt, str) else context.tokenizer.decode(prompt_ids)
        offsets: Sequence[int] = ()
        if details.has_echoed_logprobs:
            offsets = context.tokenizer.stream(has_offsets=True).push(prompt_ids).offsets
        echoes.append(Echo(text, [min(offset, len(text)) for offset in offsets]))
    return echoes


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
