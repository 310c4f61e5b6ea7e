"""Follows generations over NATS as a restricted client user: JSON requests out, JSON events in.

It knows the public subjects and events only, nothing of batches or blocks.
"""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import Self

import msgspec

from pagebus.bus import subjects
from pagebus.bus.messages import (
    AnyApiEvent,
    ApiAlive,
    ApiCancel,
    ApiDone,
    ApiError,
    ApiErrorBody,
    ApiTokens,
)
from pagebus.bus.nats_bus import NatsBus
from pagebus.bus.protocol import Bus, Msg, NoRespondersError, RequestTimeoutError
from pagebus.settings.structs import BUNDLED_MODEL_NAME

_SILENCE_S = 15.0
_ACCEPT_TIMEOUT_S = 5.0
_MAX_EVENTS_BEHIND = 100_000

Parameter = str | int | float | bool | None | Sequence[str] | Sequence[int] | Mapping[str, float]


class GenerationError(Exception):
    """The request ended with an error; `error` is its body in OpenAI's shape."""

    def __init__(self, error: ApiErrorBody) -> None:
        super().__init__(error.message)
        self.error = error


class Client:
    """A connection to a pagebus bus for one model.

    ```
    async with await Client.connect("nats://client:...@127.0.0.1:4222") as client:
        async for event in client.generate("What is 127 + 245?", max_tokens=20):
            print(event.text, end="")
    ```
    """

    def __init__(self, bus: Bus, model: str = BUNDLED_MODEL_NAME) -> None:
        self._bus = bus
        self._model = model

    @classmethod
    async def connect(cls, url: str, *, model: str = BUNDLED_MODEL_NAME) -> "Client":
        """Connect to `nats://user:password@host:port`; raises `BusError` when that fails for good."""
        return cls(await NatsBus.connect(url, name="pagebus-client"), model)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Leave the bus. Running requests go on; other readers keep following them."""
        await self._bus.close()

    async def generate(
        self,
        prompt: str | Sequence[int] | None = None,
        *,
        messages: Sequence[dict[str, str]] | None = None,
        request_id: str | None = None,
        **parameters: Parameter,
    ) -> AsyncGenerator[ApiTokens, None]:
        """Start a request and yield its tokens and text as they come.

        Give `prompt` (text or token ids) or `messages` (a chat). `parameters` are the HTTP interface's:
        max_tokens, temperature, top_p, top_k, stop, seed, n, ignore_eos, logit_bias, logprobs,
        prompt_logprobs, ... (an event's `logprobs` are those of its tokens; `prompt_logprobs` come first, in
        events without tokens). Raises `GenerationError` for an
        error, also when nobody serves the model or no sign of life came for 15 s. Leaving the loop cancels.
        """
        identity = request_id or secrets.token_hex(16)
        body: dict[str, object] = {"id": identity, **parameters}
        if messages is not None:
            body["messages"] = list(messages)
        else:
            body["prompt"] = prompt if isinstance(prompt, str) or prompt is None else list(prompt)
        is_over = False
        async with _Follower(self._bus, identity) as follower:
            await self._ask(identity, body)
            try:
                async for event in follower.events():
                    yield event
                is_over = True
            except GenerationError:
                is_over = True
                raise
            finally:
                if not is_over:
                    await self.cancel(identity)

    async def follow(self, request_id: str) -> AsyncIterator[ApiTokens]:
        """Follow a request that somebody else started, from now on, until it ends."""
        async with _Follower(self._bus, request_id) as follower:
            async for event in follower.events():
                yield event

    async def cancel(self, request_id: str) -> None:
        """Stop a request."""
        await self._bus.publish(
            subjects.api_cancel(self._model), msgspec.json.encode(ApiCancel(id=subjects.part(request_id)))
        )

    async def _ask(self, identity: str, body: dict[str, object]) -> None:
        try:
            answer = await self._bus.request(
                subjects.api_generate(self._model), msgspec.json.encode(body), timeout_s=_ACCEPT_TIMEOUT_S
            )
        except NoRespondersError:
            raise _error(f"nobody serves the model {self._model!r} on this bus", "no_gateway") from None
        except RequestTimeoutError:
            raise _error(f"no gateway answered for request {identity}", "no_answer") from None
        event = msgspec.json.decode(answer.data, type=AnyApiEvent)
        if isinstance(event, ApiError):
            raise GenerationError(event.error)


class _Follower:
    """A subscription to one request's events, with a bounded buffer."""

    def __init__(self, bus: Bus, request_id: str) -> None:
        self._bus = bus
        self._request_id = request_id
        self._queue: asyncio.Queue[AnyApiEvent] = asyncio.Queue(_MAX_EVENTS_BEHIND)

    async def __aenter__(self) -> Self:
        self._subscription = await self._bus.subscribe(subjects.stream(self._request_id), self._take)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(Exception):
            await self._subscription.unsubscribe()

    def _take(self, msg: Msg) -> None:
        with contextlib.suppress(asyncio.QueueFull):  # the gap in the index ends the stream in `events`
            self._queue.put_nowait(msgspec.json.decode(msg.data, type=AnyApiEvent))

    async def events(self) -> AsyncIterator[ApiTokens]:
        """The tokens until the end; raises `GenerationError` for an error, a gap, or silence."""
        have: dict[int, int] = {}
        while True:
            try:
                event = await asyncio.wait_for(self._queue.get(), _SILENCE_S)
            except TimeoutError:
                raise _error(f"no sign of life for {_SILENCE_S:.0f} s", "silent") from None
            match event:
                case ApiTokens():
                    expected = have.get(event.choice, event.index)
                    if event.index != expected:
                        lost = f"tokens {expected} to {event.index} of choice {event.choice} were lost"
                        raise _error(lost, "gap")
                    have[event.choice] = event.index + len(event.token_ids)
                    yield event
                case ApiError():
                    raise GenerationError(event.error)
                case ApiDone():
                    return
                case ApiAlive():
                    continue


def _error(message: str, code: str) -> GenerationError:
    return GenerationError(ApiErrorBody(message=message, type="server_error", code=code))
