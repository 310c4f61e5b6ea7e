"""Server-sent events: chunks in OpenAI's shapes from byte templates, and the writer of one stream.

The writer joins what came while the socket was busy, so a stream costs no task a token. It knows nothing of
tokens or of how requests run.
"""

import asyncio
from collections.abc import Callable
from typing import Protocol

import msgspec

from pagebus.gateway.answer_types import UsageBody
from pagebus.gateway.errors import ErrorBody, ErrorResponse
from pagebus.gateway.limits import ClientGoneError, Send

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
_TICK_S = 1.0

_encode = msgspec.json.Encoder().encode
_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


def encode_text(text: str) -> bytes:
    """A JSON string without any character that a client may take for a line's end."""
    encoded = _encode(text)
    return encoded if encoded.isascii() else encode_json(text)


def encode_json(value: str | msgspec.Struct) -> bytes:
    """JSON without any character that a client may take for a line's end."""
    encoded = _encode(value)
    if not encoded.isascii():
        encoded = encoded.replace(b"\xe2\x80\xa8", b"\\u2028").replace(b"\xe2\x80\xa9", b"\\u2029")
        encoded = encoded.replace(b"\xc2\x85", b"\\u0085")
    return encoded


def error_event(body: ErrorBody) -> bytes:
    """A stream that fails midway says so, and ends."""
    return b"data: " + _encode(ErrorResponse(body)) + b"\n\n" + DONE


class ChunkTemplate:
    """Chunks of one answer. `usage` is sent as null where the stream will end with it, else left out."""

    def __init__(
        self,
        *,
        answer_id: str,
        kind: str,
        created: int,
        model: str,
        fingerprint: str,
        is_chat: bool,
        usage: bool,
    ) -> None:
        self._head = (
            b'data: {"id":' + _encode(answer_id) + b',"object":' + _encode(kind)
            + b',"created":' + _encode(created) + b',"model":' + encode_text(model)
            + b',"system_fingerprint":' + _encode(fingerprint) + b',"choices":['
        )  # fmt: skip
        self._before = b',"delta":{"content":' if is_chat else b',"text":'
        self._after = b'},"logprobs":' if is_chat else b',"logprobs":'
        self._ending = b',"delta":{},"logprobs":null' if is_chat else b',"text":"","logprobs":null'
        self._no_usage = b',"usage":null' if usage else b""

    def role(self, choice: int, usage: UsageBody | None, beside: bytes = b"") -> bytes:
        """The first chunk of a chat's choice; `beside`: further members of the chunk, with a comma before
        each."""
        delta = b',"delta":{"role":"assistant","content":"","refusal":null},"logprobs":null'
        return self._chunk(choice, delta, b"null", usage, beside)

    def text(
        self,
        choice: int,
        text: str,
        usage: UsageBody | None,
        logprobs: bytes = b"null",
        more: bytes = b"",
    ) -> bytes:
        """New text of a choice, with its tokens' log-probabilities as JSON; `more`: further members of the
        choice, with a comma before each."""
        body = self._before + encode_text(text) + self._after + logprobs + more
        return self._chunk(choice, body, b"null", usage)

    def halves(self, choice: int) -> tuple[bytes, bytes]:
        """What stands before and after a text (`encode_text`) without anything beside it."""
        before, _, after = self.text(choice, "", None).partition(self._before + b'""')
        return before + self._before, after

    def finish(self, choice: int, reason: str, usage: UsageBody | None) -> bytes:
        """The last chunk of a choice."""
        return self._chunk(choice, self._ending, b'"' + reason.encode() + b'"', usage)

    def usage(self, usage: UsageBody) -> bytes:
        """The chunk without choices that ends a stream with `include_usage`."""
        return self._head + b'],"usage":' + _encode(usage) + b"}\n\n"

    def _chunk(
        self, choice: int, body: bytes, reason: bytes, usage: UsageBody | None, beside: bytes = b""
    ) -> bytes:
        tail = beside + (self._no_usage if usage is None else b',"usage":' + _encode(usage))
        return b'%b{"index":%d%b,"finish_reason":%b}]%b}\n\n' % (self._head, choice, body, reason, tail)


