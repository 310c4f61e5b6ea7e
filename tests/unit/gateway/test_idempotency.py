"""`Idempotency-Key`: one request however often it is sent, at any gateway, also when one dies."""

import asyncio
from pathlib import Path

import httpx

from tests.support.stored import Read, house, posted, read_events

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 40}
KEY = {"idempotency-key": "order 66"}
URL = "/v1/chat/completions"


async def post(url: str, body: dict[str, object], headers: dict[str, str]) -> httpx.Response:
    async with httpx.AsyncClient(timeout=30) as client:
        return await client.post(url, json=body, headers=headers)


async def test_the_same_answer_again(tmp_path: Path) -> None:
    async with house(tmp_path, "one", "two") as built:
        urls = [gateway.url + URL for gateway in built.gateways.values()]
        first = await post(urls[0], CHAT, KEY)
        assert first.headers["x-pagebus-resumable"] == "true"
        for url in urls:
            again = await post(url, CHAT, KEY)
            assert again.status_code == 200
            assert again.json() == first.json()
        assert len(built.server.generates) == 1
        other = await post(urls[1], {**CHAT, "max_tokens": 41}, KEY)
        assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reused")
        assert other.json()["error"]["type"] == "invalid_request_error"
        text = await post(built.gateways["one"].url + "/v1/completions", {"prompt": "x"}, KEY)
        assert text.status_code == 422
        assert (await post(urls[0], CHAT, {"idempotency-key": "another"})).json()["id"] != first.json()["id"]


async def test_at_the_same_moment_at_two_gateways(tmp_path: Path) -> None:
    async with house(tmp_path, "one", "two") as built:
        urls = [gateway.url + URL for gateway in built.gateways.values()] * 4
        answers = await asyncio.gather(*(post(url, CHAT, KEY) for url in urls))
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.text for answer in answers}) == 1
        assert len(built.server.generates) == 1


async def test_streams_join(tmp_path: Path) -> None:
    async with house(tmp_path, "one", "two") as built:
        reads = [Read(), Read(), Read()]

        async def stream(number: int, pause_s: float) -> None:
            await asyncio.sleep(pause_s)
            url = list(built.gateways.values())[number % 2].url
            async with posted(url, CHAT, KEY) as answer:
                await read_events(answer, reads[number])

        await asyncio.gather(stream(0, 0), stream(1, 0.0), stream(2, 0.2))
        assert [read.is_done for read in reads] == [True] * 3
        assert len({read.text() for read in reads}) == 1
        assert len({read.answer_id for read in reads}) == 1
        assert [read.events for read in reads][1:] != []
        assert len({generate.request_id for generate in built.server.generates}) == 1


async def test_the_first_gateway_dies(tmp_path: Path) -> None:
    async with house(tmp_path, "one", "two") as built:
        first = asyncio.create_task(post(built.gateways["one"].url + URL, CHAT, KEY))
        await asyncio.sleep(0.15)
        second = asyncio.create_task(post(built.gateways["two"].url + URL, CHAT, KEY))
        await asyncio.sleep(0.1)
        built.server.drop_all()
        await built.gateways["one"].kill()
        await asyncio.wait({first})
        assert first.exception() is not None or first.result().status_code == 503
        answer = await second
        assert answer.status_code == 200, answer.text
        request_id = built.server.generates[0].request_id
        assert answer.json()["choices"][0]["message"]["content"] == built.text_of(request_id, 0, 40)
        assert {generate.request_id for generate in built.server.generates} == {request_id}


async def test_a_joined_stream_goes_on_without_its_first_reader(tmp_path: Path) -> None:
    async with house(tmp_path, "one", "two") as built:
        async with posted(built.gateways["one"].url, CHAT, KEY) as answer:
            await read_events(answer, Read(), 4)
            other = asyncio.create_task(post(built.gateways["two"].url + URL, CHAT, KEY))
            await asyncio.sleep(0.05)
            joined = Read()

            async def follow() -> None:
                async with posted(built.gateways["two"].url, CHAT, KEY) as second:
                    await read_events(second, joined)

            following = asyncio.create_task(follow())
            await asyncio.sleep(0.1)
        await following
        assert (await other).status_code == 422  # not streamed: another body
        assert joined.is_done
        assert joined.text() == built.text_of(built.server.generates[0].request_id, 0, 40)


async def test_a_refused_request_may_be_sent_again(tmp_path: Path) -> None:
    async with house(tmp_path, "one") as built:
        url = built.gateways["one"].url + URL
        built.server.refusal = "queue_full"
        refused = await post(url, CHAT, KEY)
        assert refused.status_code == 429
        built.server.refusal = ""
        await asyncio.sleep(0.2)
        assert (await post(url, CHAT, KEY)).status_code == 200
        too_long = await post(url, {**CHAT, "max_tokens": 1 << 20}, {"idempotency-key": "k"})
        assert too_long.status_code == 400
        assert (await post(url, CHAT, {"idempotency-key": "k"})).status_code == 200


async def test_bad_keys(tmp_path: Path) -> None:
    async with house(tmp_path, "one") as built:
        url = built.gateways["one"].url + URL
        for bad in (b"", b"x" * 256, b"a\tb", "é".encode()):
            async with httpx.AsyncClient() as client:
                answer = await client.post(url, json=CHAT, headers=[(b"idempotency-key", bad)])
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_key"), bad
        async with httpx.AsyncClient() as client:
            answer = await client.post(url, json=CHAT, headers=[("idempotency-key", "a")] * 2)
        assert answer.status_code == 400
        assert (await post(url, CHAT, {"idempotency-key": "x" * 255})).status_code == 200


async def test_tenants_have_keys_of_their_own(tmp_path: Path) -> None:
    async with house(tmp_path, "one", api_key=("a", "b")) as built:
        url = built.gateways["one"].url + URL
        answers = [
            await post(url, CHAT, {**KEY, "authorization": f"Bearer {name}"}) for name in ("a", "b", "a")
        ]
        ids = [answer.json()["id"] for answer in answers]
        assert ids[0] == ids[2] != ids[1]


async def test_without_jetstream(tmp_path: Path) -> None:
    async with house(tmp_path, "one") as built:
        built.broker.store.is_available = False
        url = built.gateways["one"].url
        answer = await post(url + URL, CHAT, KEY)
        assert answer.status_code == 200
        assert answer.headers["x-pagebus-resumable"] == "false"
        async with posted(url, CHAT) as stream:
            assert stream.headers["x-pagebus-resumable"] == "false"
            read = await read_events(stream, Read())
        assert read.is_done
