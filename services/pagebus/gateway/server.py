"""Serves HTTP on a socket until told to stop, then drains; and the parts that all routes share.

It knows uvicorn and the application, not where models and requesters come from.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable

import uvicorn

from pagebus.bus.protocol import Bus
from pagebus.gateway.app import build_app
from pagebus.gateway.auth import Keys
from pagebus.gateway.connection import GatewayConnection
from pagebus.gateway.context import GatewayContext
from pagebus.gateway.counters import Counters
from pagebus.gateway.draining import DrainingServer
from pagebus.gateway.generations import Generations
from pagebus.gateway.progress import ProgressWatch
from pagebus.gateway.sampling_params import SamplingDefaults, read_defaults
from pagebus.gateway.sse import StreamClock
from pagebus.gateway.stored_streams import StoredStreams
from pagebus.gateway.submitter import Submitter
from pagebus.gateway.tokenizer import Tokenizer
from pagebus.gateway.tracing import NoTelemetry, Telemetry
from pagebus.settings.structs import GatewaySettings

_SHUTTING_DOWN = "this gateway is shutting down; a stored stream goes on at any other one"
_KEEP_ALIVE_S = 65
_BACKLOG = 2048


def listen(host: str, port: int, *, reuse_port: bool = False) -> socket.socket:
    """A bound socket (port 0: a free one); `reuse_port` lets several gateways share it. Raises `OSError`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.create_server((host, port), family=family, backlog=_BACKLOG, reuse_port=reuse_port)
    bound.setblocking(False)
    return bound


def make_context(
    settings: GatewaySettings,
    bus: Bus,
    submitter: Submitter,
    tokenizer: Tokenizer,
    telemetry: Telemetry | None = None,
    streams: StoredStreams | None = None,
) -> GatewayContext:
    """The parts that every way into the gateway shares, from its settings."""
    counters = Counters()
    generations = Generations(
        submitter,
        tokenizer,
        counters,
        model=settings.model_name,
        max_model_len=settings.max_model_len,
    )
    return GatewayContext(
        served_names=settings.served_model_name or (settings.model_name,),
        bus=bus,
        submitter=submitter,
        tokenizer=tokenizer,
        generations=generations,
        progress=ProgressWatch(submitter, generations),
        counters=counters,
        keys=Keys(settings.api_key),
        clock=StreamClock(settings.keep_alive_interval_s, settings.slow_reader_timeout_s),
        max_body_bytes=settings.max_body_bytes,
        request_timeout_s=settings.request_timeout_s,
        defaults=(
            read_defaults(tokenizer.generation_config)
            if settings.generation_config == "auto"
            else SamplingDefaults()
        ),
        telemetry=telemetry or NoTelemetry(),
        streams=streams,
    )


async def serve(
    context: GatewayContext,
    sock: socket.socket,
    stop: asyncio.Event,
    drain_grace_s: float,
    *,
    on_ready: Callable[[], None] = lambda: None,
    leave: Callable[[], Awaitable[None]] | None = None,
    is_last: Callable[[], bool] = lambda: False,
) -> None:
    """Serve HTTP on a bound socket until `stop`; then accept nothing new, let running answers end, and end
    those that are left after the grace with an error event, so that their clients resume elsewhere.

    `leave` is awaited first then: other ways in close there. `is_last`: idle connections need not stay open.
    """
    server = DrainingServer(
        uvicorn.Config(
            build_app(context),
            http=GatewayConnection,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
        ),
        drain_grace_s,
    )
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    stopping = asyncio.create_task(stop.wait())
    progress = asyncio.create_task(context.progress.watch())
    try:
        while not server.started and not serving.done():  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.01)
        on_ready()
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        progress.cancel()
        stopping.cancel()
        context.generations.is_draining = True
        server.is_last = is_last()
        server.should_exit = True
        hurry = asyncio.get_running_loop().call_later(
            drain_grace_s, context.generations.fail_all, "server_shutting_down", _SHUTTING_DOWN
        )
        try:
            if leave is not None:
                await leave()
            await serving
            await _until_idle(context.generations)
        finally:
            hurry.cancel()


async def _until_idle(generations: Generations) -> None:
    """What runs without an HTTP connection may end too; after the grace it was ended."""
    while generations.num_live:  # noqa: ASYNC110
        await asyncio.sleep(0.05)
