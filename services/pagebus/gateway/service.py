"""The gateway service: loads the text layer, starts the requester, serves HTTP until told to stop.

It knows which parts there are and in which order they start and stop, nothing of what they do.
"""

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path

from pagebus.bus.protocol import Bus
from pagebus.gateway.nats_api import NatsApi
from pagebus.gateway.server import DRAIN_GRACE_S, listen, make_context, serve
from pagebus.gateway.tokenizer import Tokenizer
from pagebus.gateway.tracing import Telemetry
from pagebus.requester.client import Requester
from pagebus.settings.structs import GatewaySettings


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
    drain_grace_s: float = DRAIN_GRACE_S,
) -> None:
    """Serve the model in `path` until `stop` is set, then drain.

    `name` is the instance on the bus. Takes over a bound `listener` if given. `on_listening` is told host and
    port. Raises `OSError` for a port in use, `TokenizerLoadError` for broken model files.
    """
    sock = listener or listen(settings.host, settings.port, reuse_port=reuse_port)
    try:
        template = Path(settings.chat_template) if settings.chat_template else None
        tokenizer = await asyncio.to_thread(Tokenizer.load, path, template)
        requester = Requester(bus, model=settings.model_name, instance=name)
        await requester.start()
        try:
            context = make_context(settings, bus, requester, tokenizer, telemetry)
            if on_listening is not None:
                address = sock.getsockname()
                on_listening(address[0], address[1])
            api = NatsApi(context, bus, settings.model_name)
            await api.start()
            try:
                await serve(context, sock, stop, drain_grace_s)
            finally:
                await api.close()
        finally:
            await requester.close()
            tokenizer.close()
    finally:
        sock.close()
