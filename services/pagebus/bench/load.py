"""Puts a load on an OpenAI-compatible server: requests at their times, or as many at once as allowed.

It makes prompts and sends them; what the answers amount to is `load_figures.py`'s.
"""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import msgspec

from pagebus.bench.http_stream import Answer, HttpClient

Endpoint = Literal["completions", "chat"]
_WORDS = ("time", "work", "home", "light", "water", "music", "stone", "river", "green", "paper", "small")
# Ids that are ordinary tokens in about every vocabulary.
_LOWEST_ID, _HIGHEST_ID = 32, 250


class LoadError(Exception):
    """The load cannot be put on; the message is a sentence for a person."""


class Wanted(NamedTuple):
    """One request of a load. `at_s` counts from the beginning."""

    at_s: float
    num_prompt: int
    num_output: int


class Outcome(NamedTuple):
    """One request and its answer."""

    wanted: Wanted
    answer: Answer
    delay_s: float  # sent so much later than wanted; 0 in a closed loop, which sends when it may


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """What to send where. `max_concurrency` 0: no limit.

    `static_batch`: so many requests are sent together, the next so many when all of these have ended: what
    static batching makes of a load.
    """

    url: str
    model: str = ""
    api_key: str = ""
    endpoint: Endpoint = "completions"
    is_text: bool = False  # prompts as words instead of token ids
    max_concurrency: int = 0
    static_batch: int = 0
    prefix_len: int = 0  # tokens that all prompts begin with
    ignore_eos: bool = True
    temperature: float = 0.0
    timeout_s: float = 600.0
    seed: int = 0
    extra: dict[str, object] = field(default_factory=dict)  # further members of each body


def arrivals(num_requests: int, rate: float, seed: int) -> list[float]:
    """Seconds at which requests arrive: a Poisson process of `rate` a second; infinite: all at once."""
    rng = random.Random(seed)  # noqa: S311
    times, now_s = [], 0.0
    for _ in range(num_requests):
        times.append(now_s)
        now_s += 0.0 if rate == float("inf") else rng.expovariate(rate)
    return times


class Load:
    """One run against one server."""

    def __init__(self, config: LoadConfig) -> None:
        """Raises `LoadError` for a URL that is none."""
        self._config = config
        self._rng = random.Random(config.seed)  # noqa: S311
        self._prefix = [self._rng.randint(_LOWEST_ID, _HIGHEST_ID) for _ in range(config.prefix_len)]
        headers = {"authorization": f"Bearer {config.api_key}"} if config.api_key else {}
        try:
            self._client = HttpClient(config.url, headers)
        except ValueError as error:
            raise LoadError(str(error)) from None
        self._path = "/v1/chat/completions" if config.endpoint == "chat" else "/v1/completions"

    async def run(
        self, wanted: Sequence[Wanted], on_outcome: Callable[[Outcome], None] = lambda outcome: None
    ) -> list[Outcome]:
        """Send all of them; outcomes in the order of `wanted`. Raises `LoadError` if a first, short request
        fails."""
        await self._try_out()
        bodies = [self.body(one) for one in wanted]
        limit = asyncio.Semaphore(self._config.max_concurrency or len(bodies) or 1)
        is_closed = bool(self._config.max_concurrency or self._config.static_batch)
        pairs = list(zip(wanted, bodies, strict=True))
        size = self._config.static_batch or len(pairs) or 1
        began_s = time.perf_counter()

        async def send(one: Wanted, body: bytes) -> Outcome:
            await asyncio.sleep(began_s + one.at_s - time.perf_counter())
            async with limit:
                delay_s = 0.0 if is_closed else time.perf_counter() - began_s - one.at_s
                answer = await self._client.post(self._path, body, timeout_s=self._config.timeout_s)
            outcome = Outcome(one, answer, delay_s)
            on_outcome(outcome)
            return outcome

        try:
            outcomes: list[Outcome] = []
            for first in range(0, len(pairs), size):
                outcomes += await asyncio.gather(*(send(*pair) for pair in pairs[first : first + size]))
            return outcomes
        finally:
            self._client.close()

    def body(self, wanted: Wanted) -> bytes:
        """A request's body; every prompt differs from all others behind the common prefix."""
        config = self._config
        num_own = max(1, wanted.num_prompt - len(self._prefix))
        ids = self._prefix + [self._rng.randint(_LOWEST_ID, _HIGHEST_ID) for _ in range(num_own)]
        prompt: object = ids
        if config.is_text or config.endpoint == "chat":
            prompt = " ".join(_WORDS[number % len(_WORDS)] for number in ids)
        body: dict[str, object] = {
            "model": config.model,
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": wanted.num_output,
            "temperature": config.temperature,
        }
        if config.endpoint == "chat":
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        if config.ignore_eos:
            body["ignore_eos"] = True
        return msgspec.json.encode(body | config.extra)

    async def _try_out(self) -> None:
        answer = await self._client.post(
            self._path, self.body(Wanted(0.0, 8, 4)), timeout_s=self._config.timeout_s
        )
        if answer.status != 200 or answer.error:
            what = answer.error or f"status {answer.status}"
            raise LoadError(f"{self._config.url}{self._path} does not answer as it should: {what}")
