"""The gateway service: loads the text layer, starts the requester, serves HTTP until told to stop.

It knows which parts there are and in which order they start and stop, nothing of what they do.
"""

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path

from pagebus.bus.protocol import Bus
from pagebus.gateway.context import GatewayContext
from pagebus.gateway.nats_api import NatsApi
from pagebus.gateway.server import listen, make_context, serve
from pagebus.gateway.stored_streams import StoredStreams
from pagebus.gateway.tokenizer import Tokenizer
from pagebus.gateway.tracing import Telemetry
from pagebus.requester.client import Requester
from pagebus.settings.structs import GatewaySettings

_LED_TIMEOUT_S = 3.0
_BEAT_S = 0.6
"""A leader that is there is heard within so long."""
_POLL_S = 0.02


async def run(
    settings: GatewaySettings,
    bus: Bus,
    path: Path,
    name: str,
    stop: asyncio.Event,
    telemetry: Telemetry | None = None,
    *,
    reuse_port: bool = False,
    listener: socket.socket | None = None,
    on_listening: Callable[[str, int], None] | None = None,
    on_ready: Callable[[], None] = lambda: None,
    drain_grace_s: float | None = None,
    is_last: Callable[[], bool] = lambda: False,
) -> None:
    """Serve the model in `path` until `stop` is set, then drain.

    `name` is the instance on the bus. Takes over a bound `listener` if given; others may serve it too, so
    nothing is accepted before a leader has said how long requests may be. `on_listening` is told host and
    port, `on_ready` is called once connections are accepted. Raises `OSError` for a port in use,
    `TokenizerLoadError` for broken model files. `is_last`, asked at the end: nobody comes after.
    """
    sock = listener or listen(settings.host, settings.port, reuse_port=reuse_port)
    try:
        template = Path(settings.chat_template) if settings.chat_template else None
        tokenizer = await asyncio.to_thread(Tokenizer.load, path, template)
        requester = Requester(
            bus, model=settings.model_name, instance=name, stream_interval=settings.stream_interval
        )
        await requester.start()
        try:
            streams = StoredStreams(bus, requester) if settings.resume else None
            if streams is not None:
                await streams.start()
            context = make_context(settings, bus, requester, tokenizer, telemetry, streams)
            if on_listening is not None:
                address = sock.getsockname()
                on_listening(address[0], address[1])
            await _until_led(context, stop, _LED_TIMEOUT_S if listener else _BEAT_S)
            api = NatsApi(context, bus, settings.model_name)
            await api.start()
            try:
                grace_s = settings.drain_timeout_s if drain_grace_s is None else drain_grace_s
                await serve(context, sock, stop, grace_s, on_ready=on_ready, leave=api.leave, is_last=is_last)
            finally:
                await api.close()
                if streams is not None:
                    await streams.close()
        finally:
            await requester.close()
            tokenizer.close()
    finally:
        sock.close()


async def _until_led(context: GatewayContext, stop: asyncio.Event, timeout_s: float) -> None:
    """Until a request would be taken: other gateways of socket and queue group take them meanwhile."""
    loop = asyncio.get_running_loop()
    end_s = loop.time() + timeout_s
    while not (context.generations.max_model_len or stop.is_set() or loop.time() > end_s):  # noqa: ASYNC110
        await asyncio.sleep(_POLL_S)
