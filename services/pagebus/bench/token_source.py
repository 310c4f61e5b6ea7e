"""A scheduler and many executors in one process, without any of their work: only what they send to gateways.

It stands in for them in `pagebus bench gateway`, where sixteen real processes beside the gateway would leave
it too little of a small machine. Commands come as JSON lines on stdin, answers go to stdout.
"""

import asyncio
import os
import sys
import time
from array import array
from collections.abc import Coroutine
from pathlib import Path

import msgspec
import uvloop

from pagebus.bus import subjects
from pagebus.bus.messages import (
    Accepted,
    FinishReason,
    Generate,
    Heartbeat,
    Message,
    TokenRow,
    Tokens,
    decode,
    encode,
    pack_ids,
    unpack_ids,
)
from pagebus.bus.nats_bus import NatsBus
from pagebus.bus.protocol import Msg

CONTEXT = 1 << 20
_EPOCH = 1
_BEAT_S = 0.5
_CREDIT_EVERY = 8  # messages between two questions whether the gateway has taken what was sent
_CREDIT_TIMEOUT_S = 30.0


class SourceConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What to play. `scheduler_url`, `executor_url`: of the bus, for the two roles."""

    model: str
    scheduler_url: str
    executor_url: str
    tokenizer: str  # a tokenizer.json whose words that begin with a space are made
    num_executors: int
    num_streams: int


class Run(msgspec.Struct, frozen=True, tag="run"):
    """Make tokens for some seconds: `rate` a second over all streams, executors staggered; 0: as fast as the
    gateway takes them, with at most `window` messages that it has not taken yet."""

    seconds: float
    rate: float = 0.0
    window: int = 128


class Finish(msgspec.Struct, frozen=True, tag="finish"):
    """Make every stream's last token."""


class Made(msgspec.Struct, frozen=True):
    """What a command made. `first_step`: the steps before it; `times_s`: by executor, of each of its steps
    (`time.monotonic`)."""

    num_tokens: int
    num_messages: int
    seconds: float
    cpu_s: float
    first_step: int
    times_s: list[list[float]]


Command = Run | Finish


class _Stream:
    """A request that was taken."""

    __slots__ = ("attempt", "reply", "request_id")

    def __init__(self, request: Generate) -> None:
        self.request_id, self.attempt, self.reply = request.request_id, request.attempt, request.reply


