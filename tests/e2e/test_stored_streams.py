"""Real processes on a real nats-server: gateways, or all but the bus, are killed in the middle of streams,
and the rest at another gateway is exact."""

import asyncio
from pathlib import Path

import httpx
import openai

from pagebus.bus.nats_bus import NatsBus
from pagebus.client import Client
from tests.support.apart import Apart, apart
from tests.support.stored import Read, posted, read_events, resumed

ALL = ("scheduler", "executor", "gateway-1", "gateway-2")
STORY = {
    "messages": [{"role": "user", "content": "Tell me a story about a fox."}],
    "max_tokens": 300,
    "temperature": 0.8,
    "seed": 7,
    "ignore_eos": True,
    "stop": ["zebra crossing"],
}


async def whole(house: Apart, gateway: str, body: dict[str, object]) -> list[str]:
    """The undisturbed texts of all choices."""
    async with httpx.AsyncClient(timeout=60) as client:
        answer = await client.post(f"{house.url(gateway)}/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        return [choice["message"]["content"] for choice in answer.json()["choices"]]


def assert_same(read: Read, want: list[str]) -> None:
    assert read.is_done, read.events[-1:]
    assert [read.text(choice) for choice in range(len(want))] == want
    assert read.reasons() == ["length"] * len(want)


async def free_blocks(url: str) -> tuple[int, int]:
    async with httpx.AsyncClient(timeout=10) as client:
        state = (await client.get(f"{url}/ready")).json()
    return state["num_free_blocks"], state["num_running"]


async def test_a_gateway_is_killed(tmp_path: Path) -> None:
    async with apart(tmp_path, *ALL) as house:
        body = {**STORY, "n": 2}
        want = await whole(house, "gateway-2", body)
        async with posted(house.url("gateway-2"), body) as other:
            async with posted(house.url("gateway-1"), body) as answer:
                assert answer.headers["x-pagebus-resumable"] == "true"
                read = await read_events(answer, Read(), 60)
                left = await read_events(other, Read(), 20)
                house.kill("gateway-1")
                read = await read_events(answer, read)
            assert not read.is_done
            assert_same(await resumed(house.url("gateway-2"), read), want)
            assert_same(await read_events(other, left), want)  # never noticed


async def test_orphans_end_within_two_seconds(tmp_path: Path) -> None:
    body = {**STORY, "max_tokens": 900}
    async with apart(tmp_path, *ALL) as house:
        free, _ = await free_blocks(house.url("gateway-2"))
        async with posted(house.url("gateway-1"), {**body, "n": 8}) as answer:
            read = await read_events(answer, Read(), 40)
            assert not read.is_done
            await asyncio.sleep(1.0)  # heartbeats tell the load twice a second
            assert (await free_blocks(house.url("gateway-2")))[1] == 8
            house.kill("gateway-1")
        loop = asyncio.get_running_loop()
        start_s = loop.time()
        while (await free_blocks(house.url("gateway-2"))) != (free, 0):
            assert loop.time() - start_s < 4, await free_blocks(house.url("gateway-2"))
            await asyncio.sleep(0.05)
        print(f"blocks free after {loop.time() - start_s:.2f} s")


async def test_everything_but_the_bus_is_killed(tmp_path: Path) -> None:
    async with apart(tmp_path, *ALL) as house:
        want = await whole(house, "gateway-2", STORY)
        reads: list[Read] = []
        for gateway, num_events in (("gateway-1", 40), ("gateway-2", 90)):
            async with posted(house.url(gateway), STORY) as answer:
                reads.append(await read_events(answer, Read(), num_events))
                if gateway == "gateway-2":
                    house.kill(*ALL)
        for name in ALL:
            house.start(name)
        house.wait_ready("gateway-1")
        for read in reads:
            assert_same(await resumed(house.url("gateway-1"), read), want)


async def test_the_openai_sdk_first(tmp_path: Path) -> None:
    async with apart(tmp_path, *ALL) as house:
        want = await whole(house, "gateway-2", STORY)
        async with openai.AsyncOpenAI(base_url=house.url("gateway-1") + "/v1", api_key="none") as client:
            extra = {"ignore_eos": True}
            body = {key: value for key, value in STORY.items() if key not in extra}
            stream = await client.chat.completions.create(
                model="pagebus-mini", stream=True, extra_body=extra, **body
            )
            text, answer_id, num_tokens = "", "", 0
            async for chunk in stream:
                answer_id = chunk.id
                text += chunk.choices[0].delta.content or ""
                num_tokens += 1
                if num_tokens == 50:
                    break
            house.kill("gateway-1")
            await stream.close()
        # Without an event's id a reader begins again; it knows the text that it has.
        url = f"{house.url('gateway-2')}/v1/streams/{answer_id}"
        async with httpx.AsyncClient(timeout=60) as http, http.stream("GET", url) as answer:
            read = await read_events(answer, Read())
        assert_same(read, want)
        assert read.text().startswith(text)


async def test_a_nats_client_only_waits(tmp_path: Path) -> None:
    async with apart(tmp_path, *ALL) as house:
        bus = await NatsBus.connect(house.nats.url("client"), name="test", timeout_s=10)
        async with Client(bus, silence_s=6.0) as client:

            async def run(fault: str) -> tuple[list[int], str]:
                ids: list[int] = []
                text = ""
                stream = client.generate("Once upon a time", max_tokens=200, ignore_eos=True, seed=3)
                async for event in stream:
                    assert event.index == len(ids)
                    ids += event.token_ids
                    text += event.text
                    if fault and len(ids) == 50:
                        # Whichever has the request: the one after the other.
                        house.kill(fault)
                        house.start(fault)
                        fault = ""
                return ids, text

            want = await run("")
            assert len(want[0]) == 200
            assert await run("gateway-1") == want
            house.wait_ready("gateway-1")
            assert await run("gateway-2") == want
