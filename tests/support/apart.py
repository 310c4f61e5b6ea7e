"""Each service as a process of its own on an own nats-server, to be killed and started one by one."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path

from pagebus.cli.nats_server import EmbeddedNats
from tests.support.nats import running_server
from tests.support.serve import free_port


class Apart:
    """The processes by name: `gateway-1`, `scheduler`, `executor`, ..."""

    def __init__(self, folder: Path, nats: EmbeddedNats, flags: dict[str, tuple[str, ...]]) -> None:
        self.nats = nats
        self.flags = flags
        self.ports: dict[str, int] = {}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._folder = folder

    def start(self, name: str) -> None:
        """Start a service, or start it again."""
        role = name.split("-")[0]
        arguments = [sys.executable, "-m", "pagebus.cli", role, "--name", name, *self.flags.get(role, ())]
        if role == "gateway":
            port = self.ports.setdefault(name, free_port())
            arguments += ["--port", str(port)]
        with (self._folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                arguments,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "NATS_URL": self.nats.url(role), "OMP_NUM_THREADS": "1"},
            )

    def kill(self, *names: str, how: signal.Signals = signal.SIGKILL) -> None:
        """Kill services, all at once."""
        for name in names:
            self.processes[name].send_signal(how)
        for name in names:
            self.processes[name].wait(40)

    def url(self, gateway: str) -> str:
        return f"http://127.0.0.1:{self.ports[gateway]}"

    def wait_ready(self, gateway: str, timeout_s: float = 90.0) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            url = self.url(gateway) + "/ready"
            with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
            if self.processes[gateway].poll() is not None:
                break
            time.sleep(0.05)
        raise AssertionError(f"{gateway} is not ready:\n{self.logs()}")

    def logs(self) -> str:
        """What all services printed."""
        return "\n".join(f"== {path.name}\n{path.read_text()}" for path in self._folder.glob("*.log"))


@contextlib.asynccontextmanager
async def apart(
    folder: Path, *names: str, flags: dict[str, tuple[str, ...]] | None = None
) -> AsyncIterator[Apart]:
    """These services, ready; all ended afterwards."""
    async with running_server() as nats:
        house = Apart(folder, nats, flags or {})
        try:
            for name in names:
                house.start(name)
            for name in names:
                if name.startswith("gateway"):
                    house.wait_ready(name)
            yield house
        finally:
            for process in house.processes.values():
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                process.wait()
