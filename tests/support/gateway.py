"""A gateway for tests: a tokenizer of bytes, a requester that plays a script, real HTTP on loopback."""

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from pagebus.bus.messages import Heartbeat
from pagebus.gateway.app import build_app
from pagebus.gateway.context import GatewayContext
from pagebus.gateway.server import listen, make_context, serve
from pagebus.gateway.tokenizer import Tokenizer as GatewayTokenizer
from pagebus.gateway.tracing import Telemetry
from pagebus.requester.events import Event, NewTokens, PromptLogprobs, RequestFailed, RequestSpec
from pagebus.settings.structs import GatewaySettings
from tests.support.logprobs import made_up_all

MODEL = "org/tiny"
EOS = 256
VOCAB_SIZE = 260
MAX_MODEL_LEN = 512
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def _byte_symbols() -> dict[int, str]:
    """GPT-2's printable stand-ins: byte -> character."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in kept}
    table.update({byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in table)})
    return table


def byte_model(folder: Path) -> Path:
    """A model directory whose token ids are the text's UTF-8 bytes; id 256 ends a turn."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {symbol: byte for byte, symbol in _byte_symbols().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<eos>",
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": VOCAB_SIZE}))
    return folder


def ids(text: str) -> list[int]:
    """The token ids of a text for `byte_model`."""
    return list(text.encode())


@dataclass
class Submitted:
    """One request as the gateway submitted it; it is the ticket too."""

    spec: RequestSpec
    on_event: Callable[[Event], None]
    is_cancelled: bool = False
    ended_choices: list[int] = field(default_factory=list)
    made: dict[int, int] = field(default_factory=dict)
    num_cached_tokens: int | None = None
    is_prompt_told: bool = False

    def end_choice(self, choice: int) -> None:
        self.ended_choices.append(choice)

    def cancel(self) -> None:
        self.is_cancelled = True

    def tokens(self, new: Sequence[int], *, choice: int = 0, finish: str | None = None) -> None:
        """Deliver ids, as the requester would, with log-probabilities (`made_up`) where these are asked
        for."""
        if self.is_cancelled or choice in self.ended_choices:
            return
        index = self.made.get(choice, 0)
        self.made[choice] = index + len(new)
        self.tell_prompt()
        num_top = self.spec.sampling.num_logprobs
        told = None if num_top is None else made_up_all(new, index, num_top, VOCAB_SIZE)
        self.on_event(NewTokens(choice, index, list(new), finish, told))

    def tell_prompt(self, size: int = 3) -> None:
        """Deliver the prompt's log-probabilities, `size` positions at a time, if they are asked for."""
        num_top, prompt = self.spec.sampling.num_prompt_logprobs, list(self.spec.prompt)
        if self.is_prompt_told or num_top is None:
            return
        self.is_prompt_told = True
        for start in range(1, len(prompt), size):
            told = made_up_all(prompt[start : start + size], start, num_top, VOCAB_SIZE)
            self.on_event(PromptLogprobs(start, told))

    def fail(self, code: str, message: str, **fields) -> None:
        self.on_event(RequestFailed(code, message, **fields))


Script = Callable[[Submitted], None]


def say(text: str, *, finish: str = "stop", size: int = 1) -> Script:
    """A script: every choice says the text, `size` ids at a time, and ends."""

    def play(request: Submitted) -> None:
        for choice in range(request.spec.num_choices):
            made = ids(text)[: request.spec.max_tokens]
            for start in range(0, len(made), size):
                request.tokens(made[start : start + size], choice=choice)
            ends = [EOS] if finish == "stop" and len(made) < request.spec.max_tokens else []
            request.tokens(ends, choice=choice, finish="stop" if ends else "length")

    return play


def fail(code: str, message: str = "no", **fields) -> Script:
    """A script: the request is refused at once."""
    return lambda request: request.fail(code, message, **fields)


def silence(request: Submitted) -> None:
    """A script: nothing ever comes; the test itself plays on."""


class ScriptedRequester:
    """Plays `script` for every request on the next turn of the loop."""

    def __init__(self, script: Script = silence) -> None:
        self.script = script
        self.submitted: list[Submitted] = []
        self.heartbeat: Heartbeat | None = Heartbeat(
            scheduler="s", model=MODEL, epoch=1, num_executors=1, num_blocks=100, num_free_blocks=75,
            num_running=3, num_waiting=2, max_model_len=MAX_MODEL_LEN,
        )  # fmt: skip
        self.age_s = 0.1

    @property
    def heartbeat_age_s(self) -> float:
        return self.age_s if self.heartbeat is not None else math.inf

    def submit(self, spec: RequestSpec, on_event: Callable[[Event], None]) -> Submitted:
        request = Submitted(spec, on_event)
        self.submitted.append(request)
        asyncio.get_running_loop().call_soon(self.script, request)
        return request

    async def next(self, number: int = 0) -> Submitted:
        """The request of this number, as soon as it was submitted."""
        async with asyncio.timeout(5):
            while len(self.submitted) <= number:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
        return self.submitted[number]


class FakeBus:
    """The only thing that `/ready` asks of a bus."""

    is_connected = True


@dataclass
class RunningGateway:
    """A gateway that serves on loopback."""

    url: str
    port: int
    context: GatewayContext
    requester: ScriptedRequester
    bus: FakeBus
    stop: asyncio.Event
    task: asyncio.Task[None]


@contextlib.asynccontextmanager
async def gateway(
    path: Path,
    script: Script = silence,
    *,
    telemetry: Telemetry | None = None,
    drain_grace_s: float = 5.0,
    **fields,
) -> AsyncIterator[RunningGateway]:
    """Serve `byte_model(path)` on a free port with a scripted requester; `fields` are settings."""
    settings = GatewaySettings(model=MODEL, **fields)
    requester, bus = ScriptedRequester(script), FakeBus()
    tokenizer = GatewayTokenizer.load(byte_model(path))
    context = make_context(settings, bus, requester, tokenizer, telemetry)
    sock = listen("127.0.0.1", 0)
    port = sock.getsockname()[1]
    stop = asyncio.Event()
    task = asyncio.create_task(serve(context, sock, stop, drain_grace_s))
    try:
        yield RunningGateway(f"http://127.0.0.1:{port}", port, context, requester, bus, stop, task)
    finally:
        stop.set()
        context.generations.fail_all("test_over", "the test is over")
        await task
        tokenizer.close()


@contextlib.asynccontextmanager
async def app_client(
    path: Path, script: Script = silence, **fields
) -> AsyncIterator[tuple[httpx.AsyncClient, ScriptedRequester]]:
    """The application without a socket, for what needs no real connection."""
    requester = ScriptedRequester(script)
    tokenizer = GatewayTokenizer.load(byte_model(path))
    context = make_context(GatewaySettings(model=MODEL, **fields), FakeBus(), requester, tokenizer)
    transport = httpx.ASGITransport(build_app(context))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        yield client, requester
    tokenizer.close()
