"""A gateway that is told to stop: nothing new comes in, what is there is answered, and nobody is reset."""

import asyncio
import json

import pytest

from pagebus.gateway import draining
from tests.support.gateway import MODEL, gateway, ids, say, silence

BODY = json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 8}).encode()
REQUEST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(BODY), BODY)
STREAMED = json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 8, "stream": True}).encode()
STREAM = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (
    len(STREAMED),
    STREAMED,
)


class Connection:
    """One kept-alive connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def open(cls, port: int) -> "Connection":
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def ask(self, data: bytes) -> tuple[bytes, bytes]:
        """Head (in lower case) and body of a whole answer."""
        self.writer.write(data)
        return await self.answer()

    async def answer(self) -> tuple[bytes, bytes]:
        async with asyncio.timeout(5):
            head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
            length = next(line for line in head.split(b"\r\n") if line.startswith(b"content-length:"))
            return head, await self.reader.readexactly(int(length.split(b":")[1]))

    async def rest(self) -> bytes:
        """All that comes until the server closes; raises where it resets."""
        async with asyncio.timeout(5):
            return await self.reader.read()


async def refused(port: int) -> None:
    async with asyncio.timeout(3):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except ConnectionRefusedError:
                return
            writer.close()
            await asyncio.sleep(0.02)


@pytest.fixture(autouse=True)
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draining, "KEPT_ALIVE_S", 1.0)


async def test_kept_alive_connections_are_served_and_told_to_close(tmp_path) -> None:
    async with gateway(tmp_path, say("ok")) as server:
        used = [await Connection.open(server.port) for _ in range(3)]
        for each in used:
            head, _ = await each.ask(REQUEST)
            assert b"connection: close" not in head
        fresh = await Connection.open(server.port)  # open, and nothing was asked yet
        await asyncio.sleep(0.05)
        server.stop.set()
        await refused(server.port)
        for each in (*used[:2], fresh):
            head, body = await each.ask(REQUEST)
            assert head.startswith(b"http/1.1 200")
            assert b"connection: close" in head
            assert json.loads(body)["choices"][0]["text"] == "ok"
            assert await each.rest() == b""
        head, _ = await Connection.ask(used[2], b"GET /ready HTTP/1.1\r\nhost: x\r\n\r\n")
        assert head.startswith(b"http/1.1 503")
        await asyncio.wait_for(server.task, 5)


async def test_an_idle_connection_is_closed_after_the_clients_pools_forgot_it(tmp_path) -> None:
    async with gateway(tmp_path, say("ok")) as server:
        idle = await Connection.open(server.port)
        await idle.ask(REQUEST)
        began_s = asyncio.get_running_loop().time()
        server.stop.set()
        assert await idle.rest() == b""
        assert 0.9 < asyncio.get_running_loop().time() - began_s < 3.0
        await asyncio.wait_for(server.task, 5)


async def test_what_runs_is_answered_to_its_end(tmp_path) -> None:
    async with gateway(tmp_path, silence) as server:
        whole, stream, coming = [await Connection.open(server.port) for _ in range(3)]
        whole.writer.write(REQUEST)
        first = await server.requester.next(0)
        stream.writer.write(STREAM)
        second = await server.requester.next(1)
        second.tokens(ids("ab"))
        coming.writer.write(REQUEST[:-5])  # its last bytes come later
        await asyncio.sleep(0.1)
        server.stop.set()
        await refused(server.port)
        coming.writer.write(REQUEST[-5:])
        third = await server.requester.next(2)
        await asyncio.sleep(1.2)  # longer than idle connections live
        for request in (first, second, third):
            request.tokens(ids("cd"), finish="length")
        for each in (whole, coming):
            head, body = await each.answer()
            assert b"connection: close" in head
            assert json.loads(body)["choices"][0]["text"] == "cd"
            assert await each.rest() == b""
        text = await stream.rest()
        assert b"[DONE]" in text
        assert text.endswith(b"0\r\n\r\n"), "the stream ends in order"
        await asyncio.wait_for(server.task, 5)


async def test_what_is_left_after_the_grace_period_is_told_to_go_elsewhere(tmp_path) -> None:
    async with gateway(tmp_path, silence, drain_grace_s=0.3) as server:
        whole, stream = await Connection.open(server.port), await Connection.open(server.port)
        whole.writer.write(REQUEST)
        await server.requester.next(0)
        stream.writer.write(STREAM)
        (await server.requester.next(1)).tokens(ids("ab"))
        await asyncio.sleep(0.1)
        server.stop.set()
        head, body = await whole.answer()
        assert head.startswith(b"http/1.1 503")
        assert b"retry-after" in head
        assert json.loads(body)["error"]["code"] == "server_shutting_down"
        assert b"server_shutting_down" in await stream.rest()
        await asyncio.wait_for(server.task, 5)
        assert all(request.is_cancelled for request in server.requester.submitted)
