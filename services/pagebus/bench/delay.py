"""A slow path to a NATS server, as a process: `python -m pagebus.bench.delay PORT DELAY_S`.

It adds that long each way, and prints its own port first. Knows bytes and times, no messages.
"""

import asyncio
import contextlib
import selectors
import sys
import time
from collections.abc import AsyncIterator
from urllib.parse import urlsplit, urlunsplit

_CHUNK_BYTES = 1 << 16


class Path:
    """Where services connect instead of the server. `url` rewrites the server's URL."""

    def __init__(self, port: int) -> None:
        self._port = port

    def url(self, url: str) -> str:
        """The same user, password and server, by this path."""
        parts = urlsplit(url)
        credentials, separator, _ = parts.netloc.rpartition("@")
        return urlunsplit(parts._replace(netloc=f"{credentials}{separator}127.0.0.1:{self._port}"))


@contextlib.asynccontextmanager
async def slow_path(server_url: str, message_delay_s: float) -> AsyncIterator[Path]:
    """A path on which each message takes so much longer, from who sends it to who gets it: half of it to the
    server and half of it from there. Every connection must take it."""
    port = urlsplit(server_url).port or 4222
    arguments = (sys.executable, "-m", "pagebus.bench.delay", str(port), str(message_delay_s / 2))
    process = await asyncio.create_subprocess_exec(*arguments, stdout=asyncio.subprocess.PIPE)
    try:
        if process.stdout is None:
            raise RuntimeError("the path has no output")
        yield Path(int(await process.stdout.readline()))
    finally:
        process.terminate()
        await process.wait()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float) -> None:
    under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    async def deliver() -> None:
        while True:
            due_s, data = await under_way.get()
            wait_s = due_s - time.monotonic()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            if not data:
                writer.close()
                return
            writer.write(data)
            await writer.drain()

    delivering = asyncio.create_task(deliver())
    data = b"-"
    with contextlib.suppress(ConnectionError):
        while data:
            data = await reader.read(_CHUNK_BYTES)
            under_way.put_nowait((time.monotonic() + delay_s, data))
        await delivering
    delivering.cancel()
    writer.close()


async def _serve(port: int, delay_s: float) -> None:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(_pump(reader, back, delay_s), _pump(there, writer, delay_s))

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    # epoll's timeouts are whole milliseconds; select's are not, and delays here are about one.
    _loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
    with contextlib.suppress(KeyboardInterrupt):
        _loop.run_until_complete(_serve(int(sys.argv[1]), float(sys.argv[2])))
