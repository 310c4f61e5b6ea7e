"""Whole gateways on one memory bus, with a fake scheduler and executor behind them."""

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from pagebus.bus.memory import MemoryBroker, MemoryBus
from pagebus.bus.memory_store import MemoryStore
from pagebus.gateway import service
from pagebus.settings.structs import GatewaySettings
from tests.support.fake_server import FakeServer, token
from tests.support.gateway import MODEL, byte_model

VOCAB_SIZE = 100  # printable text mostly


@dataclass
class LossyStore(MemoryStore):
    """A store whose logs miss some messages."""

    rng: random.Random = field(default_factory=lambda: random.Random(0))
    share_lost: float = 0.0
    num_lost: int = 0

    def keep(self, subject: str, data: bytes) -> None:
        if self.rng.random() < self.share_lost:
            self.num_lost += 1
            return
        super().keep(subject, data)


@dataclass
class Gateway:
    """One gateway process, as far as the bus and HTTP can tell."""

    name: str
    bus: MemoryBus
    url: str
    stop: asyncio.Event
    task: asyncio.Task[None]

    async def kill(self) -> None:
        """Without a word, as SIGKILL does it."""
        self.bus.disconnect()
        self.task.cancel()
        await asyncio.wait({self.task})  # passes a cancellation of its own caller on
        await self.bus.close()


@dataclass
class House:
    """Gateways, and one server behind them."""

    broker: MemoryBroker
    server: FakeServer
    path: Path
    gateways: dict[str, Gateway] = field(default_factory=dict)

    @property
    def store(self) -> LossyStore:
        assert isinstance(self.broker.store, LossyStore)
        return self.broker.store

    async def add(self, name: str, **fields: object) -> Gateway:
        bus = self.broker.connect(name)
        stop = asyncio.Event()
        listening: asyncio.Future[tuple[str, int]] = asyncio.get_running_loop().create_future()
        settings = GatewaySettings(model=MODEL, **fields)
        task = asyncio.create_task(
            service.run(
                settings,
                bus,
                self.path,
                name,
                stop,
                listener=service.listen("127.0.0.1", 0),
                on_listening=lambda host, port: listening.set_result((host, port)),
                drain_grace_s=0,
            )
        )
        await asyncio.wait({task, listening}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task
        host, port = await listening
        gateway = self.gateways[name] = Gateway(name, bus, f"http://{host}:{port}", stop, task)
        while not any(one.bus is bus and one.queue for one in self.broker.subscriptions):  # noqa: ASYNC110
            await asyncio.sleep(0.002)
        await self.server.beat()
        await asyncio.sleep(0.01)
        return gateway

    def text_of(self, request_id: str, choice: int, num_ids: int) -> str:
        """What the server makes."""
        made = bytes(token(request_id, choice, index, VOCAB_SIZE) for index in range(num_ids))
        return made.decode(errors="replace")


@contextlib.asynccontextmanager
async def house(path: Path, *names: str, **fields: object) -> AsyncIterator[House]:
    """Gateways of these names on a bus of their own."""
    broker = MemoryBroker()
    broker.store = LossyStore()
    bus = broker.connect("server")
    server = FakeServer(bus, model=MODEL, vocab_size=VOCAB_SIZE, max_model_len=4096)
    await server.start()
    built = House(broker, server, byte_model(path))

    async def beat() -> None:
        while True:
            await server.beat()
            await asyncio.sleep(0.2)

    beating = asyncio.create_task(beat())
    try:
        for name in names:
            await built.add(name, **fields)
        yield built
    finally:
        beating.cancel()
        for gateway in built.gateways.values():
            await gateway.kill()
        await bus.close()


@dataclass
class Read:
    """Events of a stream as they were read: (id, data)."""

    events: list[tuple[str | None, str]] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    answer: httpx.Response | None = None
    lines: AsyncIterator[str] | None = None

    @property
    def is_done(self) -> bool:
        return bool(self.events) and self.events[-1][1] == "[DONE]"

    @property
    def last_id(self) -> str:
        return [event_id for event_id, _ in self.events if event_id is not None][-1]

    @property
    def chunks(self) -> list[dict]:
        return [json.loads(data) for _, data in self.events if data != "[DONE]"]

    @property
    def answer_id(self) -> str:
        return str(self.chunks[0]["id"])

    def cut(self) -> "Read":
        """Without the error that a gateway ends its streams with when it stops."""
        self.events = [event for event in self.events if '"error"' not in event[1] and event[1] != "[DONE]"]
        return self

    def text(self, choice: int = 0) -> str:
        told = [one for chunk in self.chunks for one in chunk["choices"] if one["index"] == choice]
        return "".join(one.get("delta", {}).get("content") or one.get("text") or "" for one in told)

    def reasons(self) -> list[str]:
        told = [one["finish_reason"] for chunk in self.chunks for one in chunk["choices"]]
        return [reason for reason in told if reason]


async def read_events(answer: httpx.Response, read: Read, num_events: int | None = None) -> Read:
    """Read on, up to so many events in all (None: until the connection ends)."""
    event_id: str | None = None
    if read.answer is not answer:
        read.answer, read.lines, read.headers = answer, answer.aiter_lines(), dict(answer.headers)
    assert read.lines is not None
    with contextlib.suppress(httpx.TransportError):
        async for line in read.lines:
            if line.startswith("id: "):
                event_id = line[4:]
            elif line.startswith("data: "):
                read.events.append((event_id, line[6:]))
                event_id = None
                if num_events is not None and len(read.events) >= num_events:
                    break
    return read


@contextlib.asynccontextmanager
async def posted(
    url: str, body: dict[str, object], headers: dict[str, str] | None = None
) -> AsyncIterator[httpx.Response]:
    """A streamed answer, closed at the end."""
    route = "chat/completions" if "messages" in body else "completions"
    async with (
        httpx.AsyncClient(timeout=30) as client,
        client.stream("POST", f"{url}/v1/{route}", json={"stream": True, **body}, headers=headers) as answer,
    ):
        yield answer


async def resumed(url: str, read: Read, *, after: str | None = None) -> Read:
    """Everything after the last event of `read`, added to it."""
    name = read.last_id if after is None else after
    async with httpx.AsyncClient(timeout=30) as client:
        headers = {"last-event-id": name} if name else {}
        async with client.stream("GET", f"{url}/v1/streams/{read.answer_id}", headers=headers) as answer:
            if answer.status_code != 200:
                raise AssertionError(f"{answer.status_code}: {(await answer.aread()).decode()}")
            return await read_events(answer, read)