class DirectWriter(Protocol):
    """Writes parts of a response that has begun."""

    def write(self, data: bytes) -> bool:
        """Send a part now; False where `send` is to be awaited instead."""


class SseStream:
    """One stream to one client: `write` from callbacks, `run` in the request's own task."""

    def __init__(
        self, send: Send, abort: Callable[[], None] | None, direct: DirectWriter | None = None
    ) -> None:
        """`abort` drops the connection at once; without it the task is cancelled. `direct` takes most of
        what is written past this stream's task."""
        self.headers: list[tuple[bytes, bytes]] = list(_HEADERS)
        self._send = send
        self._abort = abort
        self._loop = asyncio.get_running_loop()
        self._parts: list[bytes] = []
        self._waiter: asyncio.Future[None] | None = None
        self._task: asyncio.Task[object] | None = None
        self._is_finished = False
        self._is_gone = False
        self._direct = direct
        self._is_direct = False  # nothing waits for the task, which waits itself
        self._has_written = False  # since the last tick
        self._sending_since_s: float | None = None
        self._last_sent_s = 0.0

    def write(self, data: bytes) -> None:
        """Send `data` as soon as the socket takes it."""
        if self._is_direct and self._direct is not None and self._direct.write(data):
            self._has_written = True
            return
        self._is_direct = False
        self._parts.append(data)
        self._wake()

    def finish(self) -> None:
        """Nothing follows what was written."""
        self._is_finished = True
        self._wake()

    def leave(self) -> None:
        """The client is gone: `run` raises `ClientGoneError`."""
        self._is_gone = True
        self._wake()

    async def run(self) -> None:
        """Send the head, then everything written, until `finish`. Raises `ClientGoneError`."""
        self._task = asyncio.current_task()
        await self._send_now({"type": "http.response.start", "status": 200, "headers": self.headers})
        while True:
            if not self._parts and not self._is_finished and not self._is_gone:
                self._waiter = self._loop.create_future()
                self._is_direct = self._direct is not None
                await self._waiter
                self._is_direct = False
            if self._is_gone:
                raise ClientGoneError
            data, is_last = b"".join(self._parts), self._is_finished
            self._parts.clear()
            await self._send_now({"type": "http.response.body", "body": data, "more_body": not is_last})
            if is_last:
                return

    def tick(self, now_s: float, keep_alive_s: float, slow_reader_s: float) -> None:
        """Called about once a second: cut off a client that does not read, keep a pausing stream alive."""
        if self._has_written:
            self._has_written = False
            self._last_sent_s = now_s
        if self._sending_since_s is not None:
            if now_s - self._sending_since_s > slow_reader_s:
                self._cut()
        elif self._last_sent_s and now_s - self._last_sent_s >= keep_alive_s and not self._is_finished:
            self.write(KEEP_ALIVE)

    async def _send_now(self, message: dict[str, object]) -> None:
        self._sending_since_s = self._last_sent_s = self._loop.time()
        await self._send(message)
        self._sending_since_s = None

    def _cut(self) -> None:
        self.leave()
        if self._abort is not None:
            self._abort()
        elif self._task is not None:
            self._task.cancel()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class StreamClock:
    """One timer for all streams of the process."""

    def __init__(self, keep_alive_interval_s: float, slow_reader_s: float) -> None:
        """A stream that pauses for `keep_alive_interval_s` gets a comment; a client that takes nothing for
        `slow_reader_s` is cut off."""
        self.keep_alive_interval_s = keep_alive_interval_s
        self.slow_reader_s = slow_reader_s
        self._tick_s = min(_TICK_S, keep_alive_interval_s / 4, slow_reader_s / 4)
        self._streams: set[SseStream] = set()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, stream: SseStream) -> None:
        """Watch a stream."""
        self._streams.add(stream)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._tick_s, self._tick)

    def discard(self, stream: SseStream) -> None:
        """Watch it no longer."""
        self._streams.discard(stream)

    def _tick(self) -> None:
        self._timer = None
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        for stream in list(self._streams):
            stream.tick(now_s, self.keep_alive_interval_s, self.slow_reader_s)
        if self._streams:
            self._timer = loop.call_later(self._tick_s, self._tick)
