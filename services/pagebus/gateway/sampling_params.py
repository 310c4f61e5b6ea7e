"""From a request's fields to `Sampling`: the model's own defaults, bad words as ids, ids within the
vocabulary.

It knows the tokenizer and generation_config.json, not how an id is chosen.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from pagebus.bus.messages import Sampling, pack_ids
from pagebus.gateway.errors import ApiError, invalid
from pagebus.gateway.generation_events import MAX_TOKEN_COUNT, new_seed
from pagebus.gateway.limits import MAX_ALLOWED_TOKEN_IDS, MAX_BAD_WORD_TOKENS
from pagebus.gateway.openai_types import ChatRequest, CommonRequest, CompletionRequest
from pagebus.gateway.text_errors import TextError
from pagebus.gateway.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}", re.ASCII)
_SEED_MASK = (1 << 63) - 1
_GREEDY_BELOW = 1e-5
"""A temperature below this is taken as 0: dividing by it would overflow, and the best id is chosen anyway."""


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """What counts where a request says nothing. `max_tokens`: of chats; None: what the context leaves."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None


def read_defaults(generation_config: Mapping[str, object]) -> SamplingDefaults:
    """The defaults of a model's generation_config.json, as vLLM takes them (`do_sample` is not looked at).

    A value that no request might send is left out, with a warning.
    """
    bounds = {
        "temperature": (0.0, 1e6), "top_p": (0.0, 1.0), "min_p": (0.0, 1.0),
        "repetition_penalty": (0.001, 1000.0),
    }  # fmt: skip
    floats: dict[str, float] = {}
    for name, (least, most) in bounds.items():
        value = generation_config.get(name)
        if value is None:
            continue
        if isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most:
            floats[name] = float(value)
        else:
            _log.warning("generation_config.json: %s is %.40r and is left out", name, value)
    return SamplingDefaults(
        temperature=floats.get("temperature", 1.0),
        top_p=floats.get("top_p", 1.0),
        top_k=max(_count(generation_config, "top_k", -1) or 0, 0),
        min_p=floats.get("min_p", 0.0),
        repetition_penalty=floats.get("repetition_penalty", 1.0),
        max_tokens=_count(generation_config, "max_new_tokens", 1),
    )


def _count(generation_config: Mapping[str, object], name: str, least: int) -> int | None:
    value = generation_config.get(name)
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool) and least <= value <= MAX_TOKEN_COUNT:
        return value
    _log.warning("generation_config.json: %s is %.40r and is left out", name, value)
    return None


@dataclass(frozen=True, kw_only=True)
class TokenDetails:
    """What an answer tells of tokens besides their text."""

    num_logprobs: int | None = None  # best ones beside each token made; None: nothing
    num_prompt_logprobs: int | None = None  # vLLM's `prompt_logprobs`
    has_echoed_logprobs: bool = False  # those of the prompt stand in the choices' arrays
    as_ids: bool = False
    has_token_ids: bool = False

    @property
    def num_asked_of_prompt(self) -> int | None:
        """What the executor is asked to tell of the prompt."""
        echoed = self.num_logprobs if self.has_echoed_logprobs else None
        asked = [number for number in (echoed, self.num_prompt_logprobs) if number is not None]
        return max(asked, default=None)


def chat_details(request: ChatRequest) -> TokenDetails:
    """A chat's."""
    return TokenDetails(
        num_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        num_prompt_logprobs=request.prompt_logprobs,
        as_ids=bool(request.return_tokens_as_token_ids),
        has_token_ids=bool(request.return_token_ids),
    )


def completion_details(request: CompletionRequest) -> TokenDetails:
    """A text completion's."""
    return TokenDetails(
        num_logprobs=request.logprobs,
        num_prompt_logprobs=request.prompt_logprobs,
        has_echoed_logprobs=bool(request.echo) and request.logprobs is not None,
        as_ids=bool(request.return_tokens_as_token_ids),
        has_token_ids=bool(request.return_token_ids),
    )


