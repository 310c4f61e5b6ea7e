"""Streams that nobody reads end; what readers missed is repeated, also where nothing could be stored."""

import asyncio
import json
import random
from pathlib import Path

import pytest

from pagebus.bus import subjects
from pagebus.gateway import api_outbox, nats_api
from pagebus.gateway.api_told import KEPT_S, Ended, Told
from tests.support.gateway import MODEL, silence
from tests.support.stored import house
from tests.unit.gateway.test_nats_api import World, world
from tests.unit.gateway.test_nats_joins import Losing, Reader, owner_of, until


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(nats_api, "ALIVE_INTERVAL_S", 0.05)
    monkeypatch.setattr(api_outbox, "UNREAD_S", 0.3)
    monkeypatch.setattr(api_outbox, "_ANSWER_S", 0.02)


async def ask(running: World, identity: str) -> None:
    body = json.dumps({"id": identity, "prompt": "x"}).encode()
    await running.bus.request(subjects.api_generate(MODEL), body, timeout_s=5)


async def test_a_stream_that_nobody_reads_ends(tmp_path, quick):
    running = World(tmp_path, silence)
    await running.api.start()
    await ask(running, "lonely")
    reader = await running.bus.subscribe(subjects.stream("read"), running.hear)
    await ask(running, "read")
    lonely, read = await running.requester.next(0), await running.requester.next(1)
    async with asyncio.timeout(5):
        while not lonely.is_cancelled:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.5)
    assert not read.is_cancelled
    assert len(running.heard) > 3  # signs of life
    await reader.unsubscribe()
    async with asyncio.timeout(5):
        while not read.is_cancelled:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await running.api.close()
    running.tokenizer.close()


async def test_a_reader_that_comes_back_in_time(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(api_outbox, "UNREAD_S", 1.0)
    async with world(tmp_path, silence) as running:
        for _ in range(4):
            await ask(running, "mine") if not running.requester.submitted else None
            running.bus.disconnect()
            await asyncio.sleep(0.4)
            running.bus.reconnect()
            await asyncio.sleep(0.2)
        assert not running.requester.submitted[0].is_cancelled


@pytest.mark.parametrize("seed", range(4))
async def test_what_could_not_be_stored_is_told_from_memory(tmp_path: Path, seed: int) -> None:
    async with house(tmp_path, "one", "two") as built:
        built.broker.store.is_available = False
        built.broker.faults = Losing(random.Random(seed), 0.08)
        reader = Reader(built, 1 + seed % 2)
        await asyncio.wait_for(reader.run(max_tokens=60), 25)
        reader.assert_exact(60)
        assert {generate.attempt for generate in built.server.generates} == {1}


async def test_the_gateways_own_connection_breaks(tmp_path: Path) -> None:
    """What it had sent just before may be lost on the way: it comes again without being asked for."""
    async with house(tmp_path, "one") as built:
        reader = Reader(built, silence_s=60.0)
        running = asyncio.create_task(reader.run(max_tokens=80))
        await until(reader, 10)
        gateway = built.gateways[owner_of(built)]
        healthy, built.broker.faults = built.broker.faults, Losing(random.Random(1), 1.0)
        await asyncio.sleep(0.1)
        built.broker.faults = healthy
        gateway.bus.disconnect()
        await asyncio.sleep(0.1)
        gateway.bus.reconnect()
        await asyncio.wait_for(running, 15)
        reader.assert_exact(80)


def test_what_ended_is_kept_for_a_while():
    now_s = 0.0
    ended = Ended(lambda: now_s)
    told = [Told.__new__(Told) for _ in range(1500)]
    for number, one in enumerate(told):
        ended.add(f"r{number}", one)
    assert ended.get("r0") is None
    assert ended.get("r1499") is told[1499]
    ended.forget("r1499")
    assert ended.get("r1499") is None
    now_s = KEPT_S + 1
    assert ended.get("r1498") is None


async def test_another_gateway_runs_it_and_nothing_is_stored(tmp_path: Path) -> None:
    """Whichever gateway a reader comes back to, the one that runs the request tells it the rest."""
    async with house(tmp_path, "one", "two") as built:
        built.broker.store.is_available = False
        reader = Reader(built)
        running = asyncio.create_task(reader.run(max_tokens=150))
        for num_ids in (10, 40, 70, 100):
            await until(reader, num_ids)
            reader.bus.disconnect()
            await asyncio.sleep(0.05)
            reader.bus.reconnect()
        await asyncio.wait_for(running, 15)
        reader.assert_exact(150)
