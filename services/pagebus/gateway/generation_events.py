"""What goes into a generation (`GenerationRequest`) and what comes out of it.

It knows no HTTP, no JSON and no chat templates.
"""

import secrets
from collections.abc import Callable, Sequence

import msgspec

from pagebus.bus.messages import FinishReason, Logprobs, Sampling
from pagebus.requester.events import RequestFailed

MAX_TOKEN_COUNT = (1 << 31) - 1


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt and how to go on from it. `sampling.seed` is fixed (`new_seed` where the client gave none).

    `max_tokens` None: `default_max_tokens`, or what the context leaves if that is less or None too.
    """

    request_id: str  # our own, see request_ids.new_request_id
    prompt: Sequence[int]
    num_choices: int = 1
    sampling: Sampling
    max_tokens: int | None = None
    default_max_tokens: int | None = None
    min_tokens: int = 0
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    include_stop: bool = False
    skip_special_tokens: bool = True
    priority: int = 0
    tenant: str = ""
    cache_salt: str = ""
    timeout_s: float = 600.0
    has_offsets: bool = False  # text events tell where in the text each id begins


class Usage(msgspec.Struct, frozen=True):
    """Token counts of a request; ids after a stop string do not count."""

    num_prompt_tokens: int
    num_generated_tokens: int
    num_cached_tokens: int = 0  # of the prompt's: their KV came from the prefix cache


class TextEvent(msgspec.Struct, frozen=True, gc=False):
    """News of a choice. `text` may lag behind `ids`; `index` is the first id's among the generated ones.

    `logprobs` and `offsets` are those of `ids`, where they were asked for; an offset is the number of the
    text's complete characters before an id, stop strings included. A finish reason ends the choice."""

    choice: int
    index: int
    ids: Sequence[int]
    text: str
    finish_reason: FinishReason | None
    logprobs: Logprobs | None = None
    offsets: Sequence[int] = ()


class PromptEvent(msgspec.Struct, frozen=True):
    """Log-probabilities of the prompt's ids from position `start` (1 at first) on, each once and in order.

    All of them come before the first text event."""

    start: int
    logprobs: Logprobs


class Finished(msgspec.Struct, frozen=True):
    """All choices ended; nothing follows."""

    usage: Usage


GenerationEvent = TextEvent | PromptEvent | Finished | RequestFailed
OnEvent = Callable[[GenerationEvent], None]


def new_seed() -> int:
    """A random 63-bit seed for a request that gave none."""
    return secrets.randbits(63)
