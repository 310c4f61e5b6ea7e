"""How long each hop of a request's way takes, one stream at a time, with real processes and a fake model;
and what the bus adds to the first token: the same services in one process are asked in turn with them.

Each hop is seen by a connection of its own, which gets every message about when its receiver does, in
requests of their own: it takes its share of the processors. Nothing in the services measures.
"""

import asyncio
import socket
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from pagebus.bench.fake_process import fake_process
from pagebus.bench.fake_stack import NAME, FakeStack, fake_stack
from pagebus.bench.processes import Machine, machine, percentile
from pagebus.bus import subjects
from pagebus.bus.nats_bus import NatsBus
from pagebus.bus.protocol import Msg

_PAUSE_S = 0.005
_WARM_UP = 20


class HopsError(Exception):
    """An answer was not whole."""


class Spread(msgspec.Struct, frozen=True):
    """Milliseconds."""

    p50: float
    p99: float


class Hops(msgspec.Struct, frozen=True, kw_only=True):
    """Of the first token: from the client's request to its first event, over the bus and in one process, and
    what the former takes longer than the latter's median; then, with somebody who looks on, from the request
    to each message. Of every further token: from its message to its event."""

    machine: Machine
    num_requests: int
    first_token_over_bus: Spread
    first_token_in_one_process: Spread
    added: Spread
    request_to_generate: Spread
    generate_to_plan: Spread
    plan_to_tokens: Spread
    tokens_to_event: Spread
    first_token: Spread
    bus_part_of_first_token: Spread
    later_token_to_event: Spread
    one_way: Spread


class _Seen:
    """When the first message of each kind came, since `clear`; of tokens each."""

    def __init__(self, model: str) -> None:
        self._generate = subjects.generate(model)
        self._plan = subjects.plan(f"{NAME}-executor-1")
        self._out = subjects.out(f"{NAME}-gateway-1")
        self.subjects = (self._generate, self._plan, self._out)
        self.clear()

    def clear(self) -> None:
        """Before a request."""
        self.generate_s = self.plan_s = 0.0
        self.tokens_s: list[float] = []

    def take(self, msg: Msg) -> None:
        """A message, whatever it is."""
        now_s = time.perf_counter()
        if msg.subject == self._generate:
            self.generate_s = self.generate_s or now_s
        elif msg.subject == self._plan and self.generate_s:
            self.plan_s = self.plan_s or now_s
        elif msg.subject == self._out and b"Tokens" in msg.data:
            self.tokens_s.append(now_s)


