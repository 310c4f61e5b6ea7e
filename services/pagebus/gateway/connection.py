"""One HTTP connection: uvicorn's protocol with limits on headers and time, and a way to drop it at once.

uvicorn bounds neither the size of a request's head nor how slowly head and body may come.
"""

import asyncio
import socket
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from pagebus.gateway.answering import ABORT, DIRECT
from pagebus.gateway.errors import ApiError

MAX_HEADERS = 100
MAX_HEAD_BYTES = 32 << 10
HEAD_TIMEOUT_S = 10.0
MESSAGE_TIMEOUT_S = 60.0
SEND_BUFFER_BYTES = 128 << 10
"""The kernel's share of what a client has not read; by itself it grows to megabytes."""


class _HeadTooLargeError(Exception):
    """Leaves the parser; what is sent is decided in `send_400_response`."""


class ChunkWriter:
    """Writes parts of one streamed response that has begun straight to its connection.

    What a part costs this way is about the system call; the server's own `send` costs as much again.
    """

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._flow = cycle.flow
        self._write = cycle.transport.write

    def write(self, data: bytes) -> bool:
        """Send a part now; False where that is not possible: `send` is to be awaited instead."""
        cycle = self._cycle
        if self._flow.write_paused or not cycle.chunked_encoding or cycle.disconnected:
            return False
        self._write(b"%x\r\n%b\r\n" % (len(data), data))
        return True


class GatewayConnection(HttpToolsProtocol):
    """A connection whose head must come within 10 s, and whose body within 60 s more."""

    _deadline: asyncio.TimerHandle | None = None
    _is_in_head = True
    _is_head_too_large = False
    _num_head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The first request's head is awaited."""
        super().connection_made(transport)
        sock = transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        self._set_deadline(HEAD_TIMEOUT_S)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is awaited any more."""
        self._set_deadline(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse, and refuse a head that does not end."""
        if self._is_in_head:
            self._num_head_bytes += len(data)
        super().data_received(data)
        if self._is_in_head and self._num_head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._is_head_too_large = True
            self.send_400_response("")

    def on_message_begin(self) -> None:
        """A request's first byte."""
        super().on_message_begin()
        self.scope["extensions"] = {ABORT: self.transport.abort}  # type: ignore[dict-item]
        if not self._is_in_head:  # not the connection's first request
            self._is_in_head = True
            self._num_head_bytes = 0
            self._set_deadline(HEAD_TIMEOUT_S)

    def on_headers_complete(self) -> None:
        """The head is whole: check it, then await the body."""
        self._is_in_head = False
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if len(self.headers) > MAX_HEADERS or size > MAX_HEAD_BYTES:
            self._is_head_too_large = True
            raise _HeadTooLargeError
        self._set_deadline(MESSAGE_TIMEOUT_S)
        super().on_headers_complete()
        if self.cycle is not None:
            self.scope["extensions"][DIRECT] = ChunkWriter(self.cycle)  # type: ignore[assignment]

    def on_message_complete(self) -> None:
        """The request is whole."""
        self._set_deadline(None)
        super().on_message_complete()

    def say_close(self, header: tuple[bytes, bytes]) -> None:
        """The answer under way is the connection's last one; where it has not begun, it says so."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            return
        if cycle.response_started:
            cycle.keep_alive = False
        else:
            cycle.default_headers = [*cycle.default_headers, header]

    def close_if_idle(self) -> None:
        """Close unless a request is on its way, or its answer."""
        is_coming = self._is_in_head and self._num_head_bytes > 0
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if not is_coming and not is_answering and not self.transport.is_closing():
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, or too large a head, in OpenAI's shape, and close."""
        if self._is_head_too_large:
            error = ApiError(
                431,
                f"the request's head exceeds {MAX_HEADERS} headers or {MAX_HEAD_BYTES} bytes",
                code="headers_too_large",
            )
        else:
            error = ApiError(400, "this is not a valid HTTP request", code="invalid_http")
        body = error.encode()
        head = (
            f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _set_deadline(self, after_s: float | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None
        if after_s is not None:
            self._deadline = self.loop.call_later(after_s, self.transport.abort)
