"""Real nats-servers on free ports with the deploy configuration, and a raw connection for poison messages."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from pagebus.bus.nats_bus import NatsBus
from pagebus.cli.nats_server import EmbeddedNats

_OPEN = """
host: $PAGEBUS_NATS_HOST
port: $PAGEBUS_NATS_PORT
max_payload: 1MB
%s
jetstream { store_dir: $PAGEBUS_NATS_STORE }
authorization { users: [{ user: client, password: $PAGEBUS_NATS_CLIENT_PASSWORD }] }
"""


@asynccontextmanager
async def open_server(directory: Path, extra: str = "") -> AsyncIterator[EmbeddedNats]:
    """A server whose user `client` may do everything; `extra` are more lines of configuration."""
    configuration = directory / "open.conf"
    configuration.write_text(_OPEN % extra)
    async with running_server(configuration) as server:
        yield server


@asynccontextmanager
async def running_server(configuration: Path | None = None) -> AsyncIterator[EmbeddedNats]:
    """A server of one test's own, by default with the deploy configuration; removed afterwards."""
    server = EmbeddedNats(configuration=configuration)
    try:
        await server.start()
        yield server
    finally:
        await server.stop()


@asynccontextmanager
async def connected(server: EmbeddedNats, *roles: str) -> AsyncIterator[list[NatsBus]]:
    """A connection for each role, closed afterwards."""
    buses: list[NatsBus] = []
    try:
        for role in roles:
            buses.append(await NatsBus.connect(server.url(role), name=role, timeout_s=10))
        yield buses
    finally:
        for bus in buses:
            await bus.close()


class RawConnection:
    """Speaks NATS over a bare socket, so that it can say what no client would."""

    def __init__(self, url: str) -> None:
        self._url = urlsplit(url)

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_connection(self._url.hostname, self._url.port)
        await self._reader.readline()
        credentials = f'"user":"{self._url.username}","pass":"{self._url.password}"'
        options = '"verbose":false,"headers":true,"no_responders":true,"protocol":1,'
        await self.send(f"CONNECT {{{options}{credentials}}}\r\n".encode())
        await self.sync()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    async def send(self, data: bytes) -> None:
        """Bytes as they are."""
        self._writer.write(data)
        await self._writer.drain()

    async def sync(self) -> list[bytes]:
        """Wait until the server has taken all that was sent; the lines that it sent meanwhile."""
        await self.send(b"PING\r\n")
        lines: list[bytes] = []
        while True:
            line = await asyncio.wait_for(self._reader.readline(), 5)
            if not line or line == b"PONG\r\n":
                return lines
            if line == b"PING\r\n":
                await self.send(b"PONG\r\n")
            else:
                lines.append(line)

    async def publish(self, subject: bytes, data: bytes, *, reply: bytes = b"", headers: bytes = b"") -> None:
        """PUB, or HPUB with a raw header block, and wait until the server took it."""
        target = subject + (b" " + reply if reply else b"")
        if headers:
            sizes = b" %d %d" % (len(headers), len(headers) + len(data))
            await self.send(b"HPUB " + target + sizes + b"\r\n" + headers + data + b"\r\n")
        else:
            await self.send(b"PUB " + target + b" %d\r\n" % len(data) + data + b"\r\n")
        await self.sync()


async def eventually(condition: Callable[[], object], timeout_s: float = 5.0) -> None:
    """Wait until `condition()` is true; fails the test when it never is."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    while not condition():
        if asyncio.get_running_loop().time() > deadline:
            raise AssertionError(f"not within {timeout_s} s")
        await asyncio.sleep(0.01)
