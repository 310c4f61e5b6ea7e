"""An HTTP/1.1 client for load: kept-alive connections, server-sent events as they arrive, times for each.

It costs little enough not to be what is measured. It knows OpenAI's streams as far as counting needs.
"""

import asyncio
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

import httptools
import msgspec

_MAX_ERROR_BYTES = 2000
_CONNECT_TIMEOUT_S = 30.0


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None


class PromptDetails(msgspec.Struct):
    """Of a prompt: tokens that were read before and so cost nothing; None where the server does not tell."""

    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    """What the server says it counted."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: PromptDetails | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: Usage | None = None
    error: msgspec.Raw = msgspec.Raw()


_decode = msgspec.json.Decoder(_Chunk).decode


@dataclass(slots=True)
class Answer:
    """One request's outcome. Times are `time.perf_counter`'s; `text_times_s`: of each chunk with text."""

    sent_s: float
    end_s: float = 0.0
    status: int = 0  # 0: no answer came
    error: str = ""  # what went wrong, empty for a whole answer
    retry_after: str = ""
    text_times_s: list[float] = field(default_factory=list)
    usage: Usage | None = None
    text: list[str] = field(default_factory=list)


class _Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._answer: Answer | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._pending = b""
        self._is_done = False
        self.is_reusable = True

    async def fetch(self, request: bytes, answer: Answer) -> None:
        """Send a whole request and fill in its answer; errors stand there too."""
        self._answer = answer
        self._parser = httptools.HttpResponseParser(self)
        self._pending = b""
        self._is_done = False
        self._waiter = self._loop.create_future()
        self._transport.write(request)
        await self._waiter

    # -- asyncio ---------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Feed the parser; what it cannot read ends the connection."""
        if self._answer is None:
            self.close()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(f"no HTTP: {error}")
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        """Whatever is under way ends."""
        self.is_reusable = False
        self._end(f"connection lost: {error or 'closed by the server'}")

    def close(self) -> None:
        """Close it."""
        self.is_reusable = False
        self._transport.close()

    # -- httptools -------------------------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        """Only one header matters."""
        if self._answer is not None and name.lower() == b"retry-after":
            self._answer.retry_after = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """The status is known."""
        if self._answer is not None:
            self._answer.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        """Take the events that are complete; of an error its beginning."""
        answer = self._answer
        if answer is None:
            return
        if answer.status != 200:
            if len(answer.error) < _MAX_ERROR_BYTES:
                answer.error += data.decode(errors="replace")
            return
        *events, self._pending = (self._pending + data).split(b"\n\n")
        for event in events:
            for line in event.splitlines():
                if line.startswith(b"data:"):
                    self._take(line[5:].strip(), answer)

    def on_message_complete(self) -> None:
        """The answer is here."""
        self.is_reusable = self.is_reusable and self._parser.should_keep_alive()
        answer = self._answer
        if answer is not None and answer.status == 200 and not self._is_done and not answer.error:
            answer.error = "the stream ended without [DONE]"
        elif answer is not None and answer.status != 200:
            answer.error = answer.error or f"status {answer.status}"
        self._end("")

    # -- events ----------------------------------------------------------------------------------------------

    def _take(self, data: bytes, answer: Answer) -> None:
        if data == b"[DONE]":
            self._is_done = True
            return
        try:
            chunk = _decode(data)
        except msgspec.DecodeError as error:
            answer.error = f"an event cannot be read: {error}"
            return
        if chunk.error:
            answer.error = bytes(chunk.error).decode(errors="replace")[:_MAX_ERROR_BYTES]
        if chunk.usage is not None:
            answer.usage = chunk.usage
        for choice in chunk.choices:
            delta = choice.delta
            text = (
                choice.text if delta is None else delta.content or delta.reasoning_content or delta.reasoning
            )
            if text:
                answer.text_times_s.append(time.perf_counter())
                answer.text.append(text)

    def _end(self, error: str) -> None:
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.end_s = time.perf_counter()
            answer.error = answer.error or error
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class HttpClient:
    """Connections to one server, kept alive and used again."""

    def __init__(self, url: str, headers: Mapping[str, str]) -> None:
        """`url`: scheme, host and port. Raises `ValueError` for what is none."""
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is no URL such as http://127.0.0.1:8000")
        self._host, self._is_tls = parts.hostname, parts.scheme == "https"
        self._port = parts.port or (443 if self._is_tls else 80)
        self._path = parts.path.rstrip("/")
        lines = [f"host: {parts.netloc}", *(f"{name}: {value}" for name, value in headers.items())]
        self._headers = "\r\n".join(lines)
        self._idle: list[_Connection] = []
        self.num_connections = 0

    async def post(self, path: str, body: bytes, *, timeout_s: float) -> Answer:
        """One request and its whole answer; nothing is raised, what went wrong stands in the answer."""
        head = (
            f"POST {self._path}{path} HTTP/1.1\r\n{self._headers}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        return await self._fetch(head.encode() + body, timeout_s)

    async def _fetch(self, request: bytes, timeout_s: float) -> Answer:
        loop = asyncio.get_running_loop()
        answer = Answer(time.perf_counter())
        connection: _Connection | None = None
        try:
            async with asyncio.timeout(timeout_s):
                connection = await self._connected(loop)
                await connection.fetch(request, answer)
        except TimeoutError:
            answer.error = f"no whole answer within {timeout_s:g} s"
        except OSError as error:
            answer.error = f"cannot connect: {error}"
        answer.end_s = answer.end_s or time.perf_counter()
        if connection is not None:
            if connection.is_reusable and not answer.error.startswith("no whole"):
                self._idle.append(connection)
            else:
                connection.close()
        return answer

    async def _connected(self, loop: asyncio.AbstractEventLoop) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_reusable:
                return connection
        self.num_connections += 1
        context = ssl.create_default_context() if self._is_tls else None
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            _, made = await loop.create_connection(
                lambda: _Connection(loop), self._host, self._port, ssl=context
            )
        return made

    def close(self) -> None:
        """Close what is idle."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()
