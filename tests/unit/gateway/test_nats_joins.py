"""NATS clients on the memory bus: gateways die, connections break, events get lost; tokens come once."""

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from pagebus.bus import subjects
from pagebus.bus.memory import MemoryBroker
from pagebus.bus.messages import (
    AnyApiEvent,
    ApiAlive,
    ApiDone,
    ApiError,
    ApiErrorBody,
    ApiTokens,
    ApiUsage,
)
from pagebus.bus.protocol import Msg
from pagebus.client import Client, GenerationError
from tests.support.fake_server import token
from tests.support.gateway import MODEL
from tests.support.stored import VOCAB_SIZE, House, house


class Losing:
    """Loses some deliveries of events to clients."""

    def __init__(self, rng: random.Random, share: float) -> None:
        self.rng = rng
        self.share = share

    def delays_s(self, subject: str, sender: str, receiver: str) -> tuple[float, ...]:
        is_lost = subject.startswith("pagebus.stream.") and self.rng.random() < self.share
        return () if is_lost else (0.0,)


class Reader:
    """Collects what a client tells, and checks that each token comes once."""

    def __init__(self, built: House, num_choices: int = 1, silence_s: float = 0.5) -> None:
        self.built = built
        self.bus = built.broker.connect(f"client-{id(self)}")
        self.client = Client(self.bus, MODEL, silence_s=silence_s)
        self.ids: list[list[int]] = [[] for _ in range(num_choices)]
        self.texts = [""] * num_choices
        self.ends = [0] * num_choices

    def take(self, event: ApiTokens) -> None:
        assert self.ends[event.choice] == 0
        assert event.index == len(self.ids[event.choice])
        self.ids[event.choice] += event.token_ids
        self.texts[event.choice] += event.text
        self.ends[event.choice] += event.finish_reason is not None

    async def run(self, **parameters: object) -> None:
        async for event in self.client.generate([65, 66], n=len(self.ids), temperature=0, **parameters):
            self.take(event)

    async def follow(self, request_id: str) -> None:
        async for event in self.client.follow(request_id):
            self.take(event)

    def assert_exact(self, num_ids: int) -> None:
        request_id = self.built.server.generates[0].request_id
        for choice, ids in enumerate(self.ids):
            assert ids == [token(request_id, choice, index, VOCAB_SIZE) for index in range(num_ids)]
            assert self.texts[choice] == self.built.text_of(request_id, choice, num_ids)
        assert self.ends == [1] * len(self.ids)


async def until(reader: Reader, num_ids: int) -> None:
    async with asyncio.timeout(10):
        while len(reader.ids[0]) < num_ids:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def owner_of(built: House) -> str:
    return built.server.generates[-1].reply.rsplit(".", 1)[1]


@pytest.mark.parametrize("num_choices", [1, 2])
async def test_a_killed_gateway_is_only_a_pause(tmp_path: Path, num_choices: int) -> None:
    async with house(tmp_path, "one", "two") as built:
        reader, other = Reader(built, num_choices), Reader(built, num_choices)
        following = asyncio.create_task(other.follow("shared"))
        await asyncio.sleep(0.05)
        running = asyncio.create_task(reader.run(max_tokens=100, request_id="shared"))
        await until(reader, 20)
        built.server.drop_all()
        await built.gateways[owner_of(built)].kill()
        await asyncio.wait_for(running, 15)
        await asyncio.wait_for(following, 15)
        reader.assert_exact(100)
        other.assert_exact(100)
        assert built.server.generates[-1].attempt > 65536


async def test_the_clients_own_connection_breaks(tmp_path: Path) -> None:
    async with house(tmp_path, "one", "two") as built:
        reader = Reader(built)
        running = asyncio.create_task(reader.run(max_tokens=120))
        for num_ids in (10, 60):
            await until(reader, num_ids)
            reader.bus.disconnect()
            await asyncio.sleep(0.2)
            reader.bus.reconnect()
        await asyncio.wait_for(running, 15)
        reader.assert_exact(120)
        assert {generate.attempt for generate in built.server.generates} == {1}  # its owner went on


@pytest.mark.parametrize("seed", range(4))
async def test_events_are_lost(tmp_path: Path, seed: int) -> None:
    async with house(tmp_path, "one", "two") as built:
        built.broker.faults = Losing(random.Random(seed), 0.05)
        reader = Reader(built, 1 + seed % 2)
        await asyncio.wait_for(reader.run(max_tokens=100), 25)
        reader.assert_exact(100)


class LosingAnswers:
    """Loses every answer to a client's requests, as if its server had died with it."""

    def delays_s(self, subject: str, sender: str, receiver: str) -> tuple[float, ...]:
        is_lost = subject.startswith("_INBOX.") and receiver.startswith("client-")
        return () if is_lost else (0.0,)


async def test_tokens_are_read_while_the_answer_to_a_join_is_lost(tmp_path: Path) -> None:
    async with house(tmp_path, "one", "two") as built:
        reader = Reader(built)
        running = asyncio.create_task(reader.run(max_tokens=100))
        await until(reader, 10)
        built.broker.faults = LosingAnswers()
        reader.bus.disconnect()
        await asyncio.sleep(0.1)
        reader.bus.reconnect()
        async with asyncio.timeout(2):  # the first answer alone is waited for half a second, the second one
            await running
        reader.assert_exact(100)
        assert {generate.attempt for generate in built.server.generates} == {1}


async def test_a_request_whose_answer_is_lost_begins_once(tmp_path: Path) -> None:
    async with house(tmp_path, "one", "two") as built:
        built.broker.faults = LosingAnswers()
        reader = Reader(built)
        await asyncio.wait_for(reader.run(max_tokens=400), 15)
        reader.assert_exact(400)
        assert len(built.server.generates) == 1


