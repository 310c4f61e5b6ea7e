"""Asks a gateway whether all is ready, and puts what it says into words."""

import asyncio
import json
import shlex
from dataclasses import dataclass

_TIMEOUT_S = 2.0
_MAX_BYTES = 65_536


@dataclass(frozen=True)
class Capacity:
    """What the KV pools of all executors hold together."""

    num_blocks: int
    block_size: int  # tokens
    max_model_len: int  # tokens, as lowered to what the pool holds
    full_model_len: int = 0  # before that; 0: not known

    @property
    def num_tokens(self) -> int:
        """Tokens that fit."""
        return self.num_blocks * self.block_size

    def words(self) -> str:
        """`KV cache 65,536 tokens = 8 full-length requests of 8,192`."""
        if not self.num_blocks or not self.max_model_len:
            return "KV cache of unknown size"
        num_requests = self.num_tokens // self.max_model_len
        requests = f"{num_requests:,} full-length request{'' if num_requests == 1 else 's'}"
        words = f"KV cache {self.num_tokens:,} tokens = {requests} of {self.max_model_len:,}"
        if self.max_model_len < self.full_model_len:
            words += f" (the context is lowered from {self.full_model_len:,}: the cache holds no more)"
        return words


@dataclass(frozen=True)
class Readiness:
    """One answer of GET /ready."""

    status: int  # HTTP status; 0: no answer
    capacity: Capacity | None = None
    reason: str = ""


async def ask(host: str, port: int) -> Readiness:
    """GET /ready once. Never raises: no answer is status 0."""
    try:
        return _parse(await asyncio.wait_for(_get(host, port), _TIMEOUT_S))
    except (OSError, TimeoutError, ValueError, asyncio.IncompleteReadError):
        return Readiness(0)


async def _get(host: str, port: int) -> bytes:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(b"GET /ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        await writer.drain()
        answer = b""
        while len(answer) < _MAX_BYTES and (part := await reader.read(_MAX_BYTES)):
            answer += part  # head and body may come apart; the gateway closes after them
        return answer
    finally:
        writer.close()


def _parse(answer: bytes) -> Readiness:
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1]) if head.startswith(b"HTTP/1.") else 0
    try:
        content = json.loads(body)
    except ValueError:
        return Readiness(status)
    if not isinstance(content, dict):
        return Readiness(status)
    reason = content.get("reason")
    return Readiness(
        status,
        _capacity(content),
        reason if isinstance(reason, str) else "",
    )


def _capacity(content: dict[str, object]) -> Capacity | None:
    match content:
        case {"num_blocks": int(blocks), "block_size": int(size), "max_model_len": int(length)}:
            full = content.get("full_model_len")
            return Capacity(blocks, size, length, full if isinstance(full, int) else 0)
        case _:
            return None


def curl_command(url: str, model: str, *, has_key: bool) -> str:
    """A chat request to paste into a shell."""
    body = {"model": model, "messages": [{"role": "user", "content": "What is 127 + 245?"}]}
    key = ' -H "authorization: Bearer $API_KEY"' if has_key else ""
    return (
        f"curl {url}/v1/chat/completions -H 'content-type: application/json'{key}"
        f" -d {shlex.quote(json.dumps(body))}"
    )
