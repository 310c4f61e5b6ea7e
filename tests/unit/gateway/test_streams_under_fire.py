"""Many streams, read in pieces at gateways that are killed, cut off and replaced, over a log with holes: each
one is exact in the end."""

import asyncio
import random
from pathlib import Path

import httpx
import pytest

from pagebus.bus import subjects
from tests.support.stored import House, Read, house, posted, read_events

NUM_STREAMS = 6
NUM_IDS = 80


async def read_in_pieces(built: House, rng: random.Random, number: int) -> tuple[Read, int]:
    """One stream, however often its connection is cut; and its number of choices."""
    num_choices = rng.choice((1, 1, 3))
    body = {
        "prompt": [65 + number] * 20, "max_tokens": NUM_IDS, "n": num_choices, "temperature": 0,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    read = Read()
    while not read.is_done:
        gateway = rng.choice(list(built.gateways.values()))
        piece = len(read.events) + rng.choice((1, 10, 60, 1000))
        try:
            if not read.events:
                async with posted(gateway.url, body) as answer:
                    if answer.status_code == 200 and answer.headers["x-pagebus-resumable"] == "true":
                        await read_events(answer, read, piece)
            else:
                url = f"{gateway.url}/v1/streams/{read.answer_id}"
                headers = {"last-event-id": read.last_id}
                async with (
                    httpx.AsyncClient(timeout=30) as client,
                    client.stream("GET", url, headers=headers) as answer,
                ):
                    if answer.status_code == 200:
                        await read_events(answer, read, piece)
                    else:
                        assert answer.status_code == 503, await answer.aread()
        except httpx.TransportError:
            pass
        if any('"error"' in data for _, data in read.events):
            read.cut()
        await asyncio.sleep(rng.random() * 0.1)
    return read, num_choices


async def fire(built: House, rng: random.Random) -> None:
    """Kills, cuts and replaces gateways until it is cancelled."""
    number = 10
    while True:
        await asyncio.sleep(0.2 + rng.random() * 0.5)
        name = rng.choice(list(built.gateways))
        if rng.random() < 0.5:
            bus = built.gateways[name].bus
            bus.disconnect()
            await asyncio.sleep(rng.random() * 0.4)
            bus.reconnect()
            continue
        number += 1
        await built.add(f"gateway-{number}")
        gateway = built.gateways.pop(name)
        await gateway.kill()
        built.server.drop_all(subjects.out(name))


@pytest.mark.parametrize("seed", range(3))
async def test_every_stream_is_exact(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    async with house(tmp_path, "one", "two") as built:
        built.store.rng, built.store.share_lost = random.Random(seed), rng.choice((0.0, 0.05))
        firing = asyncio.create_task(fire(built, rng))
        try:
            async with asyncio.timeout(60):
                done = await asyncio.gather(
                    *(read_in_pieces(built, random.Random(f"{seed} {i}"), i) for i in range(NUM_STREAMS))
                )
        finally:
            firing.cancel()
            await asyncio.gather(firing, return_exceptions=True)
        for number, (read, num_choices) in enumerate(done):
            asked = [one for one in built.server.generates if one.prompt[0] == 65 + number]
            texts = {
                tuple(built.text_of(request_id, choice, NUM_IDS) for choice in range(num_choices))
                for request_id in {one.request_id for one in asked}
            }
            assert tuple(read.text(choice) for choice in range(num_choices)) in texts, (
                number,
                read.events[-3:],
            )
            assert sorted(read.reasons()) == ["length"] * num_choices
            assert [chunk["usage"]["completion_tokens"] for chunk in read.chunks if chunk.get("usage")] == [
                num_choices * NUM_IDS
            ]
