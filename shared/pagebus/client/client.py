"""Follows generations over NATS as a restricted client user: JSON requests out, JSON events in.

It knows the public subjects and events only, nothing of batches or blocks.
"""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from itertools import chain, repeat
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
from pagebus.bus.protocol import (
    Bus,
    BusError,
    Msg,
    NoRespondersError,
    NotConnectedError,
    RequestTimeoutError,
)
from pagebus.client.reading import Reading
from pagebus.settings.structs import BUNDLED_MODEL_NAME

_SILENCE_S = 6.0
"""Without any sign of life, which comes every 2 s: the request's gateway may be gone."""
_GAP_S = 0.3
_MAX_GAP_PAUSE_S = 5.0
_RETRY_S = 1.0
_GIVE_UP_S = 120.0
_UNKNOWN_S = 10.0
"""How long gateways may say that they do not know the request: where it could not be stored, only the one
that runs it does."""
_BEGIN_TIMEOUT_S = 0.5
_JOIN_TIMEOUTS_S = (0.5, 1.0, 2.0, 5.0)
"""How long an answer may take, and from the last one on always so long: it may be lost, or just slow."""
_AGAIN_S = 0.1
_MAX_EVENTS_BEHIND = 100_000
_PASSING = frozenset({"server_shutting_down", "not_ready"})
"""Errors of one gateway that another one, or the same one later, does not have."""
_SEED_BITS = 63

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

    def __init__(
        self,
        bus: Bus,
        model: str = BUNDLED_MODEL_NAME,
        *,
        silence_s: float = _SILENCE_S,
        give_up_s: float = _GIVE_UP_S,
    ) -> None:
        """`silence_s` without a sign of life: a running request is joined again, at another gateway if need
        be. `give_up_s` without any: it is lost."""
        self._bus = bus
        self._model = model
        self._silence_s = silence_s
        self._give_up_s = give_up_s
        self._followers: set[_Follower] = set()
        bus.on_reconnect(self._on_reconnect)

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
        events without tokens). A gateway that dies is only a pause: the request is joined again, and every
        token comes once; for that it has a seed, drawn here where you give none. Raises `GenerationError` for
        an error, also when nobody serves the model or no sign of life came for too long. Leaving the loop
        cancels.
        """
        identity = request_id or secrets.token_hex(16)
        body: dict[str, object] = {"id": identity, **parameters}
        if body.get("seed") is None:  # so that it may begin again: it gives the same tokens
            body["seed"] = secrets.randbits(_SEED_BITS)
        if messages is not None:
            body["messages"] = list(messages)
        else:
            body["prompt"] = prompt if isinstance(prompt, str) or prompt is None else list(prompt)
        n = parameters.get("n")
        num_choices = n if isinstance(n, int) and n > 0 else 1
        is_over = False
        async with self._following(identity, body, num_choices) as follower:
            await follower.begin()
            try:
                async for event in follower.events():
                    yield event
                is_over = True
            except GenerationError:
                is_over = True
                raise
            finally:
                if not is_over:
                    with contextlib.suppress(BusError):
                        await self.cancel(identity)

    async def follow(self, request_id: str) -> AsyncIterator[ApiTokens]:
        """Follow a request that somebody else started, from now on, until it ends."""
        async with self._following(request_id, {"id": request_id}, None) as follower:
            async for event in follower.events():
                yield event

    async def cancel(self, request_id: str) -> None:
        """Stop a request."""
        await self._bus.publish(
            subjects.api_cancel(self._model), msgspec.json.encode(ApiCancel(id=subjects.part(request_id)))
        )

    @contextlib.asynccontextmanager
    async def _following(
        self, request_id: str, body: dict[str, object], num_choices: int | None
    ) -> AsyncIterator["_Follower"]:
        subject = subjects.api_generate(self._model)
        follower = _Follower(self._bus, subject, body, Reading(num_choices), self._silence_s, self._give_up_s)
        self._followers.add(follower)
        try:
            subscription = await self._bus.subscribe(subjects.stream(request_id), follower.take)
            try:
                yield follower
            finally:
                await follower.close()
                with contextlib.suppress(Exception):
                    await subscription.unsubscribe()
        finally:
            self._followers.discard(follower)

    async def _on_reconnect(self) -> None:
        for follower in self._followers:
            follower.doubt()


class _Follower:
    """One request's events as they come, with a bounded buffer, and its joining again beside them."""

    def __init__(
        self,
        bus: Bus,
        subject: str,
        body: dict[str, object],
        reading: Reading,
        silence_s: float,
        give_up_s: float,
    ) -> None:
        """`subject`: where requests are sent; `body`: this one's."""
        self._bus = bus
        self._subject = subject
        self._body = body
        self._reading = reading
        self._silence_s = silence_s
        self._give_up_s = give_up_s
        self._unknown_since_s: float | None = None
        self._queue: asyncio.Queue[AnyApiEvent | None] = asyncio.Queue(_MAX_EVENTS_BEHIND)
        self._last_sign_s = asyncio.get_running_loop().time()
        self._joining: asyncio.Task[None] | None = None
        self._is_doubted = False  # since the last joining was sent
        self._failure: GenerationError | None = None

    def take(self, msg: Msg) -> None:
        """The next event, from the bus."""
        with contextlib.suppress(asyncio.QueueFull):  # a gap in the index then asks again
            self._queue.put_nowait(msgspec.json.decode(msg.data, type=AnyApiEvent))

    def doubt(self) -> None:
        """Something may be lost, as where the connection was cut: ask for what is missing."""
        self._is_doubted = True
        if self._joining is None or self._joining.done():
            self._joining = asyncio.get_running_loop().create_task(self._join_again(), name="join again")

    async def close(self) -> None:
        """Ask no more."""
        if self._joining is not None:
            self._joining.cancel()
            await asyncio.gather(self._joining, return_exceptions=True)

    async def begin(self) -> None:
        """Send the request; raises `GenerationError`."""
        try:
            await self._send(self._body, _BEGIN_TIMEOUT_S)
        except NoRespondersError:
            model = self._subject.split(".")[2]
            raise _error(f"nobody serves the model {model} on this bus", "no_gateway") from None
        except (RequestTimeoutError, NotConnectedError):
            self.doubt()  # its gateway may have died with it, or taken it: either is found out
        except GenerationError as error:
            if self._joining is None or error.error.code != "id_in_use":
                raise
            self.doubt()  # the connection was doubted meanwhile, and the request began elsewhere

    async def events(self) -> AsyncIterator[ApiTokens]:
        """The tokens until the end, each once; raises `GenerationError`."""
        reading = self._reading
        loop = asyncio.get_running_loop()
        self._last_sign_s = loop.time()
        gap_pause_s, gap_at_s = _GAP_S, 0.0  # how long a gap may last, and when it has
        while True:
            now_s = loop.time()
            if not reading.has_gap:
                gap_pause_s, gap_at_s = _GAP_S, 0.0
            elif not gap_at_s:
                gap_at_s = now_s + gap_pause_s
            try:
                event = await self._next(gap_at_s - now_s if gap_at_s else self._silence_s)
            except TimeoutError:
                if loop.time() - self._last_sign_s > self._give_up_s:
                    raise _error(f"no sign of life for {self._give_up_s:.0f} s", "silent") from None
                self.doubt()
                gap_pause_s, gap_at_s = min(2 * gap_pause_s, _MAX_GAP_PAUSE_S), 0.0
                continue
            self._last_sign_s = loop.time()
            match event:
                case ApiTokens():
                    for new in reading.take(event):
                        yield new
                case ApiError() if event.error.code in _PASSING:
                    self.doubt()
                case ApiError():
                    raise GenerationError(event.error)
                case ApiDone() if reading.is_complete:
                    return
                case ApiDone():
                    self.doubt()
                case ApiAlive():
                    continue

    async def _next(self, wait_s: float) -> AnyApiEvent:
        """The next event; raises `TimeoutError`, and `GenerationError` where none can come any more."""
        while True:
            if self._queue.empty() and self._failure is not None:
                raise self._failure
            async with asyncio.timeout(max(wait_s, 0.0) if self._queue.empty() else None):
                event = await self._queue.get()
            if event is not None:
                return event

    async def _join_again(self) -> None:
        """Ask for what is missing, at whichever gateway, until one answers; events are read meanwhile, since
        what is asked for comes beside the answer, and the answer alone may be lost."""
        for timeout_s in chain(_JOIN_TIMEOUTS_S, repeat(_JOIN_TIMEOUTS_S[-1])):
            self._is_doubted = False
            body = {
                **self._body,
                "have": list(self._reading.have) or [0],
                "have_prompt": self._reading.have_prompt,
            }
            try:
                await self._send(body, timeout_s)
            except GenerationError as error:
                if not self._may_pass(error.error.code):
                    self._failure = error
                    with contextlib.suppress(asyncio.QueueFull):
                        self._queue.put_nowait(None)
                    return
                await asyncio.sleep(_RETRY_S)
            except RequestTimeoutError:
                continue
            except NotConnectedError:
                await asyncio.sleep(_AGAIN_S)
            except BusError:
                await asyncio.sleep(_RETRY_S)
            else:
                self._unknown_since_s = None
                self._last_sign_s = asyncio.get_running_loop().time()
                if not self._is_doubted:
                    return
                await asyncio.sleep(_AGAIN_S)

    def _may_pass(self, code: str | None) -> bool:
        """Whether another gateway, or the same one later, may say something else."""
        if code != "stream_not_found":
            return code in _PASSING or code == "id_in_use"  # it began a moment ago, elsewhere
        now_s = asyncio.get_running_loop().time()
        self._unknown_since_s = now_s if self._unknown_since_s is None else self._unknown_since_s
        return now_s - self._unknown_since_s < _UNKNOWN_S

    async def _send(self, body: dict[str, object], timeout_s: float) -> None:
        answer = await self._bus.request(self._subject, msgspec.json.encode(body), timeout_s=timeout_s)
        event = msgspec.json.decode(answer.data, type=AnyApiEvent)
        if isinstance(event, ApiError):
            raise GenerationError(event.error)


def _error(message: str, code: str) -> GenerationError:
    return GenerationError(ApiErrorBody(message=message, type="server_error", code=code))