def sampling_of(
    request: CommonRequest, details: TokenDetails, defaults: SamplingDefaults, tokenizer: Tokenizer
) -> Sampling:
    """The request's sampling, with a seed fixed now if it has none. Raises a 400 that names the parameter."""

    def given(value: float | None, default: float) -> float:
        return default if value is None else value

    temperature = given(request.temperature, defaults.temperature)
    top_k = max(defaults.top_k if request.top_k is None else request.top_k, 0)
    top_p = given(request.top_p, defaults.top_p)
    if top_p == 0.0:  # a nucleus of nothing: the best id alone
        top_p, top_k = 1.0, 1
    return Sampling(
        temperature=temperature if temperature >= _GREEDY_BELOW else 0.0,
        top_p=top_p,
        top_k=top_k,
        min_p=given(request.min_p, defaults.min_p),
        seed=new_seed() if request.seed is None else request.seed & _SEED_MASK,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=given(request.repetition_penalty, defaults.repetition_penalty),
        logit_bias=_logit_bias(request, tokenizer.vocab_size),
        allowed_token_ids=_allowed_token_ids(request, tokenizer.vocab_size),
        bad_words=bad_word_ids(request.bad_words or (), tokenizer),
        num_logprobs=details.num_logprobs,
        num_prompt_logprobs=details.num_asked_of_prompt,
    )


def with_own_seed(sampling: Sampling, request: CommonRequest) -> Sampling:
    """For a further prompt of the same request: another seed, unless the client fixed one."""
    return sampling if request.seed is not None else msgspec.structs.replace(sampling, seed=new_seed())


def check_ids(ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raises a 400 for ids that the model has no logits for."""
    if ids and max(ids) >= vocab_size:
        raise invalid(
            f"{param}: token id {max(ids)} is outside the vocabulary of {vocab_size}",
            param,
            "invalid_token_id",
        )


def _logit_bias(request: CommonRequest, vocab_size: int) -> dict[int, float]:
    bias: dict[int, float] = {}
    for name, value in (request.logit_bias or {}).items():
        if not _TOKEN_ID.fullmatch(name):
            raise invalid(f"logit_bias: {name[:40]!r} is no token id", "logit_bias", "invalid_token_id")
        bias[int(name)] = value
    check_ids(list(bias), vocab_size, "logit_bias")
    return bias


def _allowed_token_ids(request: CommonRequest, vocab_size: int) -> bytes:
    if request.allowed_token_ids is None:
        return b""
    check_ids(request.allowed_token_ids, vocab_size, "allowed_token_ids")
    allowed = sorted(set(request.allowed_token_ids))
    if len(allowed) * request.num_choices > MAX_ALLOWED_TOKEN_IDS:  # each choice's row is told all of them
        raise invalid(
            f"{len(allowed)} allowed_token_ids for n={request.num_choices} choices exceed "
            f"{MAX_ALLOWED_TOKEN_IDS}; ask for fewer choices",
            "allowed_token_ids",
        )
    return pack_ids(allowed)


def bad_word_ids(words: Sequence[str], tokenizer: Tokenizer) -> tuple[bytes, ...]:
    """Every sequence of ids that spells a bad word: as it is, and after a space. Raises a 400."""
    found: dict[bytes, None] = {}
    num_tokens = 0
    for place, word in enumerate(words):
        plain = word.lstrip() or word
        try:
            ids = tokenizer.encode(plain, add_special_tokens=False)
            spaced = tokenizer.encode(" " + plain, add_special_tokens=False)
        except TextError as error:
            raise invalid(str(error), f"bad_words[{place}]") from None
        if not ids:
            raise invalid(f"bad_words[{place}] has no tokens", f"bad_words[{place}]")
        check_ids(ids + spaced, tokenizer.vocab_size, f"bad_words[{place}]")
        # What ends with the plain ids is found by these alone.
        sequences = [ids] if spaced[-len(ids) :] == ids else [ids, spaced]
        num_tokens += sum(map(len, sequences))
        if num_tokens > MAX_BAD_WORD_TOKENS:
            raise _too_many_bad_words()
        found.update(dict.fromkeys(pack_ids(sequence) for sequence in sequences))
    return tuple(found)


def _too_many_bad_words() -> ApiError:
    return invalid(f"bad_words have more than {MAX_BAD_WORD_TOKENS} tokens together", "bad_words")
