"""Three real nats-servers as a cluster on loopback, with the deploy configuration: killed, stopped, cut off.

```python
async with running_cluster() as cluster:          # meta leader elected, all three current
    bus = await NatsBus.connect(cluster.url("gateway"), name="g")
    cluster.kill(0); await cluster.start()         # SIGKILL; start what is down
    cluster.pause(1); cluster.resume(1)            # SIGSTOP, SIGCONT
    await cluster.stream_leader("KV_pagebus")      # its number
async with running_cluster(with_route_proxies=True) as cluster:
    cluster.cut_off(2); cluster.heal()             # from the other servers, clients still reach it
```
"""

import asyncio
import json
import os
import secrets
import signal
import tempfile
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from pagebus.cli.nats_server import ROLES, EmbeddedNats, find_configuration, free_port
from tests.support.proxy import Direction, TcpProxy

NUM_SERVERS = 3
_DEPLOY = Path(__file__).resolve().parents[2] / "deploy" / "nats-cluster.conf"
_NOWHERE = "127.0.0.1:1"  # told to other servers, so that gossip finds no way round a proxy
_READY_TIMEOUT_S = 60.0
_POLL_S = 0.05


class NatsCluster:
    """Made by `running_cluster`."""

    def __init__(self, directory: Path, *, with_route_proxies: bool = False) -> None:
        self.passwords = {role: secrets.token_urlsafe(12) for role in ROLES}
        self._route_password = secrets.token_urlsafe(12)
        self._route_ports = [free_port() for _ in range(NUM_SERVERS)]
        self._http_ports = [free_port() for _ in range(NUM_SERVERS)]
        self._paused: set[int] = set()
        self.routes: dict[tuple[int, int], TcpProxy] = {}
        """The path that server i opened to server j, where there are proxies; "up" is towards j."""
        if with_route_proxies:
            for i in range(NUM_SERVERS):
                for j in range(NUM_SERVERS):
                    if i != j:
                        self.routes[i, j] = TcpProxy(self._route_ports[j]).start()
        configuration = self._write_configuration(directory)
        self.servers = [
            EmbeddedNats(
                port=free_port(),
                configuration=configuration,
                passwords=self.passwords,
                variables=self._variables(number),
            )
            for number in range(NUM_SERVERS)
        ]

    # -- where -------------------------------------------------------------------------------------------

    def url(self, role: str) -> str:
        """All servers, as NATS_URL names them."""
        return ",".join(server.url(role) for server in self.servers)

    def number_of(self, server_name: str) -> int:
        """Which server has that name."""
        return [server._name for server in self.servers].index(server_name)

    # -- life and death ----------------------------------------------------------------------------------

    async def start(self, *numbers: int) -> None:
        """Start what is down (of `numbers`, else of all); returns when each accepts connections."""
        await asyncio.gather(*(self.servers[number].start() for number in numbers or range(NUM_SERVERS)))

    def kill(self, *numbers: int) -> None:
        """SIGKILL these, or all."""
        for number in numbers or range(NUM_SERVERS):
            self._signal(number, signal.SIGKILL)
            self._paused.discard(number)

    def pause(self, number: int) -> None:
        """SIGSTOP."""
        self._signal(number, signal.SIGSTOP)
        self._paused.add(number)

    def resume(self, number: int) -> None:
        """SIGCONT."""
        self._signal(number, signal.SIGCONT)
        self._paused.discard(number)

    async def stop(self) -> None:
        """End all and remove what they kept."""
        for number in list(self._paused):
            self.resume(number)
        await asyncio.gather(*(server.stop() for server in self.servers))
        for proxy in self.routes.values():
            proxy.close()

    def cut_off(self, number: int, direction: Direction | None = None) -> None:
        """Cut server `number` from the others: both ways, or what comes to it ("up") or leaves it ("down").

        Needs route proxies.
        """
        for (source, target), proxy in self.routes.items():
            if number not in (source, target):
                continue
            if direction is None:
                proxy.cut()
            else:
                reaches_it = direction == "up"
                proxy.cut_one_way("up" if (target == number) is reaches_it else "down")

    def heal(self) -> None:
        """End all trouble between servers."""
        for proxy in self.routes.values():
            proxy.heal()

    # -- what JetStream does -----------------------------------------------------------------------------

    async def ready(self, timeout_s: float = _READY_TIMEOUT_S) -> None:
        """Wait until there is a meta leader and all servers are current."""
        await self._until(self._is_ready, "a meta leader, and all servers current", timeout_s)

    async def meta_leader(self, timeout_s: float = _READY_TIMEOUT_S) -> int:
        """Which server leads JetStream."""
        return await self._named(lambda: self._leader_of(""), "a meta leader", timeout_s)

    async def stream_leader(self, stream: str, timeout_s: float = _READY_TIMEOUT_S) -> int:
        """Which server leads a stream."""
        return await self._named(lambda: self._leader_of(stream), f"a leader of {stream}", timeout_s)

    async def num_replicas(self, stream: str) -> int:
        """How many copies of a stream its leader counts as current; 0 without a leader."""
        for server, report in zip(self.servers, await self._reports(), strict=True):
            group = report.streams.get(stream)
            if group is not None and group.leader == server._name:
                return 1 + sum(replica.current for replica in group.replicas)
        return 0

    async def _is_ready(self) -> bool:
        reports = await self._reports()
        alive = {server._name: one for server, one in zip(self.servers, reports, strict=True) if one.is_there}
        leaders = {report.meta_cluster.leader for report in alive.values()}
        if not alive or len(leaders) != 1 or (leader := leaders.pop()) not in alive:
            return False
        group = alive[leader].meta_cluster
        current = {replica.name for replica in group.replicas if replica.current and not replica.offline}
        return current | {leader} >= set(alive) and group.cluster_size == NUM_SERVERS

    async def _leader_of(self, stream: str) -> str:
        """The leader's name, JetStream's own without `stream`; only what the leader says itself counts."""
        for server, report in zip(self.servers, await self._reports(), strict=True):
            group = report.streams.get(stream) if stream else report.meta_cluster
            if group is not None and group.leader == server._name:
                return server._name
        return ""

    async def _named(self, ask: Callable[[], Awaitable[str]], what: str, timeout_s: float) -> int:
        found = ""

        async def is_there() -> bool:
            nonlocal found
            found = await ask()
            return bool(found)

        await self._until(is_there, what, timeout_s)
        return self.number_of(found)

    async def _until(self, is_true: Callable[[], Awaitable[bool]], what: str, timeout_s: float) -> None:
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        while not await is_true():
            if asyncio.get_running_loop().time() > deadline_s:
                raise AssertionError(f"not within {timeout_s:g} s: {what}\n{self.logs()}")
            await asyncio.sleep(_POLL_S)

    async def _reports(self) -> list["_Report"]:
        """What each server says about JetStream; empty where it does not answer."""

        def fetch(number: int) -> _Report:
            if not self.servers[number].is_running or number in self._paused:
                return _Report()
            return _fetched(f"http://127.0.0.1:{self._http_ports[number]}/jsz?streams=1")

        return await asyncio.gather(*(asyncio.to_thread(fetch, number) for number in range(NUM_SERVERS)))

    # -- making ------------------------------------------------------------------------------------------

    def _write_configuration(self, directory: Path) -> Path:
        (directory / "nats-server.conf").write_text(find_configuration().read_text())
        text = _DEPLOY.read_text()
        if self.routes:
            text = text.replace("cluster {\n", f'cluster {{\n  advertise: "{_NOWHERE}"\n')
        path = directory / "nats-cluster.conf"
        path.write_text(f"{text}\nhttp_port: $PAGEBUS_TEST_HTTP_PORT\n")
        return path

    def _variables(self, number: int) -> dict[str, str]:
        routes = [
            f"nats://route:{self._route_password}@127.0.0.1:{self._route_port(number, other)}"
            for other in range(NUM_SERVERS)
            if other != number
        ]
        return {
            "PAGEBUS_NATS_NAME": f'"nats-{number}"',
            "PAGEBUS_NATS_CLUSTER_PORT": str(self._route_ports[number]),
            "PAGEBUS_NATS_ROUTE_PASSWORD": f'"{self._route_password}"',
            "PAGEBUS_NATS_ROUTES": json.dumps(routes),
            "PAGEBUS_TEST_HTTP_PORT": str(self._http_ports[number]),
        }

    def _route_port(self, source: int, target: int) -> int:
        proxy = self.routes.get((source, target))
        return proxy.port if proxy else self._route_ports[target]

    def _signal(self, number: int, signal_number: signal.Signals) -> None:
        if pid := self.servers[number].pid:
            os.kill(pid, signal_number)

    def logs(self) -> str:
        """The ends of the servers' logs."""
        ends = []
        for number, server in enumerate(self.servers):
            path = (server._directory or Path()) / "nats-server.log"
            lines = path.read_text(errors="replace").splitlines()[-30:] if path.is_file() else []
            ends.append("\n".join([f"--- server {number} {server._name}", *lines]))
        return "\n".join(ends)


