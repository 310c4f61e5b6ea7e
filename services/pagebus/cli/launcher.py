"""Everything on one machine: starts bus, executors, schedulers and gateways, watches them, stops them.

It knows processes and the order between them, nothing of what they do. All start at once: each copes with
the others being late, and the executor's imports take longest by far, so it is started first.
"""

import asyncio
import logging
import os
import signal
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol

from pagebus.cli import status_file
from pagebus.cli.backoff import Backoff
from pagebus.cli.errors import CommandError, ExitCode
from pagebus.cli.port import LISTEN_VARIABLE, SharedListener
from pagebus.cli.processes import ServiceProcess, service_command
from pagebus.cli.ready import Capacity, Readiness, ask, curl_command
from pagebus.cli.restarting import Request, Restarts, needs_room
from pagebus.cli.rolling import replace_all
from pagebus.cli.services import NATS_VARIABLE
from pagebus.settings.load import CONFIG_VARIABLE, to_environment
from pagebus.settings.options import SERVICES, options
from pagebus.settings.structs import ServeSettings

log = logging.getLogger("pagebus.cli.launcher")

_AFTER_DRAIN_S = 5.0  # what a process may take beyond its own drain timeout before it is killed
_POLL_S = 0.05


class BusServer(Protocol):
    """The nats-server that the launcher watches, or the user's own, which it does not."""

    async def start(self) -> None:
        """Start, or start again with the same port, store and credentials."""

    async def stop(self) -> None:
        """End it."""

    async def wait(self) -> int:
        """Wait until it ends."""

    def url(self, role: str) -> str:
        """Where a role connects, credentials included."""


