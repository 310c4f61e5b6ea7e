"""Sends one HTTP response over ASGI: JSON, an error, or the head of a stream; and watches for a client that
leaves."""

import asyncio
import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import msgspec

from pagebus.gateway.errors import ApiError
from pagebus.gateway.limits import AsgiMessage, ClientGoneError, Receive, Scope, Send

_log = logging.getLogger(__name__)

Headers = Sequence[tuple[bytes, bytes]]


async def send_bytes(send: Send, status: int, body: bytes, headers: Headers = ()) -> None:
    """A whole response with a JSON body."""
    head = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *headers,
    ]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def send_json(send: Send, status: int, value: msgspec.Struct) -> None:
    """A whole response from a struct."""
    await send_bytes(send, status, msgspec.json.encode(value))


async def send_error(send: Send, error: ApiError, headers: Headers = ()) -> None:
    """A whole response from an error."""
    await send_bytes(send, error.status, error.encode(), [*error.headers, *headers])


@contextlib.asynccontextmanager
async def watching(receive: Receive, on_gone: Callable[[], None]) -> AsyncIterator[None]:
    """While inside, `on_gone` is called once when the client closes its connection."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        on_gone()

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()


class Endpoint(ABC):
    """A raw ASGI route with its own exception boundary: what goes wrong ends this request alone."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        is_started = False

        def tracked(message: AsgiMessage) -> Awaitable[None]:
            nonlocal is_started
            is_started = True
            return send(message)

        try:
            await self.answer(scope, receive, tracked)
        except ClientGoneError:
            return
        except Exception as error:
            if is_started:  # too late for a status: the server drops the connection
                raise
            if isinstance(error, ApiError):
                await send_error(send, error)
                return
            _log.exception("%s failed", scope["path"][:200])
            await send_error(send, ApiError(500, "the gateway failed to process this request"))

    @abstractmethod
    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or raise `ApiError` before the response has begun."""