class _Client:
    """One connection, one stream at a time; blocking."""

    def __init__(self, port: int, model: str, num_tokens: int) -> None:
        self._sock = socket.create_connection(("127.0.0.1", port))
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._model, self._num_tokens = model, num_tokens

    def ask(self, number: int) -> tuple[float, list[float]]:
        """When a request was sent, and when each of its events came."""
        body = msgspec.json.encode(
            {
                "model": self._model,
                "prompt": [40 + number % 100, 40 + number // 100 % 100],
                "max_tokens": self._num_tokens,
                "ignore_eos": True,
                "stream": True,
            }
        )
        head = f"POST /v1/completions HTTP/1.1\r\nhost: bench\r\ncontent-length: {len(body)}\r\n\r\n"
        sent_s = time.perf_counter()
        self._sock.sendall(head.encode() + body)
        times_s: list[float] = []
        data = b""
        while not data.endswith(b"0\r\n\r\n"):
            part = self._sock.recv(1 << 16)
            now_s = time.perf_counter()
            if not part:
                raise HopsError(f"the gateway closed the connection after {data[-300:]!r}")
            data += part
            times_s += [now_s] * (data.count(b"data: {") - len(times_s))
        if not data.startswith(b"HTTP/1.1 200"):
            raise HopsError(data[:300].decode(errors="replace"))
        return sent_s, times_s


async def measure_hops(num_requests: int = 300, num_tokens: int = 8, *, resume: bool = True) -> Hops:
    """All of it, in some seconds. Raises `HopsError`."""
    async with fake_stack(resume=resume, stream_interval=1) as stack:
        async with fake_process(stack.settings) as port:
            over_bus_s, in_one_s = await asyncio.to_thread(_in_turn, stack, port, num_requests)
        bus = await NatsBus.connect(stack.nats_url, name="looks-on")
        seen = _Seen(stack.model)
        for subject in seen.subjects:
            await bus.subscribe(subject, seen.take)
        client = await asyncio.to_thread(_Client, stack.port, stack.model, num_tokens)
        found: list[tuple[float, list[float], float, float, list[float]]] = []
        for number in range(num_requests + _WARM_UP):
            await asyncio.sleep(_PAUSE_S)
            seen.clear()
            sent_s, times_s = await asyncio.to_thread(client.ask, number)
            await asyncio.sleep(_PAUSE_S)
            if number >= _WARM_UP and seen.plan_s and seen.tokens_s:
                found.append((sent_s, times_s, seen.generate_s, seen.plan_s, list(seen.tokens_s)))
        one_way = await _one_way(bus, num_requests)
        await bus.close()
    in_one_p50_s = percentile(in_one_s, 0.5)
    return Hops(
        machine=machine(),
        num_requests=len(found),
        first_token_over_bus=_spread(over_bus_s),
        first_token_in_one_process=_spread(in_one_s),
        added=_spread([value - in_one_p50_s for value in over_bus_s]),
        request_to_generate=_spread([generate - sent for sent, _, generate, _, _ in found]),
        generate_to_plan=_spread([plan - generate for _, _, generate, plan, _ in found]),
        plan_to_tokens=_spread([tokens[0] - plan for _, _, _, plan, tokens in found]),
        tokens_to_event=_spread([times[0] - tokens[0] for _, times, _, _, tokens in found]),
        first_token=_spread([times[0] - sent for sent, times, _, _, _ in found]),
        bus_part_of_first_token=_spread([tokens[0] - generate for _, _, generate, _, tokens in found]),
        later_token_to_event=_spread(
            [
                event - message
                for _, times, _, _, tokens in found
                for event, message in zip(times[1:], tokens[1:], strict=False)
            ]
        ),
        one_way=one_way,
    )


def _in_turn(stack: FakeStack, port: int, num_requests: int) -> tuple[list[float], list[float]]:
    """Seconds to the first token, over the bus and in one process: A B A B ...

    Of one token only: steps of no length at all, one after the other, would take the interpreter from the
    gateway in one process, and make the bus look better than it is.
    """
    clients = [_Client(each, stack.model, 1) for each in (stack.port, port)]
    found: tuple[list[float], list[float]] = ([], [])
    for number in range(num_requests + _WARM_UP):
        for client, times_s in zip(clients, found, strict=True):
            time.sleep(_PAUSE_S)
            sent_s, events_s = client.ask(number)
            if number >= _WARM_UP:
                times_s.append(events_s[0] - sent_s)
    return found


async def _one_way(bus: NatsBus, count: int) -> Spread:
    """Half of a message's way to this process's own subscription and back: publish to handler, idle gaps."""
    arrived: asyncio.Queue[float] = asyncio.Queue()
    subject = subjects.out(NAME)
    await bus.subscribe(subject, lambda msg: arrived.put_nowait(time.perf_counter()))
    found = []
    for _ in range(count):
        await asyncio.sleep(_PAUSE_S)
        began_s = time.perf_counter()
        await bus.publish(subject, bytes(512))
        found.append(await arrived.get() - began_s)
    return _spread(found)


def _spread(values: Sequence[float]) -> Spread:
    milliseconds = [value * 1000 for value in values]
    return Spread(round(percentile(milliseconds, 0.5), 3), round(percentile(milliseconds, 0.99), 3))


def table(found: Hops) -> str:
    """For people."""
    lines = [
        f"one stream at a time, {found.num_requests} requests, load {found.machine.load_1min}; ms",
        "    p50      p99",
    ]
    for name, words in (
        ("first_token_over_bus", "time to first token over NATS, nobody looking on"),
        ("first_token_in_one_process", "same services in one process, asked in turn with them"),
        ("added", "added by the three hops (less the other one's median)"),
        ("request_to_generate", "client's request to Generate on the bus"),
        ("generate_to_plan", "Generate to Plan (scheduler)"),
        ("plan_to_tokens", "Plan to first Tokens (executor)"),
        ("tokens_to_event", "first Tokens to the client's first event (gateway)"),
        ("first_token", "all of it, with one more connection that looks on"),
        ("bus_part_of_first_token", "Generate to first Tokens: scheduler, executor and two hops"),
        ("later_token_to_event", "each further token: its message to its event"),
        ("one_way", "one hop alone: publish to handler, 512 bytes, idle"),
    ):
        spread: Spread = msgspec.structs.asdict(found)[name]
        lines.append(f"{spread.p50:7.3f} {spread.p99:8.3f}   {words}")
    return "\n".join(lines)


def run_hops(num_requests: int, json_file: Path | None) -> Hops:
    """Measure and print. Raises `HopsError`."""
    try:
        import uvloop
    except ImportError:
        found = asyncio.run(measure_hops(num_requests))
    else:
        found = uvloop.run(measure_hops(num_requests))
    print(table(found))
    if json_file is not None:
        json_file.write_text(msgspec.json.format(msgspec.json.encode(found), indent=2).decode() + "\n")
    return found
