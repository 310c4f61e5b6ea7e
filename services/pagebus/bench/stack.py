"""A bus, a scheduler and an executor of one model as processes, and a requester on them, for benchmarks."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

from pagebus.bench.delay import slow_path
from pagebus.bus.nats_bus import NatsBus
from pagebus.cli.launcher import service_environment
from pagebus.cli.lifeline import LAUNCHER_VARIABLE
from pagebus.cli.nats_server import EmbeddedNats
from pagebus.cli.processes import service_command
from pagebus.requester.client import Requester
from pagebus.settings.structs import ServeSettings

READY_TIMEOUT_S = 300.0


class StackError(Exception):
    """The services did not come up."""


@contextlib.asynccontextmanager
async def stack(
    settings: ServeSettings,
    log: Path,
    more: Mapping[str, str] | None = None,
    *,
    message_delay_s: float = 0.0,
) -> AsyncIterator[Requester]:
    """A started requester, once an executor with the model is there; `log` gets what the services print.

    Every message takes `message_delay_s` longer. Raises `StackError`.
    """
    nats = EmbeddedNats()
    await nats.start()
    slow = contextlib.AsyncExitStack()
    find_url = nats.url
    processes: list[asyncio.subprocess.Process] = []
    bus: NatsBus | None = None
    try:
        if message_delay_s > 0.0:
            path = await slow.enter_async_context(slow_path(nats.url("tool"), message_delay_s))

            def find_url(role: str) -> str:
                return path.url(nats.url(role))

        with log.open("ab") as out:
            for role in ("executor", "scheduler"):
                environment = service_environment(role, 1, settings, find_url(role)) | dict(more or {})
                environment[LAUNCHER_VARIABLE] = str(os.getpid())  # their priorities are the launcher's
                processes.append(
                    await asyncio.create_subprocess_exec(
                        *service_command(role), env=environment, stdout=out, stderr=out
                    )
                )
        bus = await NatsBus.connect(find_url("tool"), name="bench")
        requester = Requester(bus, model=settings.model_name, instance=f"bench-{os.getpid()}")
        await requester.start()
        await _until_ready(requester, processes, log)
        yield requester
        await requester.close()
    finally:
        if bus is not None:
            await bus.close()
        for process in processes:
            if process.returncode is None:
                process.terminate()
        for process in processes:
            try:
                await asyncio.wait_for(process.wait(), 15)
            except TimeoutError:
                process.kill()
                await process.wait()
        await slow.aclose()
        await nats.stop()


async def _until_ready(requester: Requester, processes: list[asyncio.subprocess.Process], log: Path) -> None:
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            while requester.heartbeat is None or requester.heartbeat.num_executors < 1:
                if any(process.returncode is not None for process in processes):
                    raise StackError(f"a service ended at its start: {_last_words(log)}")
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise StackError(f"no executor after {READY_TIMEOUT_S:g} s: {_last_words(log)}") from None


def _last_words(log: Path) -> str:
    return log.read_text(errors="replace")[-1000:]
