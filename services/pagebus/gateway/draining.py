"""uvicorn's server with an end that resets nobody: what runs and what still comes is answered.

It knows connections, not what they ask for.
"""

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn

from pagebus.gateway.connection import GatewayConnection

KEPT_ALIVE_S = 6.0
"""How long idle connections stay open at the end: longer than clients keep them in their pools (httpx: 5 s).

Whoever uses one until then is answered, and told that the connection closes."""
AFTER_GRACE_S = 2.0
_CLOSE = (b"connection", b"close")
_POLL_S = 0.02


class DrainingServer(uvicorn.Server):
    """Serves until `should_exit`; then all connections end within `grace_s` and a little."""

    def __init__(self, config: uvicorn.Config, grace_s: float) -> None:
        super().__init__(config)
        self._grace_s = grace_s
        self.is_last = False  # nobody else serves these clients: idle connections close at once

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone: the process's main owns these."""
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept nothing more, answer what came, and close every connection when it is idle."""
        for server in self.servers:
            server.close()
        for sock in sockets or []:
            sock.close()
        state, loop = self.server_state, asyncio.get_running_loop()
        state.default_headers = [*state.default_headers, _CLOSE]
        for connection in self._connections:
            connection.say_close(_CLOSE)
        began_s = loop.time()
        while state.connections and loop.time() < began_s + self._grace_s + AFTER_GRACE_S:
            if self.is_last or loop.time() >= began_s + min(KEPT_ALIVE_S, self._grace_s):
                for connection in self._connections:
                    connection.close_if_idle()
            await asyncio.sleep(_POLL_S)
        for connection in self._connections:
            connection.transport.abort()
        for task in list(state.tasks):
            task.cancel()
        await asyncio.gather(*state.tasks, return_exceptions=True)

    @property
    def _connections(self) -> list[GatewayConnection]:
        return [each for each in self.server_state.connections if isinstance(each, GatewayConnection)]