class LosingRequests:
    """Loses the first of a client's requests on its way to a gateway."""

    def __init__(self, num_lost: int = 1) -> None:
        self.num_left = num_lost

    def delays_s(self, subject: str, sender: str, receiver: str) -> tuple[float, ...]:
        is_lost = subject == subjects.api_generate(MODEL) and self.num_left > 0
        self.num_left -= is_lost
        return () if is_lost else (0.0,)


@pytest.mark.parametrize(("delay_s", "names"), [(0.0, ("one", "two")), (2.0, ("one",))])
async def test_a_lost_request_begins_though_the_store_is_away(
    tmp_path: Path, delay_s: float, names: Sequence[str]
) -> None:
    async with house(tmp_path, *names) as built:
        built.store.is_available, built.store.delay_s = False, delay_s
        built.broker.faults = LosingRequests()
        reader = Reader(built)
        async with asyncio.timeout(4):
            await reader.run(max_tokens=100)
        reader.assert_exact(100)
        assert len(built.server.generates) == 1


async def test_without_a_seed_a_request_waits_for_the_store(tmp_path: Path) -> None:
    """It may run somewhere, and would make other tokens here."""
    async with house(tmp_path, "one") as built:
        bus = built.broker.connect("raw")
        subject = subjects.api_generate(MODEL)

        async def joined(**fields: object) -> AnyApiEvent:
            body = {"id": "mine", "prompt": [65], "max_tokens": 4, "have": [0], **fields}
            answer = await bus.request(subject, msgspec.json.encode(body), timeout_s=5)
            return msgspec.json.decode(answer.data, type=AnyApiEvent)

        built.store.is_available = False
        for event in (await joined(), await joined(seed=None), await joined(seed=1, have=[1])):
            assert isinstance(event, ApiError)
            assert event.error.code == "not_ready"
        assert isinstance(await joined(seed=1), ApiAlive)
        built.store.is_available = True
        assert len(built.server.generates) == 1


@pytest.mark.parametrize("is_answer_lost", [True, False])
async def test_a_request_that_began_while_its_reader_asked(is_answer_lost: bool) -> None:
    """Two gateways are asked to begin it, and the one whose answer arrives finds the other one's record."""
    broker = MemoryBroker()
    gateway = broker.connect("gateway")
    asked: list[dict[str, object]] = []

    async def answer(msg: Msg) -> None:
        asked.append(msgspec.json.decode(msg.data))
        if len(asked) == 1 and is_answer_lost:
            return
        if len(asked) == 1:
            await client._on_reconnect()  # it asks again before it hears of the first time
        taken: AnyApiEvent = ApiAlive(id="mine")
        if len(asked) <= 2:
            error = ApiErrorBody(message="request mine is running already", type="", code="id_in_use")
            taken = ApiError(id="mine", error=error)
        await gateway.publish(msg.reply, msgspec.json.encode(taken))
        if len(asked) == 3:
            events = (
                ApiTokens(id="mine", choice=0, index=0, token_ids=[65], text="A", finish_reason="length"),
                ApiDone(id="mine", usage=ApiUsage(prompt_tokens=2, completion_tokens=1, total_tokens=3)),
            )
            for event in events:
                await gateway.publish(subjects.stream("mine"), msgspec.json.encode(event))

    tasks: list[asyncio.Task[None]] = []
    await gateway.subscribe(
        subjects.api_generate(MODEL), lambda msg: tasks.append(asyncio.create_task(answer(msg)))
    )
    client = Client(broker.connect("client"), MODEL)
    async with asyncio.timeout(5):
        events = [event async for event in client.generate([65, 66], request_id="mine")]
    assert [event.text for event in events] == ["A"]
    assert [request.get("have") for request in asked] == [None, [0], [0]]
    assert len({request["seed"] for request in asked}) == 1


async def test_an_id_is_in_use_everywhere_until_it_ended(tmp_path: Path) -> None:
    async with house(tmp_path, "one", "two") as built:
        readers = [Reader(built) for _ in range(4)]
        running = asyncio.create_task(readers[0].run(max_tokens=40, request_id="same"))
        await until(readers[0], 5)
        for reader in readers[1:3]:  # at both gateways
            with pytest.raises(GenerationError) as raised:
                await reader.run(max_tokens=3, request_id="same")
            assert raised.value.error.code == "id_in_use"
        await running
        readers[0].assert_exact(40)
        await readers[3].run(max_tokens=3, request_id="same")
        assert len(readers[3].ids[0]) == 3


async def test_cancelled_is_for_good(tmp_path: Path) -> None:
    async with house(tmp_path, "one", "two") as built:
        reader = Reader(built)
        running = asyncio.create_task(reader.run(max_tokens=200, request_id="mine"))
        await until(reader, 5)
        await reader.client.cancel("mine")
        with pytest.raises(GenerationError) as raised:
            await running
        assert raised.value.error.code == "cancelled"
        await asyncio.sleep(0.1)
        late = Reader(built)
        following = asyncio.create_task(late.follow("mine"))
        with pytest.raises(GenerationError) as raised:
            await asyncio.wait_for(following, 10)
        assert raised.value.error.code == "cancelled"
        assert built.server.generates[-1].attempt == 1


async def test_nothing_is_kept(tmp_path: Path) -> None:
    async with house(tmp_path, "one", resume=False) as built:
        reader = Reader(built)
        running = asyncio.create_task(reader.run(max_tokens=500))
        await until(reader, 5)
        await built.gateways["one"].kill()
        await built.add("two", resume=False)
        with pytest.raises(GenerationError) as raised:
            await asyncio.wait_for(running, 15)
        assert raised.value.error.code == "stream_not_found"