class OwnBus:
    """A bus that somebody else runs: NATS_URL."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def start(self) -> None:
        """It runs already."""

    async def stop(self) -> None:
        """It is not ours to stop."""

    async def wait(self) -> int:
        """Its end is not ours to notice; every service reconnects by itself."""
        await asyncio.Event().wait()
        return 0

    def url(self, role: str) -> str:
        """The same for every role but a client, which is told no password; several servers with commas."""
        return self._url if role != "client" else ",".join(map(_without_password, self._url.split(",")))


class Launcher:
    """One run of `pagebus serve`."""

    def __init__(self, settings: ServeSettings, listener: SharedListener) -> None:
        """`settings` name a model's directory and the port of `listener`, which gateways inherit."""
        self._settings = settings
        self._listener = listener
        self._processes: list[ServiceProcess] = []
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._fatal = ""
        self._status_file: Path | None = None

    async def run(self) -> int:
        """Start all, say when all is ready, serve until a signal, stop all; the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal)
        restarts = Restarts(status_file.runtime_dir(), self._listener.port)
        loop.add_signal_handler(signal.SIGUSR1, restarts.on_signal)
        with tempfile.TemporaryDirectory(prefix="pagebus-") as directory:
            bus = _bus()
            await bus.start()
            watch = asyncio.create_task(self._keep_bus(bus), name="watch nats-server")
            announce = asyncio.create_task(self._announce(bus), name="announce")
            tasks = [watch, announce]
            try:
                await self._start(bus, Path(directory))

                async def restart(request: Request, tell: Callable[[str], None]) -> str:
                    return await self._restart(request, bus, Path(directory), tell)

                tasks.append(asyncio.create_task(restarts.serve(restart), name="restarts"))
                await self._stop.wait()
            finally:
                self._listener.close()  # the gateways' copies close when they drain
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                restarts.forget()
                self._forget_status()
                await self._stop_all()
                await bus.stop()
        if self._fatal:
            raise CommandError(self._fatal)
        return ExitCode.OK

    async def _start(self, bus: BusServer, directory: Path) -> None:
        counts = {
            "executor": self._settings.executors,
            "scheduler": self._settings.schedulers,
            "gateway": self._settings.gateways,
        }
        for role, count in counts.items():
            for number in range(1, count + 1):
                process = self._make(role, number, bus, directory, self._on_fatal)
                self._processes.append(process)
                await process.start()
                if self._stop.is_set():
                    return

    def _make(
        self,
        role: str,
        number: int,
        bus: BusServer,
        directory: Path,
        on_fatal: Callable[[str], None],
        generation: int = 1,
    ) -> ServiceProcess:
        environment = service_environment(role, number, self._settings, bus.url(role), generation)
        pass_fds: tuple[int, ...] = ()
        if role == "gateway":
            pass_fds = (self._listener.fd,)
            environment[LISTEN_VARIABLE] = str(self._listener.fd)
        return ServiceProcess(
            role,
            number,
            service_command(role),
            environment,
            directory,
            on_fatal,
            pass_fds=pass_fds,
            generation=generation,
        )

    async def _restart(
        self, request: Request, bus: BusServer, directory: Path, tell: Callable[[str], None]
    ) -> str:
        """Replace every process, one after the other; why that went wrong, or ""."""
        alone = set()
        if request.overlap is False or (request.overlap is None and needs_room(self._settings)):
            alone = {"executor"}

        def make(old: ServiceProcess, on_fatal: Callable[[str], None]) -> ServiceProcess:
            return self._make(old.role, old.number, bus, directory, on_fatal, old.generation + 1)

        return await replace_all(
            self._processes, make, tell, alone, grace_s=self._settings.drain_timeout_s + _AFTER_DRAIN_S
        )

    async def _keep_bus(self, bus: BusServer) -> None:
        backoff = Backoff()
        clock = asyncio.get_running_loop().time
        while True:
            started = clock()
            await bus.wait()
            wait_s = backoff.after(clock() - started)
            log.warning("nats-server ended and is started again", extra={"in_s": wait_s})
            await asyncio.sleep(wait_s)
            try:
                await bus.start()
            except Exception as error:
                log.error("nats-server cannot be started again", extra={"error": str(error)})

    async def _announce(self, bus: BusServer) -> None:
        """Once a gateway says that all is ready, tell the user and tools."""
        readiness = Readiness(0)
        while readiness.status != 200:
            await asyncio.sleep(_POLL_S)
            readiness = await ask(self._listener.host, self._listener.port)
        for process in self._processes:
            process.is_settled = True
        capacity = readiness.capacity or Capacity(0, 0, 0)
        nats_url = bus.url("client")
        self._write_status(nats_url, capacity)
        url, settings = self._listener.url, self._settings
        print(
            f"pagebus is ready at {url} with {settings.model_name}: {capacity.words()};"
            f" NATS clients at {nats_url}; try\n"
            + curl_command(url, settings.model_name, has_key=bool(settings.api_key)),
            flush=True,
        )

    def _write_status(self, nats_url: str, capacity: Capacity) -> None:
        status = status_file.Status(
            pid=os.getpid(),
            version=_version(),
            model=self._settings.model_name,
            url=self._listener.url,
            nats_url=nats_url,
            num_kv_tokens=capacity.num_tokens,
            max_model_len=capacity.max_model_len,
            executors=self._settings.executors,
            gateways=self._settings.gateways,
            schedulers=self._settings.schedulers,
        )
        try:
            self._status_file = status_file.write(status_file.runtime_dir(), self._listener.port, status)
        except OSError as error:
            log.warning("no status file for tools", extra={"error": str(error)})

    def _forget_status(self) -> None:
        if self._status_file:
            self._status_file.unlink(missing_ok=True)

    async def _stop_all(self) -> None:
        """Gateways first, so that streams end while there is somebody to end them; then down the line."""
        hurry = asyncio.create_task(self._hurry.wait(), name="hurry")
        for role in ("gateway", "executor", "scheduler"):
            ending = [
                asyncio.create_task(
                    process.stop(self._settings.drain_timeout_s + _AFTER_DRAIN_S, is_last=True)
                )
                for process in self._processes
                if process.role == role
            ]
            for task in ending:
                await asyncio.wait((task, hurry), return_when=asyncio.FIRST_COMPLETED)
            if self._hurry.is_set():
                for process in self._processes:
                    process.kill()
            await asyncio.gather(*ending)
        hurry.cancel()

    def _on_signal(self) -> None:
        """The first signal stops in order; the next one does not wait for streams."""
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    def _on_fatal(self, sentence: str) -> None:
        """Only the first sentence is told: what follows from it would hide it."""
        self._fatal = self._fatal or sentence
        self._hurry.set()
        self._stop.set()


def service_environment(
    role: str, number: int, settings: ServeSettings, nats_url: str, generation: int = 1
) -> dict[str, str]:
    """The environment of one service: its settings as variables, its own credentials, nothing on its argv."""
    own = {option.variable for option in options(SERVICES[role])}
    known = {option.variable for option in options(ServeSettings)} | {CONFIG_VARIABLE, NATS_VARIABLE}
    known |= {LISTEN_VARIABLE, "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"}
    environment = {key: value for key, value in os.environ.items() if key not in known}
    given = {key: value for key, value in to_environment(settings).items() if key in own}
    if settings.name:
        replaced = "" if generation == 1 else f"-{generation}"  # both are on the bus for a moment
        given["PAGEBUS_NAME"] = f"{settings.name}-{role}-{number}{replaced}"
    return (
        environment
        # The model is in a local directory by now: nothing that loads it needs to ask the hub.
        | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
        | given
        | {NATS_VARIABLE: nats_url}
    )


def _without_password(url: str) -> str:
    scheme, _, rest = url.strip().rpartition("://")
    return f"{scheme or 'nats'}://{rest.rpartition('@')[2]}"


def _bus() -> BusServer:
    url = os.environ.get(NATS_VARIABLE, "")
    if url:
        return OwnBus(url)
    from pagebus.cli.nats_server import EmbeddedNats

    make: Callable[[], BusServer] = EmbeddedNats
    return make()


def _version() -> str:
    try:
        return version("pagebus")
    except PackageNotFoundError:
        return ""
