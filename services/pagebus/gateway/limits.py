"""The gateway's limits on what a client may send, and reading a body within them.

It knows sizes and times, nothing of what a body means.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from pagebus.gateway.errors import ApiError

Scope = MutableMapping[str, Any]
AsgiMessage = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[AsgiMessage]]
Send = Callable[[AsgiMessage], Awaitable[None]]

MAX_CHOICES = 128
"""Largest `n`."""
MAX_PROMPTS = 1024
"""Most prompts in one completion request; prompts times `n` may not exceed it either."""
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_LOGPROBS = 20
"""Most log-probabilities beside each token, as in vLLM."""
MAX_TOLD_LOGPROBS = 1 << 20
"""Most log-probabilities of prompts in one answer."""
MAX_LOGIT_BIAS = 1024
MAX_BAD_WORDS = 128
MAX_BAD_WORD_CHARS = 1024
MAX_BAD_WORD_TOKENS = 2048
"""Most tokens of all bad words together, each of them with and without a space before it."""
MAX_ALLOWED_TOKEN_IDS = 1 << 20
MAX_MESSAGES = 16_384
BODY_TIMEOUT_S = 30.0
DISCARD_TIMEOUT_S = 10.0
MAX_DISCARDED_BYTES = 128 << 20
"""How much of a body that is too large is read on, and for how long, before the connection is closed."""


class ClientGoneError(Exception):
    """The client closed its connection; there is nobody to answer."""


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first header of this (lower-case) name."""
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    for key, value in headers:
        if key == name:
            return value
    return None


async def read_body(scope: Scope, receive: Receive, max_bytes: int) -> bytes:
    """The whole body.

    Raises a 413 when it is too large, without buffering it, a 408 when it takes over 30 s, and
    `ClientGoneError`.
    """
    encoding = header(scope, b"content-encoding")
    if encoding is not None and encoding.strip().lower() not in (b"", b"identity"):
        raise ApiError(415, "send the body without content-encoding", code="unsupported_content_encoding")
    length = header(scope, b"content-length")
    if length is not None and length.isdigit() and (len(length) > 18 or int(length) > max_bytes):
        await _discard(receive)
        raise _too_large(max_bytes)
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return await _read(receive, max_bytes)
    except TimeoutError:
        raise ApiError(
            408, f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s", code="timeout"
        ) from None


async def _read(receive: Receive, max_bytes: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        part: bytes = message.get("body", b"")
        size += len(part)
        if size > max_bytes:
            if message.get("more_body", False):
                parts.clear()
                await _discard(receive)
            raise _too_large(max_bytes)
        parts.append(part)
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


async def _discard(receive: Receive) -> None:
    """Read on and forget, for a while: many clients look at an answer only when all is sent, and closing the
    connection before would show them a reset instead of the 413."""
    num_bytes = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_TIMEOUT_S):
            while num_bytes < MAX_DISCARDED_BYTES:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                num_bytes += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(413, f"the body exceeds the limit of {max_bytes} bytes", code="request_too_large")
