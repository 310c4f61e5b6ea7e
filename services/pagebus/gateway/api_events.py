"""The public JSON events of NATS streams, from what a generation tells. Pure."""

from collections.abc import Iterator

from pagebus.bus.messages import ApiDone, ApiError, ApiErrorBody, ApiTokenLogprob, ApiTokens, ApiUsage
from pagebus.gateway import errors
from pagebus.gateway.generation_events import PromptEvent, TextEvent, Usage
from pagebus.gateway.logprob_shapes import LogprobWriter
from pagebus.gateway.sampling_params import TokenDetails
from pagebus.requester.packed_logprobs import cut, num_tokens

PROMPT_TOKENS_AN_EVENT = 256
"""Log-probabilities of longer prompts come in several events, each far below the bus's `max_payload`."""


def tokens_event(identity: str, event: TextEvent, details: TokenDetails, writer: LogprobWriter) -> ApiTokens:
    """News of a choice."""
    num_top, logprobs = details.num_logprobs, event.logprobs
    return ApiTokens(
        id=identity,
        choice=event.choice,
        index=event.index,
        token_ids=list(event.ids),
        text=event.text,
        finish_reason=event.finish_reason,
        logprobs=None if num_top is None or logprobs is None else writer.api(logprobs, num_top),
    )


def only_the_end(event: TextEvent) -> TextEvent:
    """The end of a choice for somebody who has its tokens and text."""
    end = event.index + len(event.ids)
    return TextEvent(event.choice, end, (), "", event.finish_reason)


def prompt_events(
    identity: str, event: PromptEvent, details: TokenDetails, writer: LogprobWriter
) -> Iterator[ApiTokens]:
    """Events without tokens, the first of all with a null for the prompt's first token."""
    num_top = details.num_prompt_logprobs or 0
    for start in range(0, num_tokens(event.logprobs), PROMPT_TOKENS_AN_EVENT):
        some = cut(event.logprobs, start, start + PROMPT_TOKENS_AN_EVENT)
        told: list[ApiTokenLogprob | None] = [None] if event.start + start == 1 else []
        told += writer.api(some, num_top)
        yield ApiTokens(
            id=identity,
            choice=0,
            index=0,
            token_ids=[],
            text="",
            prompt_logprobs=told,
            prompt_start=0 if told[0] is None else event.start + start,
        )


def done_event(identity: str, usage: Usage) -> ApiDone:
    """The end."""
    return ApiDone(
        id=identity,
        usage=ApiUsage(
            prompt_tokens=usage.num_prompt_tokens,
            completion_tokens=usage.num_generated_tokens,
            total_tokens=usage.num_prompt_tokens + usage.num_generated_tokens,
            cached_tokens=usage.num_cached_tokens,
        ),
    )


def error_event(identity: str, error: errors.ApiError) -> ApiError:
    """The end, with an error."""
    body = error.body
    return ApiError(
        id=identity,
        error=ApiErrorBody(message=body.message, type=body.type, param=body.param, code=body.code),
    )
