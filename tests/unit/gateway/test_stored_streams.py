"""Stored streams on the memory bus: killed, left, joined and refused, two gateways at a time."""

import asyncio
import random
from pathlib import Path

import httpx
import pytest

from tests.support.stored import House, Read, house, posted, read_events, resumed

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 60, "temperature": 0}


def assert_exact(built: House, read: Read, *, num_choices: int = 1, num_ids: int = 60) -> None:
    request_id = built.server.generates[0].request_id
    assert read.is_done
    for choice in range(num_choices):
        assert read.text(choice) == built.text_of(request_id, choice, num_ids)
    assert read.reasons() == ["length"] * num_choices
    ids = [event_id for event_id, _ in read.events if event_id is not None]
    assert len(set(ids)) == len(ids)


async def test_undisturbed_streams_are_stored(tmp_path: Path) -> None:
    async with house(tmp_path, "one", "two") as built:
        async with posted(built.gateways["one"].url, CHAT) as answer:
            assert answer.headers["x-pagebus-resumable"] == "true"
            read = await read_events(answer, Read())
        assert_exact(built, read)
        again = Read(read.events[:1])
        assert_exact(built, await resumed(built.gateways["two"].url, again))
        whole = await resumed(built.gateways["two"].url, Read(read.events[:1]), after="")
        assert whole.events[0] == whole.events[1]  # the role once more: nothing was said to be here
        assert_exact(built, Read(whole.events[1:]))


@pytest.mark.parametrize("num_choices", [1, 3])
async def test_a_killed_gateway(tmp_path: Path, num_choices: int) -> None:
    rng = random.Random(num_choices)
    async with house(tmp_path, "one", "two") as built:
        async with posted(built.gateways["one"].url, {**CHAT, "n": num_choices}) as answer:
            read = await read_events(answer, Read(), rng.randrange(num_choices + 1, 20 * num_choices))
            await built.gateways["one"].kill()
        read = await resumed(built.gateways["two"].url, read)
        assert_exact(built, read, num_choices=num_choices)
        assert built.server.generates[-1].attempt > 65536


async def test_a_client_that_left_and_came_back(tmp_path: Path) -> None:
    async with house(tmp_path, "one", "two") as built:
        async with posted(built.gateways["one"].url, CHAT) as answer:
            read = await read_events(answer, Read(), 12)
        await asyncio.sleep(0.1)
        assert built.server.cancels
        for name, num_events in (("one", 24), ("two", 36)):
            async with httpx.AsyncClient(timeout=30) as client:
                url = f"{built.gateways[name].url}/v1/streams/{read.answer_id}?after={read.last_id}"
                async with client.stream("GET", url) as answer:
                    read = await read_events(answer, read, num_events)
            await asyncio.sleep(0.1)
        assert_exact(built, await resumed(built.gateways["one"].url, read))


async def test_a_reader_while_the_owner_lives(tmp_path: Path) -> None:
    async with house(tmp_path, "one", "two") as built:
        async with posted(built.gateways["one"].url, CHAT) as answer:
            read = await read_events(answer, Read(), 10)
            other = Read(list(read.events))
            other_reading = asyncio.create_task(resumed(built.gateways["two"].url, other))
            read = await read_events(answer, read)
            assert_exact(built, read)
            assert_exact(built, await other_reading)
        assert len(built.server.generates) == 1


