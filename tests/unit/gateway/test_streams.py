"""Streams over a real socket: pauses, failures midway, clients that leave or never read, draining."""

import asyncio
import json
import socket

import httpx
import openai
import pytest

from pagebus.bus.messages import Heartbeat
from tests.support.gateway import MODEL, RunningGateway, app_client, gateway, ids, say

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


async def open_stream(server: RunningGateway, body: dict, path: str = "/v1/chat/completions", **headers):
    """A raw connection that has sent a request."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    content = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "host: x", f"content-length: {len(content)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + content)
    await writer.drain()
    return reader, writer


async def until(condition, timeout_s: float = 5.0) -> None:
    """Wait until the condition holds."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_first_token_arrives_before_the_second_is_made(tmp_path):
    async with gateway(tmp_path) as server:
        reader, writer = await open_stream(server, {**CHAT, "stream": True})
        request = await server.requester.next()
        request.tokens(ids("a"))
        async with asyncio.timeout(2):
            seen = await reader.readuntil(b'"content":"a"')
        assert b"HTTP/1.1 200" in seen
        request.tokens(ids("b"), finish="length")
        async with asyncio.timeout(2):
            await reader.readuntil(b"data: [DONE]\n\n")
        writer.close()


async def test_a_split_character_is_held_back(tmp_path):
    async with gateway(tmp_path) as server, httpx.AsyncClient(base_url=server.url) as client:
        server.requester.script = say("€x", finish="length")
        text = (await client.post("/v1/completions", json={"prompt": "x", "stream": True})).text
        assert "\ufffd" not in text
        assert "€" in text


async def test_line_separators_cannot_split_an_event(tmp_path):
    odd = "a\u2028b\u2029c\u0085d\ne"
    async with gateway(tmp_path, say(odd)) as server:
        client = openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0)
        stream = await client.completions.create(model=MODEL, prompt="x", max_tokens=99, stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == odd
        async with (
            httpx.AsyncClient(base_url=server.url) as raw,
            raw.stream("POST", "/v1/completions", json={"prompt": "x", "stream": True}) as answer,
        ):
            lines = [line async for line in answer.aiter_lines() if line]
        assert all(line.startswith("data: ") for line in lines)


async def test_keep_alive_comments_while_queued_and_while_paused(tmp_path):
    async with gateway(tmp_path, keep_alive_interval_s=0.1) as server:
        reader, writer = await open_stream(server, {**CHAT, "stream": True})
        request = await server.requester.next()
        async with asyncio.timeout(3):
            head = await reader.readuntil(b": keep-alive\n\n")
            assert b"200 OK" in head
            request.tokens(ids("a"))
            await reader.readuntil(b'"content":"a"')
            await reader.readuntil(b": keep-alive\n\n")
            await reader.readuntil(b": keep-alive\n\n")
            request.tokens(ids("b"), finish="length")
            rest = await reader.readuntil(b"data: [DONE]\n\n")
        assert b'"content":"b"' in rest
        writer.close()


async def test_the_sdk_reads_over_comments(tmp_path):
    async with gateway(tmp_path, keep_alive_interval_s=0.05) as server:
        client = openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0)

        async def play() -> None:
            request = await server.requester.next()
            for letter in "abc":
                await asyncio.sleep(0.15)
                request.tokens(ids(letter))
            request.tokens([], finish="length")

        player = asyncio.create_task(play())
        stream = await client.chat.completions.create(**CHAT, stream=True)
        assert "".join([c.choices[0].delta.content or "" async for c in stream]) == "abc"
        await player


