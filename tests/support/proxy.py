"""A TCP path that can be cut: one `TcpProxy` a connection path, with a thread and an event loop of its own.

```python
with TcpProxy(target_port=4222) as proxy:  # listens on 127.0.0.1:proxy.port
    proxy.delay_s = 0.2          # each way, for what arrives from now on
    proxy.cut()                  # a partition: connections stay open and silent both ways, new ones too
    proxy.cut_one_way("up")      # from the connecting side to the target only; "down": the other way
    proxy.reset_all()            # RST to both ends of every connection, now
    proxy.reset_at_random(0.5)   # one connection, each half second on average, by `seed`
    proxy.refuse()               # new connections are refused; those that are open stay
    proxy.heal()                 # all of that ends; what was held back by a cut is delivered
```

Every method may be called from any thread and any event loop; it returns when it has happened. What a cut
holds back arrives after the heal, as TCP's repetitions would bring it, unless an end has given up meanwhile.
A service goes through it with `proxy.url(server.url(role))`, a route between nats-servers with
`nats://127.0.0.1:{port}`. `python -m tests.support.proxy TARGET_PORT` runs one by hand and obeys the same
words on its input.
"""

import asyncio
import contextlib
import random
import socket
import struct
import sys
import threading
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Literal, Self
from urllib.parse import urlsplit, urlunsplit

Direction = Literal["up", "down"]