@pytest.mark.parametrize("seed", range(6))
async def test_holes_in_the_log(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    async with house(tmp_path, "one", "two") as built:
        built.store.rng, built.store.share_lost = rng, 0.1
        body = {**CHAT, "n": rng.choice((1, 2)), "max_tokens": 80}
        async with posted(built.gateways["one"].url, body) as answer:
            read = await read_events(answer, Read(), rng.randrange(3, 50))
            other = Read(list(read.events))
            other_reading = asyncio.create_task(resumed(built.gateways["two"].url, other))
            if seed % 2:
                await asyncio.sleep(rng.random() / 2)
                built.server.drop_all()
                await built.gateways["one"].kill()
                read = await resumed(built.gateways["two"].url, (await read_events(answer, read)).cut())
            else:
                read = await read_events(answer, read)
            assert built.store.num_lost
            assert_exact(built, read, num_choices=body["n"], num_ids=80)
            assert_exact(built, await other_reading, num_choices=body["n"], num_ids=80)


async def test_an_owner_that_was_away(tmp_path: Path) -> None:
    async with house(tmp_path, "one", "two") as built:
        async with posted(built.gateways["one"].url, {**CHAT, "max_tokens": 200}) as answer:
            read = await read_events(answer, Read(), 20)
            other = Read(list(read.events))
            built.gateways["one"].bus.disconnect()
            other_reading = asyncio.create_task(resumed(built.gateways["two"].url, other))
            await asyncio.sleep(0.5)
            built.gateways["one"].bus.reconnect()
            assert_exact(built, await read_events(answer, read), num_ids=200)
            assert_exact(built, await other_reading, num_ids=200)
        attempts = [generate.attempt for generate in built.server.generates]
        assert max(attempts) > 65536
        assert len(attempts) < 6


async def test_the_store_is_away(tmp_path: Path) -> None:
    async with house(tmp_path, "one", "two") as built:
        async with posted(built.gateways["one"].url, CHAT) as answer:
            read = await read_events(answer, Read(), 20)
        built.store.is_available = False
        async with httpx.AsyncClient() as client:
            got = await client.get(f"{built.gateways['two'].url}/v1/streams/{read.answer_id}")
        assert (got.status_code, got.json()["error"]["code"]) == (503, "not_ready")
        assert got.headers["retry-after"] == "1"
        built.store.is_available = True
        reading = asyncio.create_task(resumed(built.gateways["two"].url, read))
        async with asyncio.timeout(10):
            while len(read.events) <= 20:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        built.store.is_available = False
        await asyncio.sleep(0.5)
        built.store.is_available = True
        assert_exact(built, await reading)


async def test_a_record_that_is_too_large(tmp_path: Path) -> None:
    async with house(tmp_path, "one") as built:
        built.broker.max_payload = 4096
        async with posted(built.gateways["one"].url, {"prompt": [65] * 900, "max_tokens": 3}) as answer:
            assert answer.headers["x-pagebus-resumable"] == "true"
        body = {"prompt": [65] * 900, "max_tokens": 3, "stop": ["x" * 1000] * 4}
        async with posted(built.gateways["one"].url, body) as answer:
            assert answer.headers["x-pagebus-resumable"] == "false"
            assert (await read_events(answer, Read())).is_done


async def test_several_prompts_and_all_that_is_told(tmp_path: Path) -> None:
    body = {
        "prompt": ["one", "two"], "max_tokens": 30, "n": 2, "logprobs": 2, "echo": True, "seed": 3,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True}, "return_token_ids": True,
    }  # fmt: skip
    async with house(tmp_path, "one", "two") as built:
        async with posted(built.gateways["one"].url, body) as answer:
            read = await read_events(answer, Read(), 50)
            built.server.drop_all()
            await built.gateways["one"].kill()
        read = await resumed(built.gateways["two"].url, read)
        by_prompt = [generate.request_id for generate in built.server.generates[:2]]
        for choice in range(4):
            assert read.text(choice) == ["one", "two"][choice // 2] + built.text_of(
                by_prompt[choice // 2], choice % 2, 30
            )
        assert read.reasons() == ["length"] * 4
        assert read.chunks[-1]["usage"]["completion_tokens"] == 120
        assert read.chunks[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] == 2


async def test_refusals(tmp_path: Path) -> None:
    async with house(tmp_path, "one", api_key=("a", "b")) as built:
        url = built.gateways["one"].url
        key = {"authorization": "Bearer a"}
        async with posted(url, CHAT, key) as answer:
            read = await read_events(answer, Read())
        async with httpx.AsyncClient() as client:

            async def get(answer_id: str, headers: dict[str, str], query: str = "") -> tuple[int, str]:
                answer = await client.get(f"{url}/v1/streams/{answer_id}{query}", headers=headers)
                return answer.status_code, answer.json()["error"]["code"]

            for other in ("x", "chatcmpl-" + "0" * 40, read.answer_id[:-1] + "z", "é", "a" * 300):
                assert await get(other, key) == (404, "stream_not_found")
            assert await get(read.answer_id, {"authorization": "Bearer b"}) == (404, "stream_not_found")
            assert await get(read.answer_id, {}) == (401, "invalid_api_key")
            for bad in ("x", "-1", "1.2", "1e5", "0x1", "1" * 30, "5.u", "٣"):
                assert await get(read.answer_id, key, f"?after={bad}") == (400, "invalid_event_id"), bad
            for high in ("61", "9999999999"):
                assert await get(read.answer_id, key, f"?after={high}") == (400, "after_out_of_range")


async def test_switched_off(tmp_path: Path) -> None:
    async with house(tmp_path, "one", resume=False) as built:
        async with posted(built.gateways["one"].url, CHAT) as answer:
            assert "x-pagebus-resumable" not in answer.headers
            read = await read_events(answer, Read())
            assert all(event_id is None for event_id, _ in read.events)
        async with httpx.AsyncClient() as client:
            got = await client.get(f"{built.gateways['one'].url}/v1/streams/{read.answer_id}")
        assert (got.status_code, got.json()["error"]["code"]) == (404, "resume_disabled")