class TokenSource:
    """All of it. Stream number k, which its prompt says, is a row of executor k modulo their number."""

    def __init__(self, config: SourceConfig, scheduler: NatsBus, executor: NatsBus) -> None:
        self._config = config
        self._scheduler, self._executor = scheduler, executor
        self._words = _words(Path(config.tokenizer))
        self._streams: dict[int, _Stream] = {}
        self._steps = [0] * config.num_executors
        self._times_s: list[list[float]] = [[] for _ in range(config.num_executors)]
        self._lives: dict[str, str] = {}  # by reply subject
        self._sending: set[asyncio.Task[None]] = set()
        self.is_full = asyncio.Event()

    async def start(self) -> None:
        """Take requests, and say who leads."""
        subject = subjects.generate(self._config.model)
        await self._scheduler.subscribe(subject, self._on_generate)
        self._keep(self._beat())

    async def run(self, command: Run) -> Made:
        """Make tokens as told."""
        num_executors = self._config.num_executors
        before, cpu_s, began_s = sum(self._steps), time.process_time(), time.monotonic()
        first_step = self._steps[0]
        end_s = began_s + command.seconds
        if command.rate:
            interval_s = len(self._streams) / num_executors / command.rate
            number = 0
            while (at_s := began_s + number * interval_s) < end_s:
                if (wait_s := at_s - time.monotonic()) > 0:
                    await asyncio.sleep(wait_s)
                await self._step(number % num_executors)
                number += 1
            for executor in range(number % num_executors or num_executors, num_executors):
                await self._step(executor)
        else:
            await self._saturate(end_s, command.window)
        await self._taken()
        return self._made(before, cpu_s, began_s, first_step)

    async def _saturate(self, end_s: float, window: int) -> None:
        waiting: list[asyncio.Task[None]] = []
        number = 0
        while time.monotonic() < end_s or number % self._config.num_executors:
            await self._step(number % self._config.num_executors)
            number += 1
            if number % _CREDIT_EVERY == 0:
                waiting.append(asyncio.create_task(self._taken()))
                await asyncio.sleep(0)
                if len(waiting) > max(1, window // _CREDIT_EVERY):
                    await waiting.pop(0)
        await asyncio.gather(*waiting)

    async def finish(self) -> Made:
        """Every stream's last token."""
        before, cpu_s, began_s = sum(self._steps), time.process_time(), time.monotonic()
        first_step = self._steps[0]
        for executor in range(self._config.num_executors):
            await self._step(executor, "length")
        self._streams.clear()
        return self._made(before, cpu_s, began_s, first_step)

    def _made(self, before: int, cpu_s: float, began_s: float, first_step: int) -> Made:
        times_s, self._times_s = self._times_s, [[] for _ in self._times_s]
        num_messages = sum(self._steps) - before
        return Made(
            num_tokens=num_messages * self._config.num_streams // self._config.num_executors,
            num_messages=num_messages,
            seconds=time.monotonic() - began_s,
            cpu_s=time.process_time() - cpu_s,
            first_step=first_step,
            times_s=times_s,
        )

    async def _step(self, executor: int, reason: FinishReason | None = None) -> None:
        """One step of one executor: one message to each gateway."""
        index, words = self._steps[executor], self._words
        rows: dict[str, list[TokenRow]] = {}
        for number in range(executor, self._config.num_streams, self._config.num_executors):
            stream = self._streams.get(number)
            if stream is None:  # its client is gone
                continue
            row = TokenRow(
                request_id=stream.request_id,
                attempt=stream.attempt,
                index=index,
                ids=words[(number * 7 + index) % len(words)],
                finish_reason=reason,
            )
            rows.setdefault(stream.reply, []).append(row)
        self._steps[executor] = index + 1
        self._times_s[executor].append(time.monotonic())
        for reply, made in rows.items():
            await self._executor.publish(reply, encode(Tokens(epoch=_EPOCH, rows=tuple(made))))

    async def _taken(self) -> None:
        """Until the gateways have taken all that was sent: they answer probes in order."""
        for life in self._lives.values():
            await self._executor.request(life, b"", timeout_s=_CREDIT_TIMEOUT_S)

    def _on_generate(self, msg: Msg) -> None:
        request = decode(msg.data)
        if not isinstance(request, Generate):
            return
        high, low = unpack_ids(request.prompt)[:2]
        self._streams[number_of(high, low)] = _Stream(request)
        self._lives[request.reply] = request.life
        accepted = Accepted(
            request_id=request.request_id, attempt=request.attempt, epoch=_EPOCH, state="running"
        )
        self._keep(self._send(request.reply, accepted))
        if len(self._streams) == self._config.num_streams:
            self.is_full.set()

    async def _send(self, subject: str, message: Message) -> None:
        await self._scheduler.publish(subject, encode(message))

    async def _beat(self) -> None:
        beat = Heartbeat(
            scheduler="source",
            model=self._config.model,
            epoch=_EPOCH,
            num_executors=self._config.num_executors,
            num_blocks=1 << 20,
            num_free_blocks=1 << 20,
            max_model_len=CONTEXT,
            full_model_len=CONTEXT,
        )
        while True:
            await self._send(subjects.heartbeat(self._config.model), beat)
            await asyncio.sleep(_BEAT_S)

    def _keep(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)


_LOWEST, _WIDTH = 32, 100


def prompt_of(number: int) -> tuple[int, int]:
    """The prompt of a stream: ids that every vocabulary has."""
    high, low = divmod(number, _WIDTH)
    return _LOWEST + high, _LOWEST + low


def number_of(high: int, low: int) -> int:
    """The inverse of `prompt_of`."""
    return (high - _LOWEST) * _WIDTH + low - _LOWEST


def _words(path: Path) -> list[bytes]:
    """Packed ids of tokens that are a space and letters."""
    vocabulary = msgspec.json.decode(path.read_bytes())["model"]["vocab"]
    space = "\u0120"  # byte-level vocabularies write a space so
    return [
        pack_ids(array("i", (token_id,)))
        for token, token_id in vocabulary.items()
        if len(token) > 2 and token[0] == space and token[1:].isascii() and token[1:].isalpha()
    ]


async def _main(config: SourceConfig) -> None:
    scheduler = await NatsBus.connect(config.scheduler_url, name="source-scheduler")
    executor = await NatsBus.connect(config.executor_url, name="source-executors")
    source = TokenSource(config, scheduler, executor)
    await source.start()
    print("{}", flush=True)
    decoder: msgspec.json.Decoder[Command] = msgspec.json.Decoder(Command)
    while line := await asyncio.to_thread(sys.stdin.readline):
        command = decoder.decode(line)
        await source.is_full.wait()
        match command:
            case Run():
                made = await source.run(command)
            case Finish():
                made = await source.finish()
        print(msgspec.json.encode(made).decode(), flush=True)
    os._exit(0)


if __name__ == "__main__":
    uvloop.run(_main(msgspec.json.decode(sys.argv[1], type=SourceConfig)))
