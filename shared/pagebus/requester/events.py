"""What goes into a requester (`RequestSpec`) and what comes out (`NewTokens`, `PromptLogprobs`,
`RequestFailed`)."""

from collections.abc import Mapping, Sequence

import msgspec

from pagebus.bus import subjects
from pagebus.bus.messages import FinishReason, Logprobs, Sampling


class ReceivedChoice(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is here of a choice already. One with a finish reason is not asked for."""

    ids: Sequence[int] = ()
    finish_reason: FinishReason | None = None


class RequestSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One request. `sampling.seed` must be fixed by the caller (a random one if the client gave none).

    A request that somebody else owned before brings what was received of it; events then begin after that.
    """

    request_id: str  # unique; [A-Za-z0-9_-]{1,64}
    prompt: Sequence[int]  # token ids
    num_choices: int = 1
    sampling: Sampling = Sampling()
    stop_token_ids: Sequence[int] = ()  # end-of-sequence ids among them, unless ignored
    max_tokens: int
    min_tokens: int = 0
    priority: int = 0
    tenant: str = ""
    cache_salt: str = ""
    timeout_s: float = 600.0  # the request's deadline
    headers: Mapping[str, str] = {}  # W3C trace context, sent with every Generate
    received: Sequence[ReceivedChoice] = ()  # one a choice, or none at all
    num_prompt_told: int = 1  # positions of the prompt whose log-probabilities are here; the first has none
    first_attempt: int = 1


def check(spec: RequestSpec) -> None:
    """Raises `ValueError` for an id that is malformed, or a count that makes no sense."""
    if not subjects.is_part(spec.request_id):
        raise ValueError(f"{spec.request_id[:80]!r} is no request id: [A-Za-z0-9_-]{{1,64}}")
    if spec.num_choices < 1 or spec.max_tokens < 1:
        raise ValueError("a request has at least one choice and one token")


class NewTokens(msgspec.Struct, frozen=True, gc=False):
    """New ids of a choice: each id exactly once and in order; `index` is the first one's.

    A finish reason ends the choice (`ids` may then be empty)."""

    choice: int
    index: int
    ids: Sequence[int]
    finish_reason: FinishReason | None = None
    logprobs: Logprobs | None = None  # of `ids`, where `sampling.num_logprobs` asks for them


class PromptLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities of the prompt's ids from position `start` (1 at first) on, each once and in order.

    All of them come before the first choice's first id."""

    start: int
    logprobs: Logprobs


class RequestFailed(msgspec.Struct, frozen=True):
    """The request ended without all its choices: no further event follows."""

    code: str
    message: str
    is_client_fault: bool = False
    retry_after_s: float | None = None


Event = NewTokens | PromptLogprobs | RequestFailed
