"""Heads that are too large or come too slowly, and bytes that are no HTTP, cost a connection and no more."""

import asyncio
import json

from pagebus.gateway import connection
from tests.support.gateway import gateway, say


async def talk(port: int, data: bytes, *, timeout_s: float = 5.0) -> bytes:
    """Send bytes, read until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        async with asyncio.timeout(timeout_s):
            return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


def error_of(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]


async def test_large_heads(tmp_path):
    async with gateway(tmp_path, say("ok")) as server:
        many = b"".join(b"h%d: x\r\n" % i for i in range(20_000))
        for head in (b"a: " + b"x" * 40_000 + b"\r\n", many, b"".join(b"h%d: x\r\n" % i for i in range(101))):
            answer = await talk(server.port, b"GET /health HTTP/1.1\r\nhost: x\r\n" + head + b"\r\n")
            assert not answer or error_of(answer) == (431, "headers_too_large")
        answer = await talk(server.port, b"GET /" + b"x" * 40_000)
        assert not answer or error_of(answer) == (431, "headers_too_large")
        allowed = b"".join(b"h%d: x\r\n" % i for i in range(90)) + b"connection: close\r\n"
        answer = await talk(server.port, b"GET /health HTTP/1.1\r\nhost: x\r\n" + allowed + b"\r\n")
        assert answer.startswith(b"HTTP/1.1 200")


async def test_no_http(tmp_path):
    async with gateway(tmp_path, say("ok")) as server:
        for data in (b"\x16\x03\x01\x02\x00", b"NONSENSE\r\n\r\n", b"GET /\xff HTTP/1.1\r\nhost: x\r\n\r\n"):
            answer = await talk(server.port, data)
            assert error_of(answer) == (400, "invalid_http"), data
        both = b"content-length: 3\r\ntransfer-encoding: chunked\r\n"
        answer = await talk(server.port, b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n" + both + b"\r\nabc")
        assert error_of(answer)[0] == 400


async def test_slow_heads_and_bodies(tmp_path, monkeypatch):
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 0.3)
    monkeypatch.setattr(connection, "MESSAGE_TIMEOUT_S", 0.3)
    async with gateway(tmp_path, say("ok")) as server:
        body = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n{"
        for data in (b"", b"GET /health HTTP/1.1\r\nhost:", body):
            assert await talk(server.port, data, timeout_s=2) == b""
        assert server.requester.submitted == []


async def test_an_answer_may_take_longer_than_the_request_may(tmp_path, monkeypatch):
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 0.2)
    monkeypatch.setattr(connection, "MESSAGE_TIMEOUT_S", 0.2)
    async with gateway(tmp_path) as server:
        body = b'{"prompt":"x"}'
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
        talking = asyncio.create_task(talk(server.port, head % len(body) + body))
        request = await server.requester.next()
        await asyncio.sleep(0.5)
        request.tokens([97], finish="length")
        assert b'"text":"a"' in await talking


async def test_requests_share_a_connection(tmp_path):
    async with gateway(tmp_path, say("ok")) as server:
        body = b'{"prompt":"x"}'
        one = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        last = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
        answer = await talk(server.port, one + one + last)
        assert answer.count(b"HTTP/1.1 200") == 3
