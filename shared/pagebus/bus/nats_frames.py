"""Takes messages out of what a NATS server sends, before nats-py sees it: MSG and HMSG go straight to the
connection's handlers, in the turn of the loop in which they come; all other lines go on as they are.

Knows frames, nothing of subscriptions.
"""

import asyncio
from collections.abc import Callable

Take = Callable[[int, bytes, bytes, bytes, bytes], None]
"""Gets a message: subscription number, subject, reply subject, payload, header block."""

_MAX_LINE = 8192  # the server's own bound is 4096
_NUM_SIZES = {b"MSG": 1, b"HMSG": 2}
_M, _H = b"MH"
_CRLF = 2


class FrameProtocol(asyncio.Protocol):
    """Stands in front of a connection's protocol. What is no frame drops the connection."""

    def __init__(self, inner: asyncio.Protocol, transport: asyncio.BaseTransport, take: Take) -> None:
        """`take` must not raise."""
        self._inner = inner
        self._transport = transport
        self._take = take
        self._rest = bytearray()  # of a frame that is not whole
        self._num_wanted = 0  # bytes that it has when it is; 0: not known yet

    def data_received(self, data: bytes) -> None:
        """Whole frames are handled now, the rest when more comes."""
        rest = self._rest
        if rest:
            rest += data
            if len(rest) < self._num_wanted:
                return
            data = bytes(rest)
            rest.clear()
        try:
            at = self._take_frames(data)
        except ValueError:
            self._drop()
            return
        if at < len(data):
            rest += data[at:] if at else data

    def _take_frames(self, data: bytes) -> int:
        """Where the first frame begins that is not whole. Raises `ValueError`."""
        at, size, take = 0, len(data), self._take
        self._num_wanted = 0
        while at < size:
            first = data[at]
            if first != _M and first != _H:
                end = data.find(b"\n", at) + 1
                if not end:
                    return at  # of any length: a server of a large cluster tells of all others
                self._inner.data_received(data[at:end])
                at = end
                continue
            end = data.find(b"\r\n", at, at + _MAX_LINE)
            if end < 0:
                if size - at >= _MAX_LINE:
                    raise ValueError("a line without end")
                return at
            words = data[at:end].split(b" ")
            num_sizes = _NUM_SIZES.get(words[0], 0)
            num_replies = len(words) - 3 - num_sizes
            if not num_sizes or not 0 <= num_replies <= 1:
                raise ValueError("not a message")
            begin = end + _CRLF
            num_head = int(words[-2]) if num_sizes == 2 else 0
            num_bytes = int(words[-1])
            if not 0 <= num_head <= num_bytes:
                raise ValueError("no sizes of a message")
            stop = begin + num_bytes
            if stop + _CRLF > size:
                self._num_wanted = stop + _CRLF - at
                return at
            body = begin + num_head
            reply = words[3] if num_replies else b""
            take(int(words[2]), words[1], reply, data[body:stop], data[begin:body])
            at = stop + _CRLF
        return at

    def _drop(self) -> None:
        """What follows cannot be read: begin again with a new connection."""
        if isinstance(self._transport, asyncio.WriteTransport):
            self._transport.abort()

    def eof_received(self) -> bool | None:
        """The connection's own business, as all that follows."""
        return self._inner.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """As above."""
        self._inner.connection_lost(exc)

    def pause_writing(self) -> None:
        """As above."""
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        """As above."""
        self._inner.resume_writing()
