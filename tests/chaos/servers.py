"""The bus under test: its nats-servers, and the paths to them that can be cut. Knows no service."""

import asyncio
import functools
import os
import signal
from pathlib import Path
from typing import Protocol

from pagebus.cli.errors import CommandError
from pagebus.cli.nats_server import EmbeddedNats
from tests.support.cluster import NUM_SERVERS, NatsCluster
from tests.support.proxy import TcpProxy

_NUM_TRIES = 3  # to start servers on ports of their own


class Servers(Protocol):
    """One nats-server or several."""

    async def start(self) -> None:
        """Start all; also those that were killed, with what they stored."""

    async def stop(self) -> None:
        """End all and remove what they stored."""

    def url(self, role: str) -> str:
        """Where a role connects: one URL, or several with commas between."""

    def kill(self, number: int) -> None:
        """SIGKILL of one server."""

    @property
    def count(self) -> int:
        """How many there are."""


class OneServer:
    """A single server with the deploy configuration, or with `configuration`, where `client` may do all."""

    def __init__(self, configuration: Path | None = None) -> None:
        self._nats = EmbeddedNats(configuration=configuration)
        self._is_open = configuration is not None

    @property
    def count(self) -> int:
        """One."""
        return 1

    async def start(self) -> None:
        """Start it."""
        await self._nats.start()

    async def stop(self) -> None:
        """End it."""
        await self._nats.stop()

    def url(self, role: str) -> str:
        """Where a role connects."""
        return self._nats.url("client" if self._is_open else role)

    def kill(self, number: int) -> None:
        """SIGKILL; `start` brings it back with the same port and store."""
        if self._nats.pid:
            os.kill(self._nats.pid, signal.SIGKILL)


OPEN_CONFIGURATION = """
host: $PAGEBUS_NATS_HOST
port: $PAGEBUS_NATS_PORT
max_payload: 8MB
jetstream { store_dir: $PAGEBUS_NATS_STORE }
authorization { users: [{ user: client, password: $PAGEBUS_NATS_CLIENT_PASSWORD }] }
"""
"""For services that all come in as one user, as `pagebus serve` does on a bus that is not its own."""


class Paths:
    """A proxy before every server for one service: its own path to the bus."""

    def __init__(self, url: str, seed: int) -> None:
        self._urls = url.split(",")
        self.proxies = [TcpProxy(int(one.rpartition(":")[2]), seed=seed).start() for one in self._urls]

    @property
    def url(self) -> str:
        """Where the service connects."""
        return ",".join(proxy.url(url) for proxy, url in zip(self.proxies, self._urls, strict=True))

    async def close(self) -> None:
        """End all connections."""
        await asyncio.gather(*(asyncio.to_thread(proxy.close) for proxy in self.proxies))


class ThreeServers:
    """A cluster of three, whose routes to each other may be cut."""

    def __init__(self, directory: Path, *, has_route_proxies: bool) -> None:
        self._make = functools.partial(NatsCluster, directory, with_route_proxies=has_route_proxies)
        self.cluster = self._make()
        self._has_started = False

    @property
    def count(self) -> int:
        """Three."""
        return NUM_SERVERS

    async def start(self) -> None:
        """Start what is down; returns when JetStream has a leader and all servers are current."""
        for _ in range(_NUM_TRIES if not self._has_started else 0):
            try:
                await self.cluster.start()
                break
            except CommandError:  # somebody else took a port that was free
                await self.cluster.stop()
                self.cluster = self._make()
        await self.cluster.start()
        self._has_started = True
        await self.cluster.ready()

    async def stop(self) -> None:
        """End all."""
        await self.cluster.stop()

    def url(self, role: str) -> str:
        """All three."""
        return self.cluster.url(role)

    def kill(self, number: int) -> None:
        """SIGKILL of one."""
        self.cluster.kill(number)
