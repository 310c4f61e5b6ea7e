"""What is compared: OpenAI-compatible servers by URL, and engines without HTTP as commands.

Both take the same prompts as token ids and give one `Outcome` a request; a command's own clock counts.
"""

import json
import random
import shlex
import subprocess
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from pagebus.bench.http_stream import Answer, Usage
from pagebus.bench.load import LoadConfig, LoadError, Outcome, Wanted
from pagebus.bench.serve import measure

_COMMAND_TIMEOUT_S = 900.0
_ASK_TIMEOUT_S = 300.0
_LOWEST_ID, _HIGHEST_ID = 32, 250


class Peer(Protocol):
    """One that is measured."""

    @property
    def name(self) -> str:
        """What the tables call it."""

    def version(self) -> str:
        """As it says itself; empty where it does not."""

    def load(self, wanted: Sequence[Wanted], num_streams: int, seed: int, batch: int = 0) -> list[Outcome]:
        """Put the requests on it, `num_streams` at once or in static batches. Raises `LoadError`."""

    def greedy(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        """So many tokens after each prompt, one prompt at a time. Raises `LoadError`."""


@dataclass(frozen=True)
class HttpPeer:
    """A server that runs already."""

    name: str
    url: str

    def version(self) -> str:
        """What `/version` says."""
        try:
            with urllib.request.urlopen(f"{self.url}/version", timeout=10) as answer:
                return str(json.loads(answer.read()).get("version", ""))
        except (OSError, ValueError, AttributeError):
            return ""

    def load(self, wanted: Sequence[Wanted], num_streams: int, seed: int, batch: int = 0) -> list[Outcome]:
        """Over HTTP with streaming, by the load generator."""
        config = LoadConfig(url=self.url, max_concurrency=num_streams, seed=seed, static_batch=batch)
        return measure(config, wanted)

    def greedy(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        """The server must return token ids, as vLLM does for `return_token_ids`."""
        try:
            with urllib.request.urlopen(f"{self.url}/v1/models", timeout=30) as answer:
                model = json.loads(answer.read())["data"][0]["id"]
            return [self._ask(model, prompt, num_tokens) for prompt in prompts]
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise LoadError(f"{self.name} gives no token ids: {type(error).__name__}: {error}") from error

    def _ask(self, model: str, prompt: Sequence[int], num_tokens: int) -> list[int]:
        body = {
            "model": model, "prompt": list(prompt), "max_tokens": num_tokens, "temperature": 0,
            "ignore_eos": True, "return_token_ids": True,
        }  # fmt: skip
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=_ASK_TIMEOUT_S) as answer:
            return [int(one) for one in json.loads(answer.read())["choices"][0]["token_ids"]]


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """What a command reads on its stdin: keep `num_streams` of these running until all are answered.

    It warms up first, and makes `num_output` tokens for each prompt, whatever they are.
    """

    prompts: list[list[int]]
    num_output: list[int]
    num_streams: int


class CommandAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """One request: when it was handed over, when each token was there (seconds), and the tokens."""

    sent_s: float
    times_s: list[float]
    tokens: list[int]


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """What a command prints as its last line; answers in the order of the prompts."""

    answers: list[CommandAnswer]
    version: str = ""
    ready_after_s: float = 0.0


class CommandPeer:
    """An engine in a process of its own for each run: between its runs it takes nothing of the machine."""

    def __init__(self, name: str, command: str) -> None:
        self.name = name
        self._arguments = shlex.split(command)
        self._version = ""

    def version(self) -> str:
        """What the last run said."""
        return self._version

    def load(self, wanted: Sequence[Wanted], num_streams: int, seed: int, batch: int = 0) -> list[Outcome]:
        """Raises `LoadError`; static batches are nothing that a command is asked for."""
        if batch:
            raise LoadError(f"{self.name}: a command takes no static batches")
        rng = random.Random(seed)
        prompts = [[rng.randint(_LOWEST_ID, _HIGHEST_ID) for _ in range(one.num_prompt)] for one in wanted]
        answers = self._run(prompts, [one.num_output for one in wanted], num_streams)
        return [Outcome(one, _answer(one, its), 0.0) for one, its in zip(wanted, answers, strict=True)]

    def greedy(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        """One stream. Raises `LoadError`."""
        answers = self._run([list(prompt) for prompt in prompts], [num_tokens] * len(prompts), 1)
        return [one.tokens for one in answers]

    def _run(self, prompts: list[list[int]], num_output: list[int], num_streams: int) -> list[CommandAnswer]:
        question = Question(prompts=prompts, num_output=num_output, num_streams=num_streams)
        try:
            done = subprocess.run(
                self._arguments, input=msgspec.json.encode(question), capture_output=True,
                timeout=_COMMAND_TIMEOUT_S, check=True,
            )  # fmt: skip
            reply = msgspec.json.decode(done.stdout.strip().rpartition(b"\n")[2], type=Reply)
        except subprocess.CalledProcessError as error:
            raise LoadError(f"{self.name} failed: {error.stderr.decode(errors='replace')[-500:]}") from error
        except (OSError, subprocess.TimeoutExpired, msgspec.DecodeError) as error:
            raise LoadError(f"{self.name} gives no figures: {error}") from error
        self._version = reply.version
        if len(reply.answers) != len(prompts):
            raise LoadError(f"{self.name} answered {len(reply.answers)} of {len(prompts)} prompts")
        return reply.answers


def _answer(wanted: Wanted, its: CommandAnswer) -> Answer:
    is_whole = len(its.tokens) == len(its.times_s) == wanted.num_output
    return Answer(
        its.sent_s,
        end_s=its.times_s[-1] if its.times_s else its.sent_s,
        status=200,
        error="" if is_whole else f"{len(its.tokens)} of {wanted.num_output} tokens",
        text_times_s=its.times_s,
        usage=Usage(wanted.num_prompt, len(its.tokens)),
    )
