"""A gateway, a scheduler and an executor with the fake model in one process, on a bus in its memory:
`python -m pagebus.bench.fake_process SETTINGS`.

What `pagebus bench hops` holds against the same services as processes. It says `{}` once it is ready.
"""

import asyncio
import contextlib
import dataclasses
import gc
import sys
from collections.abc import AsyncIterator

import msgspec

from pagebus.bench.fake_stack import FakeStackError
from pagebus.bus.memory import MemoryBroker
from pagebus.cli.nats_server import free_port
from pagebus.executor import service as executor_service
from pagebus.gateway import service as gateway_service
from pagebus.scheduler import service as scheduler_service
from pagebus.settings.model_files import resolve_model
from pagebus.settings.structs import ServeSettings


@contextlib.asynccontextmanager
async def fake_process(settings: ServeSettings) -> AsyncIterator[int]:
    """The process; its port. Raises `FakeStackError`."""
    settings = dataclasses.replace(settings, port=free_port())
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "pagebus.bench.fake_process",
        msgspec.json.encode(settings).decode(),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        if process.stdout is None or not await process.stdout.readline():
            raise FakeStackError("the services in one process did not come up")
        yield settings.port
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def serve(settings: ServeSettings) -> None:
    """Until the process is ended."""
    broker, stop = MemoryBroker(), asyncio.Event()
    path = resolve_model(settings)

    def ready() -> None:
        gc.collect()
        gc.freeze()
        print("{}", flush=True)

    await asyncio.gather(
        scheduler_service.run(settings, broker.connect("scheduler"), "scheduler", stop),
        executor_service.run(settings, broker.connect("executor"), path, "executor", stop),
        gateway_service.run(settings, broker.connect("gateway"), path, "gateway", stop, on_ready=ready),
    )


if __name__ == "__main__":
    import uvloop

    uvloop.run(serve(msgspec.json.decode(sys.argv[1], type=ServeSettings)))
