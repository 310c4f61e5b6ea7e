"""The machine under test: a real nats-server, services as processes, and the connections that watch them.

Starts and heals; which faults strike, and what is judged, is not known here.
"""

import asyncio
import contextlib
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx

from pagebus.bus import subjects
from pagebus.bus.messages import Heartbeat, decode
from pagebus.bus.nats_bus import NatsBus
from pagebus.bus.protocol import Msg
from pagebus.cli.nats_server import free_port
from pagebus.client import Client
from pagebus.requester.client import Requester
from tests.chaos.processes import ServiceProcess
from tests.chaos.servers import OPEN_CONFIGURATION, OneServer, Paths, Servers, ThreeServers

MODEL = "chaos"
_START_TIMEOUT_S = 30.0
_POLL_S = 0.02
_MOST_ENDS = 4  # of one service while all should come up


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What runs. `step_s`: how long the fake model takes a step."""

    executors: int = 2
    schedulers: int = 1
    gateways: int = 1
    step_s: float = 0.01
    poison: str = ""  # the fake model's, as in its module
    servers: Literal[1, 3] = 1
    has_routes: bool = False  # the paths between three servers can be cut
    has_paths: bool = False  # each service's connections to the bus can be cut
    is_bundled: bool = False  # the bundled model on real tensors, instead of the fake one
    is_served: bool = False  # by one `pagebus serve`, all on one port, instead of each service by itself


class NotReachedError(AssertionError):
    """Something that must come true did not in time."""


class Bed:
    """Everything of one layout; `running` makes it."""

    def __init__(self, layout: Layout, directory: Path) -> None:
        self.layout = layout
        self.directory = directory
        self.servers: Servers = _servers(layout, directory)
        self.paths: dict[str, Paths] = {}  # by the service's label
        self.services: list[ServiceProcess] = []
        self.beat: Heartbeat | None = None
        self.beat_s = 0.0
        self.epochs: list[tuple[float, int, str]] = []  # when a heartbeat of a new epoch was first heard
        self.ports: list[int] = []
        self.deadline_s = 60.0  # of every stream
        self._buses: list[NatsBus] = []

    # -- start and end -----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start all and wait until it serves; raises `NotReachedError`."""
        await self.servers.start()
        self.bus = await self.connect("tool", "chaos-tool")
        await self.bus.subscribe(subjects.heartbeat(MODEL), self._on_heartbeat)
        self.requester = Requester(self.bus, model=MODEL, instance="chaos-requester")
        await self.requester.start()
        self.client = Client(await self.connect("client", "chaos-client"), MODEL)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self.http = httpx.AsyncClient(
            timeout=httpx.Timeout(60.0, connect=5.0), limits=limits, trust_env=False
        )
        for role, number in self._wanted():
            service = ServiceProcess(role, number, self._environment(role, number), self.directory)
            self.services.append(service)
            await service.start()
        await self.healed()

    def _wanted(self) -> list[tuple[str, int]]:
        layout = self.layout
        if layout.is_served:
            return [("serve", 1)]
        counts = {"executor": layout.executors, "scheduler": layout.schedulers, "gateway": layout.gateways}
        return [(role, number) for role, count in counts.items() for number in range(1, count + 1)]

    def _environment(self, role: str, number: int) -> dict[str, str]:
        url = self.url(role)
        if self.layout.has_paths:
            paths = self.paths[f"{role}-{number}"] = Paths(url, seed=number)
            url = paths.url
        environment = {
            "NATS_URL": url,
            "PAGEBUS_SERVED_MODEL_NAME": MODEL,
            "PAGEBUS_LOG_LEVEL": "debug",
            "XDG_RUNTIME_DIR": str(self.directory),
        }
        if role in ("executor", "serve") and self.layout.is_bundled:
            environment |= {
                "PAGEBUS_DTYPE": "float32",
                "PAGEBUS_NUM_THREADS": "1",
                "PAGEBUS_KV_CACHE_MEMORY": "256MiB",
            }
        elif role in ("executor", "serve"):
            environment |= {
                "PAGEBUS_FAKE": "1",
                "PAGEBUS_FAKE_STEP_S": str(self.layout.step_s),
                "PAGEBUS_FAKE_POISON": self.layout.poison,
                "PAGEBUS_FAKE_TROUBLE": str(self.trouble_file(number)),
                "PAGEBUS_MAX_MODEL_LEN": "4096",
            }
        if role in ("gateway", "serve"):
            self.ports.append(free_port())
            environment |= {"PAGEBUS_PORT": str(self.ports[-1])}
        if role == "serve":
            environment |= {
                "PAGEBUS_EXECUTORS": str(self.layout.executors),
                "PAGEBUS_SCHEDULERS": str(self.layout.schedulers),
                "PAGEBUS_GATEWAYS": str(self.layout.gateways),
            }
        return environment

    async def close(self) -> None:
        """End all."""
        await asyncio.gather(*(service.close() for service in self.services))
        await asyncio.gather(*(paths.close() for paths in self.paths.values()))
        with contextlib.suppress(AttributeError):  # never started that far
            await self.http.aclose()
        with contextlib.suppress(AttributeError, asyncio.TimeoutError):
            await asyncio.wait_for(self.requester.close(), 5)
        for bus in self._buses:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(bus.close(), 2)
        await self.servers.stop()

    # -- who is there ------------------------------------------------------------------------------------

    def url(self, role: str) -> str:
        """Where a role connects."""
        return self.servers.url(role)

    async def connect(self, role: str, name: str) -> NatsBus:
        """A connection of our own, closed at the end."""
        bus = await NatsBus.connect(
            self.url(role).split(","), name=name, timeout_s=10, on_closed=lambda: None
        )
        self._buses.append(bus)
        return bus

    def of(self, role: str) -> list[ServiceProcess]:
        """The services of a role."""
        return [service for service in self.services if service.role == role]

    def trouble_file(self, number: int) -> Path:
        """Where executor `number` looks for a fault to have."""
        return self.directory / f"trouble-{number}"

    def leader(self) -> ServiceProcess:
        """The scheduler that leads now; raises `NotReachedError`."""
        for service in self.of("scheduler"):
            if self.beat is not None and service.name == self.beat.scheduler:
                return service
        raise NotReachedError(f"no scheduler leads; the last heartbeat: {self.beat}")

    @property
    def gateway_urls(self) -> list[str]:
        """Where the gateways listen."""
        return [f"http://127.0.0.1:{port}" for port in self.ports]

    # -- waiting -----------------------------------------------------------------------------------------

    def _on_heartbeat(self, msg: Msg) -> None:
        beat = decode(msg.data)
        if isinstance(beat, Heartbeat):
            if not self.epochs or beat.epoch > self.epochs[-1][1]:
                self.epochs.append((time.monotonic(), beat.epoch, beat.scheduler))
            self.beat, self.beat_s = beat, time.monotonic()

    async def until(self, condition: Callable[[], bool], what: str, timeout_s: float) -> float:
        """Wait; the seconds that it took. Raises `NotReachedError` with `what` and the newest heartbeat."""
        began_s = time.monotonic()
        while not condition():
            if time.monotonic() - began_s > timeout_s:
                raise NotReachedError(f"not within {timeout_s:g} s: {what}; last heartbeat: {self.beat}")
            await asyncio.sleep(_POLL_S)
        return time.monotonic() - began_s

    async def healed(self, timeout_s: float = _START_TIMEOUT_S) -> float:
        """Start what is down; wait until all executors are known, gateways are ready, all blocks are free."""
        began_s = time.monotonic()
        await self.servers.start()
        for service in self.services:
            await service.start()
        num_ends = [len(service.exit_codes) for service in self.services]

        def is_healed() -> bool:
            for service, before in zip(self.services, num_ends, strict=True):
                if len(service.exit_codes) >= before + _MOST_ENDS:
                    raise NotReachedError(f"{service.label} does not stay up: {service.last_words()}")
            return self.is_idle(began_s)

        await self.until(is_healed, "all executors known and idle", timeout_s)
        for url in self.gateway_urls:
            await self._until_ready(url, began_s + timeout_s)
        return time.monotonic() - began_s

    def is_idle(self, since_s: float) -> bool:
        """Whether a heartbeat after `since_s` tells of all executors, no work, and no block in use."""
        beat = self.beat
        return (
            beat is not None
            and self.beat_s > since_s
            and beat.num_executors == self.layout.executors
            and beat.num_running == beat.num_waiting == 0
            and beat.num_free_blocks == beat.num_blocks
        )

    async def _until_ready(self, url: str, deadline_s: float) -> None:
        answered = ""
        while True:
            try:
                answer = await self.http.get(f"{url}/ready", timeout=2.0)
                answered = f"{answer.status_code} {answer.text[:300]}"
                if answer.status_code == 200:
                    return
            except httpx.HTTPError as error:
                answered = f"{type(error).__name__} {error}"
            if time.monotonic() > deadline_s:
                raise NotReachedError(f"{url}/ready never said 200, but {answered}")
            await asyncio.sleep(0.05)

    def last_words(self) -> str:
        """The last line of each log that is no debug line."""
        return "\n".join(f"  {s.label}: {s.last_words()}" for s in self.services if s.last_words())


def _servers(layout: Layout, directory: Path) -> Servers:
    if layout.servers == 3:
        return ThreeServers(directory, has_route_proxies=layout.has_routes)
    if not layout.is_served:
        return OneServer()
    path = directory / "open.conf"
    path.write_text(OPEN_CONFIGURATION)
    return OneServer(path)


@asynccontextmanager
async def running(layout: Layout, keep_logs: Path | None = None) -> AsyncIterator[Bed]:
    """All of `layout`, ready; ended afterwards whatever happens. Logs are copied to `keep_logs`, if given."""
    with tempfile.TemporaryDirectory(prefix="pagebus-chaos-") as directory:
        bed = Bed(layout, Path(directory))
        try:
            await bed.start()
            yield bed
        except NotReachedError as error:
            raise NotReachedError(f"{error}\n{bed.last_words()}") from error
        finally:
            await asyncio.shield(bed.close())
            if keep_logs is not None:
                shutil.copytree(
                    directory, keep_logs, dirs_exist_ok=True, ignore=shutil.ignore_patterns("trouble*")
                )