class _Replica(msgspec.Struct):
    name: str = ""
    current: bool = False
    offline: bool = False


class _Group(msgspec.Struct):
    leader: str = ""
    replicas: list[_Replica] = []
    cluster_size: int = 0


class _Stream(msgspec.Struct):
    name: str = ""
    cluster: _Group | None = None


class _Account(msgspec.Struct):
    stream_detail: list[_Stream] = []


class _Report(msgspec.Struct):
    """The fields of /jsz that are read here."""

    server_id: str = ""
    meta_cluster: _Group = msgspec.field(default_factory=_Group)
    account_details: list[_Account] = []

    @property
    def is_there(self) -> bool:
        return bool(self.server_id)

    @property
    def streams(self) -> dict[str, _Group | None]:
        return {stream.name: stream.cluster for one in self.account_details for stream in one.stream_detail}


def _fetched(url: str) -> _Report:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return msgspec.json.decode(answer.read(), type=_Report)
    except (OSError, msgspec.MsgspecError):
        return _Report()


@asynccontextmanager
async def running_cluster(*, with_route_proxies: bool = False) -> AsyncIterator[NatsCluster]:
    """Three servers, ready; ended afterwards whatever happens."""
    with tempfile.TemporaryDirectory(prefix="pagebus-cluster-") as directory:
        cluster = NatsCluster(Path(directory), with_route_proxies=with_route_proxies)
        try:
            await cluster.start()
            await cluster.ready()
            yield cluster
        finally:
            await asyncio.shield(cluster.stop())