_CHUNK_BYTES = 65536
_MAX_CHUNKS = 256  # what may be under way on a slow path, each way
_CALL_TIMEOUT_S = 10.0
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class TcpProxy:
    """Listens on `port` and forwards to the target. `delay_s` is added each way."""

    def __init__(
        self, target_port: int, *, target_host: str = "127.0.0.1", port: int = 0, seed: int = 0
    ) -> None:
        """`port` 0 picks a free one, known after `start`."""
        self.target = (target_host, target_port)
        self.port = port
        self.delay_s = 0.0
        self.num_accepted = 0
        self._random = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name=f"proxy to {target_port}", daemon=True
        )
        self._server: asyncio.Server | None = None
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._resetting: asyncio.Task[None] | None = None
        self._is_open = {"up": asyncio.Event(), "down": asyncio.Event()}
        for event in self._is_open.values():
            event.set()

    # -- life --------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Listen; the port is free to connect to when this returns."""
        self._thread.start()
        self._call(self._listen())
        return self

    def close(self) -> None:
        """End every connection and the thread."""
        if not self._thread.is_alive():
            return
        with contextlib.suppress(TimeoutError):
            self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CALL_TIMEOUT_S)
        self._loop.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def url(self, url: str) -> str:
        """`url` with this proxy's address in place of the one it names; user and password stay."""
        parts = urlsplit(url)
        credentials, separator, _ = parts.netloc.rpartition("@")
        return urlunsplit(parts._replace(netloc=f"{credentials}{separator}127.0.0.1:{self.port}"))

    # -- trouble -----------------------------------------------------------------------------------------

    def cut(self) -> None:
        """Hold everything back, both ways; connections stay open."""
        self._do(*(event.clear for event in self._is_open.values()))

    def cut_one_way(self, direction: Direction) -> None:
        """Hold back what goes `up` (towards the target) or `down` (back)."""
        self._do(self._is_open[direction].clear)

    def reset_all(self) -> None:
        """Reset every connection at both ends."""
        self._do(self._reset_links)

    def reset_at_random(self, mean_s: float) -> None:
        """Reset one connection at a time, `mean_s` apart on average, until `heal`."""
        self._call(self._begin_resets(mean_s))

    def refuse(self) -> None:
        """Refuse new connections; open ones stay."""
        self._call(self._stop_listening())

    def heal(self) -> None:
        """End all trouble, delay included."""
        self.delay_s = 0.0
        self._call(self._heal())

    @property
    def num_connections(self) -> int:
        """How many are open now."""
        return len(self._links)

    # -- inside the thread -------------------------------------------------------------------------------

    def _call(self, work: Coroutine[None, None, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(_CALL_TIMEOUT_S)

    def _do(self, *work: Callable[[], None]) -> None:
        async def run() -> None:
            for step in work:
                step()

        self._call(run())

    async def _listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(
                self._accept, "127.0.0.1", self.port, limit=_CHUNK_BYTES
            )
            self.port = self._server.sockets[0].getsockname()[1]

    async def _stop_listening(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _heal(self) -> None:
        if self._resetting is not None:
            self._resetting.cancel()
            self._resetting = None
        for event in self._is_open.values():
            event.set()
        await self._listen()

    async def _end(self) -> None:
        await self._heal()
        await self._stop_listening()
        self._reset_links()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _reset_links(self) -> None:
        for link in list(self._links):
            link.reset()

    async def _begin_resets(self, mean_s: float) -> None:
        async def resets() -> None:
            while True:
                await asyncio.sleep(self._random.expovariate(1 / mean_s))
                if self._links:
                    self._random.choice(sorted(self._links, key=lambda link: link.number)).reset()

        if self._resetting is not None:
            self._resetting.cancel()
        self._resetting = asyncio.create_task(resets())

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_accepted += 1
        link = _Link(self.num_accepted, writer)
        self._links.add(link)
        try:
            await self._is_open["up"].wait()  # what a partition does to the first packet
            there, back = await asyncio.open_connection(*self.target, limit=_CHUNK_BYTES)
            link.writers.append(back)
            for end in link.writers:
                end.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            async with asyncio.TaskGroup() as group:
                for direction, source, sink in (("up", reader, back), ("down", there, writer)):
                    chunks: asyncio.Queue[tuple[float, bytes | None]] = asyncio.Queue(_MAX_CHUNKS)
                    group.create_task(self._take(self._is_open[direction], source, chunks))
                    group.create_task(self._give(self._is_open[direction], chunks, sink, link))
        except (OSError, ExceptionGroup):
            link.reset()
        finally:
            self._links.discard(link)
            for end in link.writers:
                end.close()

    async def _take(
        self,
        is_open: asyncio.Event,
        source: asyncio.StreamReader,
        chunks: asyncio.Queue[tuple[float, bytes | None]],
    ) -> None:
        """Read while the path is open; an end of the stream is something to be forwarded as well."""
        while True:
            await is_open.wait()
            try:
                chunk: bytes | None = await source.read(_CHUNK_BYTES)
            except OSError:
                chunk = None  # a reset
            await chunks.put((self._loop.time() + self.delay_s, chunk))
            if not chunk:
                return

    async def _give(
        self,
        is_open: asyncio.Event,
        chunks: asyncio.Queue[tuple[float, bytes | None]],
        sink: asyncio.StreamWriter,
        link: "_Link",
    ) -> None:
        """Write what is due while the path is open."""
        while True:
            due_s, chunk = await chunks.get()
            await asyncio.sleep(max(due_s - self._loop.time(), 0.0))
            await is_open.wait()
            if chunk is None:
                link.reset()
                return
            if not chunk:
                if sink.can_write_eof():
                    sink.write_eof()
                return
            sink.write(chunk)
            await sink.drain()


class _Link:
    """One connection through the proxy: its two sockets."""

    def __init__(self, number: int, writer: asyncio.StreamWriter) -> None:
        self.number = number
        self.writers = [writer]

    def reset(self) -> None:
        """RST to both ends."""
        for writer in self.writers:
            end = writer.get_extra_info("socket")
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            writer.transport.abort()


def _main(arguments: list[str]) -> None:
    with TcpProxy(int(arguments[0])) as proxy:
        print(proxy.port, flush=True)
        for line in sys.stdin:
            match line.split():
                case ["delay", seconds]:
                    proxy.delay_s = float(seconds)
                case ["cut"]:
                    proxy.cut()
                case ["cut_one_way", "up" | "down" as direction]:
                    proxy.cut_one_way(direction)
                case ["reset_all"]:
                    proxy.reset_all()
                case ["reset_at_random", seconds]:
                    proxy.reset_at_random(float(seconds))
                case ["refuse"]:
                    proxy.refuse()
                case ["heal"]:
                    proxy.heal()
                case other:
                    print(f"no such word: {other}", flush=True)


if __name__ == "__main__":
    _main(sys.argv[1:])
