"""The outermost ASGI layer: request ids in and out, keys, and the last exception boundary.

It looks at the raw scope only and knows no route but those that need no key.
"""

import logging
from collections.abc import Awaitable

from starlette.types import ASGIApp

from pagebus.gateway.auth import Keys
from pagebus.gateway.errors import ApiError
from pagebus.gateway.limits import AsgiMessage, Receive, Scope, Send, header
from pagebus.gateway.request_ids import echoed_request_id
from pagebus.gateway.responder import send_error

_log = logging.getLogger(__name__)


class Boundary:
    """Wraps the application."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or answer it with an error."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # a WebSocket: refused before it opens
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        request_id = echoed_request_id(header(scope, b"x-request-id")).encode()
        is_started = False

        def tagged(message: AsgiMessage) -> Awaitable[None]:
            nonlocal is_started
            if message["type"] == "http.response.start":
                is_started = True
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
            return send(message)

        if not self._keys.allow(scope["path"], scope["headers"]):
            error = ApiError(401, "send a valid key as 'Authorization: Bearer KEY'", code="invalid_api_key")
            await send_error(tagged, error, [(b"www-authenticate", b"Bearer")])
            return
        try:
            await self._app(scope, receive, tagged)
        except Exception:
            if is_started:
                raise
            _log.exception("%s failed", scope["path"][:200])
            await send_error(tagged, ApiError(500, "the gateway failed to process this request"))
