"""Where a connection's answers arrive: one wildcard subscription, one subject a request.

Knows how to wait for one answer or for several; what is asked, and of whom, is the caller's business.
"""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Protocol

from pagebus.bus.protocol import Handler, Msg, NoRespondersError, NotConnectedError, RequestTimeoutError


class Connection(Protocol):
    """What an inbox needs of its bus."""

    async def publish(
        self, subject: str, data: bytes, *, reply: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        """Send once."""

    async def subscribe(self, subject: str, handler: Handler) -> object:
        """Deliver messages on `subject` to `handler`."""


class Inbox:
    """The answers of one connection. Those who wait learn at once that the connection broke."""

    def __init__(self, connection: Connection, prefix: str) -> None:
        """Answers arrive below `prefix`, in a part that nobody else has."""
        self._connection = connection
        self._subject = f"{prefix}.{secrets.token_hex(8)}"
        self._opening = asyncio.Lock()
        self._is_open = False
        self._num_requests = 0
        self._waiting: dict[str, asyncio.Queue[Msg | None]] = {}  # None: the connection broke

    async def request(
        self, subject: str, data: bytes, *, timeout_s: float, headers: Mapping[str, str] | None = None
    ) -> Msg:
        """Send and wait for one answer.

        Raises `NoRespondersError`, `RequestTimeoutError`, `NotConnectedError`.
        """
        async with aclosing(
            self.request_many(subject, data, timeout_s=timeout_s, headers=headers)
        ) as answers:
            async for answer in answers:
                return answer
        raise NotConnectedError("the bus was lost while waiting for an answer")

    async def request_many(
        self, subject: str, data: bytes, *, timeout_s: float, headers: Mapping[str, str] | None = None
    ) -> AsyncGenerator[Msg, None]:
        """Send and give every answer; the caller stops when it has seen the last one.

        `timeout_s` is the longest wait for each of them. Raises as `request` does.
        """
        await self._open()
        self._num_requests += 1
        reply = f"{self._subject}.{self._num_requests}"
        answers: asyncio.Queue[Msg | None] = asyncio.Queue()
        self._waiting[reply] = answers
        try:
            await self._connection.publish(subject, data, reply=reply, headers=headers)
            while True:
                try:
                    answer = await asyncio.wait_for(answers.get(), timeout_s)
                except TimeoutError:
                    raise RequestTimeoutError(f"no answer on {subject} within {timeout_s} s") from None
                if answer is None:
                    raise NotConnectedError("the bus was lost while waiting for an answer")
                if answer.is_no_responders:
                    raise NoRespondersError(f"nobody listens on {subject}")
                yield answer
        finally:
            del self._waiting[reply]

    def fail(self) -> None:
        """The connection broke: core NATS will not bring what is still under way."""
        for answers in self._waiting.values():
            answers.put_nowait(None)

    async def _open(self) -> None:
        """Subscribe once, whoever asks first."""
        if self._is_open:
            return
        async with self._opening:
            if not self._is_open:
                await self._connection.subscribe(f"{self._subject}.*", self._take)
                self._is_open = True

    def _take(self, message: Msg) -> None:
        answers = self._waiting.get(message.subject)
        if answers is not None:
            answers.put_nowait(message)