async def test_failure_midway_is_an_event(tmp_path):
    async with gateway(tmp_path) as server:
        client = openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0)
        reader, writer = await open_stream(server, {**CHAT, "stream": True})
        request = await server.requester.next()
        request.tokens(ids("a"))
        await reader.readuntil(b'"content":"a"')
        request.fail("executor_lost", "it broke")
        rest = await reader.readuntil(b"data: [DONE]\n\n")
        writer.close()
        event = next(part for part in rest.decode().split("\n\n") if '"error"' in part)
        error = json.loads(event[event.index("{") :])["error"]
        assert error == {
            "message": "it broke", "type": "server_error", "param": None, "code": "executor_lost",
        }  # fmt: skip

        async def play() -> None:
            second = await server.requester.next(1)
            second.tokens(ids("a"))
            await asyncio.sleep(0.05)
            second.fail("executor_lost", "it broke")

        player = asyncio.create_task(play())
        stream = await client.chat.completions.create(**CHAT, stream=True)
        with pytest.raises(openai.APIError, match="it broke"):
            async for _ in stream:
                pass
        await player


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("has_begun", [False, True])
async def test_a_client_that_leaves_cancels(tmp_path, stream, has_begun):
    async with gateway(tmp_path) as server:
        body = {"prompt": ["a", "b"], "stream": stream, "max_tokens": 99}
        reader, writer = await open_stream(server, body, "/v1/completions")
        first, second = await server.requester.next(0), await server.requester.next(1)
        if has_begun:
            first.tokens(ids("a"))
            if stream:
                await reader.readuntil(b'"text":"a"')
        writer.transport.abort()
        await until(lambda: first.is_cancelled and second.is_cancelled, 1.0)
        assert server.context.generations.num_live == 0
        assert server.context.counters.finished["abort"] == 2


async def test_a_client_that_leaves_while_sending_its_body(tmp_path):
    async with gateway(tmp_path, say("ok")) as server:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.transport.abort()
        async with httpx.AsyncClient(base_url=server.url) as client:
            assert (await client.post("/v1/completions", json={"prompt": "x"})).status_code == 200
        assert len(server.requester.submitted) == 1


async def test_a_client_that_never_reads_is_cut_off(tmp_path):
    async with gateway(tmp_path, slow_reader_timeout_s=0.5) as server:
        server.requester.heartbeat = Heartbeat(
            scheduler="s", model=MODEL, epoch=1, num_executors=1, max_model_len=10_000_000
        )
        client = socket.create_connection(("127.0.0.1", server.port))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = json.dumps({"prompt": "x", "stream": True, "max_tokens": 9_000_000}).encode()
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        )
        request = await server.requester.next()
        async with asyncio.timeout(10):
            while not request.is_cancelled:
                for _ in range(200):
                    request.tokens(ids("x" * 500))
                await asyncio.sleep(0.02)
        assert server.context.generations.num_live == 0
        client.close()


async def test_request_ids(tmp_path):
    async with app_client(tmp_path, say("ok")) as (client, requester):
        for path in ("/health", "/v1/models", "/nowhere"):
            answer = await client.get(path, headers={"x-request-id": "abc-1.2"})
            assert answer.headers.get_list("x-request-id") == ["abc-1.2"]
        for bad in ("a b", "a*>", "x" * 129, "\xff", "", "a\tb"):
            answer = await client.get("/health", headers={b"x-request-id": bad.encode("latin-1")})
            assert len(answer.headers["x-request-id"]) == 32
        body = {"prompt": "x"}
        answer = await client.post("/v1/completions", json=body, headers={"x-request-id": "mine"})
        assert answer.headers["x-request-id"] == "mine"
        assert requester.submitted[0].spec.request_id != "mine"


async def test_running_streams_end_before_the_server_does(tmp_path):
    async with gateway(tmp_path) as server:
        reader, writer = await open_stream(server, {**CHAT, "stream": True})
        request = await server.requester.next()
        request.tokens(ids("a"))
        await reader.readuntil(b'"content":"a"')
        server.stop.set()
        await until(lambda: server.context.generations.is_draining)
        await asyncio.sleep(0.3)
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", server.port)
        assert not server.task.done()
        request.tokens(ids("b"), finish="length")
        rest = await reader.readuntil(b"data: [DONE]\n\n")
        assert b'"content":"b"' in rest
        writer.close()
        async with asyncio.timeout(3):
            await server.task


async def test_streams_over_the_grace_end_with_an_error(tmp_path):
    async with gateway(tmp_path, drain_grace_s=0.3) as server:
        reader, writer = await open_stream(server, {**CHAT, "stream": True})
        request = await server.requester.next()
        request.tokens(ids("a"))
        await reader.readuntil(b'"content":"a"')
        server.stop.set()
        async with asyncio.timeout(5):
            rest = await reader.readuntil(b"data: [DONE]\n\n")
        assert b"server_shutting_down" in rest
        assert request.is_cancelled
        writer.close()
        async with asyncio.timeout(5):
            await server.task
