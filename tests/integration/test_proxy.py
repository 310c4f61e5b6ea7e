"""The proxy that tests cut paths with: what it does to a plain TCP connection."""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from tests.support.nats import eventually
from tests.support.proxy import TcpProxy


class Echo:
    """A server that sends everything back, and keeps what it got."""

    def __init__(self) -> None:
        self.got = b""

    async def start(self) -> int:
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return int(self.server.sockets[0].getsockname()[1])

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                self.got += data
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()


@pytest.fixture
async def path() -> AsyncIterator[tuple[Echo, TcpProxy]]:
    echo = Echo()
    with TcpProxy(await echo.start(), seed=7) as proxy:
        yield echo, proxy
    echo.server.close()


async def ask(
    ends: tuple[asyncio.StreamReader, asyncio.StreamWriter], data: bytes, timeout_s: float = 5
) -> bytes:
    reader, writer = ends
    writer.write(data)
    await writer.drain()
    return await asyncio.wait_for(reader.readexactly(len(data)), timeout_s)


async def test_forwards_delays_and_ends(path):
    _, proxy = path
    ends = await asyncio.open_connection("127.0.0.1", proxy.port)
    large = bytes(range(256)) * 20_000
    assert await ask(ends, large) == large
    proxy.delay_s = 0.2
    began_s = time.monotonic()
    assert await ask(ends, b"x") == b"x"
    assert 0.39 < time.monotonic() - began_s < 2
    proxy.heal()
    began_s = time.monotonic()
    assert await ask(ends, b"x") == b"x"
    assert time.monotonic() - began_s < 0.3
    ends[1].write_eof()
    assert await asyncio.wait_for(ends[0].read(), 5) == b""
    ends[1].close()
    await eventually(lambda: proxy.num_connections == 0)


async def test_a_cut_path_is_silent_and_delivers_after_the_heal(path):
    echo, proxy = path
    ends = await asyncio.open_connection("127.0.0.1", proxy.port)
    assert await ask(ends, b"a") == b"a"
    proxy.cut()
    with pytest.raises(TimeoutError):
        await ask(ends, b"b", timeout_s=0.3)
    late = await asyncio.open_connection("127.0.0.1", proxy.port)  # the kernel accepts; nobody answers
    with pytest.raises(TimeoutError):
        await ask(late, b"c", timeout_s=0.3)
    assert echo.got == b"a"
    proxy.heal()
    assert await asyncio.wait_for(ends[0].readexactly(1), 5) == b"b"
    assert await asyncio.wait_for(late[0].readexactly(1), 5) == b"c"


async def test_a_one_way_cut(path):
    echo, proxy = path
    ends = await asyncio.open_connection("127.0.0.1", proxy.port)
    assert await ask(ends, b"a") == b"a"
    proxy.cut_one_way("down")
    with pytest.raises(TimeoutError):
        await ask(ends, b"b", timeout_s=0.3)
    assert echo.got == b"ab"  # it arrived; the answer did not
    proxy.heal()
    assert await asyncio.wait_for(ends[0].readexactly(1), 5) == b"b"
    proxy.cut_one_way("up")
    with pytest.raises(TimeoutError):
        await ask(ends, b"c", timeout_s=0.3)
    assert echo.got == b"ab"


async def test_resets_and_refusals(path):
    _, proxy = path
    ends = [await asyncio.open_connection("127.0.0.1", proxy.port) for _ in range(3)]
    for one in ends:
        await ask(one, b"a")
    proxy.reset_all()
    for reader, _ in ends:
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(reader.read(1), 5)
    kept = await asyncio.open_connection("127.0.0.1", proxy.port)
    await ask(kept, b"a")
    proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", proxy.port)
    assert await ask(kept, b"b") == b"b"
    proxy.heal()
    again = await asyncio.open_connection("127.0.0.1", proxy.port)
    assert await ask(again, b"c") == b"c"
    proxy.reset_at_random(0.02)
    for reader, _ in (kept, again):
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(reader.read(1), 5)


async def test_a_target_that_is_gone(path):
    echo, proxy = path
    echo.server.close()

    async def connect() -> None:  # it is reset at once, or a moment after it was accepted
        reader, _ = await asyncio.open_connection("127.0.0.1", proxy.port)
        await asyncio.wait_for(reader.read(1), 5)

    with pytest.raises(ConnectionResetError):
        await connect()


def test_puts_its_own_address_into_urls():
    with TcpProxy(1) as proxy:
        assert proxy.url("nats://a:b%40@127.0.0.1:4222") == f"nats://a:b%40@127.0.0.1:{proxy.port}"
        assert proxy.url("nats://127.0.0.1:4222") == f"nats://127.0.0.1:{proxy.port}"
