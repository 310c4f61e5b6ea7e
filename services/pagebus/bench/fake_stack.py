"""All services with a fake model as processes, behind a bus that lets a benchmark see every message."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from pagebus.cli.launcher import service_environment
from pagebus.cli.lifeline import LAUNCHER_VARIABLE
from pagebus.cli.nats_server import EmbeddedNats, free_port
from pagebus.cli.processes import service_command
from pagebus.settings.structs import ServeSettings

_CONFIGURATION = """
host: $PAGEBUS_NATS_HOST
port: $PAGEBUS_NATS_PORT
max_payload: 8MB
jetstream { store_dir: $PAGEBUS_NATS_STORE }
authorization { users: [
  { user: gateway, password: $PAGEBUS_NATS_GATEWAY_PASSWORD }
  { user: scheduler, password: $PAGEBUS_NATS_SCHEDULER_PASSWORD }
  { user: executor, password: $PAGEBUS_NATS_EXECUTOR_PASSWORD }
  { user: client, password: $PAGEBUS_NATS_CLIENT_PASSWORD }
] }
"""
_READY_TIMEOUT_S = 60.0


NAME = "bench"
"""What the names of the services' instances begin with: `bench-gateway-1`."""


class FakeStackError(Exception):
    """The services did not come up."""


@dataclass
class FakeStack:
    """What runs. `pids` by role, the bus's server among them."""

    settings: ServeSettings
    nats_url: str
    pids: dict[str, int] = field(default_factory=dict)

    @property
    def port(self) -> int:
        """The gateway's."""
        return self.settings.port

    @property
    def model(self) -> str:
        """Its name."""
        return self.settings.model_name


@contextlib.asynccontextmanager
async def fake_stack(*, resume: bool = True, stream_interval: int = 0) -> AsyncIterator[FakeStack]:
    """A gateway, a scheduler and an executor, once they are ready. Raises `FakeStackError`."""
    settings = ServeSettings(
        fake=True,
        max_model_len=4096,
        port=free_port(),
        resume=resume,
        stream_interval=stream_interval,
        log_level="warning",
        name=NAME,
    )
    with TemporaryDirectory() as folder:
        configuration, log = Path(folder) / "open.conf", Path(folder) / "services.log"
        configuration.write_text(_CONFIGURATION)
        nats = EmbeddedNats(configuration=configuration)
        await nats.start()
        processes: list[asyncio.subprocess.Process] = []
        stack = FakeStack(settings, nats.url("client"), {"nats-server": nats.pid})
        try:
            with log.open("ab") as out:
                for role in ("executor", "scheduler", "gateway"):
                    environment = service_environment(role, 1, settings, nats.url(role))
                    environment[LAUNCHER_VARIABLE] = str(os.getpid())  # their priorities are the launcher's
                    process = await asyncio.create_subprocess_exec(
                        *service_command(role), env=environment, stdout=out, stderr=out
                    )
                    processes.append(process)
                    stack.pids[role] = process.pid
            await _until_ready(settings.port, log)
            yield stack
        finally:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
            await nats.stop()


async def _until_ready(port: int, log: Path) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_READY_TIMEOUT_S):
            while True:
                with contextlib.suppress(OSError):
                    reader, writer = await asyncio.open_connection("127.0.0.1", port)
                    writer.write(b"GET /ready HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n\r\n")
                    answer = await reader.read()
                    writer.close()
                    if answer.startswith(b"HTTP/1.1 200"):
                        return
                await asyncio.sleep(0.05)
    raise FakeStackError(f"the services did not come up: {_last_words(log)}")


def _last_words(log: Path) -> str:
    return log.read_text(errors="replace")[-1000:]
