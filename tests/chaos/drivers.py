"""Reads streams the three ways there are: in-process requester, NATS client library, HTTP.

Each driver sends one spec, writes what arrives into its history, and never raises for what a stream does.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import httpx
import msgspec

from pagebus.bus.protocol import BusError, NotConnectedError
from pagebus.client.client import GenerationError, Parameter
from pagebus.requester.events import Event, NewTokens, RequestFailed, RequestSpec
from tests.chaos.bed import MODEL, Bed
from tests.chaos.history import StreamHistory
from tests.chaos.specs import StreamSpec

_RESUME_PAUSE_S = 0.1
_REFUSED_PAUSE_S = 0.25
_NOT_TAKEN = frozenset(("no_gateway", "not_ready"))  # nobody is there; nobody leads yet


class _Choice(msgspec.Struct):
    index: int
    text: str = ""
    token_ids: list[int] = []
    finish_reason: str | None = None


class _Error(msgspec.Struct):
    message: str
    code: str | None = None


class _Chunk(msgspec.Struct):
    id: str = ""
    choices: list[_Choice] = []
    error: _Error | None = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


async def drive(bed: Bed, spec: StreamSpec, timeout_s: float) -> StreamHistory:
    """One stream from its start to its end; `never_ended` where it has none within `timeout_s`."""
    history = StreamHistory(spec)
    await asyncio.sleep(spec.start_s)
    history.begin(time.monotonic())
    driver = {"requester": _by_requester, "client": _by_client, "http": _by_http}[spec.path]
    try:
        async with asyncio.timeout(timeout_s):
            await driver(bed, spec, history)
    except TimeoutError:
        history.fail("never_ended", f"no end within {timeout_s:g} s", time.monotonic())
    return history


async def _by_requester(bed: Bed, spec: StreamSpec, history: StreamHistory) -> None:
    over = asyncio.Event()
    num_open = spec.num_choices

    def take(event: Event) -> None:
        nonlocal num_open
        now_s = time.monotonic()
        match event:
            case NewTokens():
                history.tokens(event.choice, event.index, event.ids, "", event.finish_reason, now_s)
                num_open -= event.finish_reason is not None
                if num_open == 0 and event.finish_reason is not None:
                    history.end(now_s)
                    over.set()
            case RequestFailed():
                history.fail(event.code, event.message, now_s)
                over.set()
            case _:
                history.strays.append(f"an unexpected {type(event).__name__}")

    ticket = bed.requester.submit(
        RequestSpec(
            request_id=spec.name,
            prompt=spec.prompt,
            num_choices=spec.num_choices,
            sampling=spec.sampling,
            stop_token_ids=spec.stop_ids,
            max_tokens=spec.max_tokens,
            timeout_s=bed.deadline_s,
        ),
        take,
    )
    try:
        await over.wait()
    finally:
        ticket.cancel()


def parameters(spec: StreamSpec, deadline_s: float) -> dict[str, Parameter]:
    """The request's members beside prompt and id, the same over NATS and HTTP."""
    sampling = spec.sampling
    asked: dict[str, Parameter] = {
        "max_tokens": spec.max_tokens,
        "temperature": sampling.temperature,
        "seed": sampling.seed,
        "n": spec.num_choices,
        "ignore_eos": True,
        "presence_penalty": sampling.presence_penalty,
        "repetition_penalty": sampling.repetition_penalty,
        "timeout_s": deadline_s,
    }
    if spec.stop_ids:
        asked["stop_token_ids"] = list(spec.stop_ids)
    if spec.stop_text:
        asked["stop"] = spec.stop_text
    return asked


async def _by_client(bed: Bed, spec: StreamSpec, history: StreamHistory) -> None:
    """The library joins again by itself; a request that no gateway took at all is sent again here."""
    while True:
        try:
            asked = parameters(spec, bed.deadline_s)
            stream = bed.client.generate(list(spec.prompt), messages=None, request_id=spec.name, **asked)
            async for event in stream:
                history.tokens(
                    event.choice,
                    event.index,
                    event.token_ids,
                    event.text,
                    event.finish_reason,
                    time.monotonic(),
                )
            history.end(time.monotonic())
            return
        except GenerationError as error:
            if error.error.code not in _NOT_TAKEN or any(one.ids for one in history.choices):
                history.fail(error.error.code or "", error.error.message, time.monotonic())
                return
        except BusError as error:
            if not isinstance(error, NotConnectedError) or any(one.ids for one in history.choices):
                history.fail(type(error).__name__, str(error), time.monotonic())
                return
        history.num_refused += 1
        await asyncio.sleep(_REFUSED_PAUSE_S)


@dataclass
class _HttpPlace:
    """How much of a stream an HTTP reader has: what it resumes with."""

    stream_id: str = ""
    event_id: str = ""


async def _by_http(bed: Bed, spec: StreamSpec, history: StreamHistory) -> None:
    """POST; where the connection is lost, GET the rest at the next gateway, or, where nothing came yet, POST
    again with the same idempotency key."""
    place = _HttpPlace()
    gateway, pause_s = spec.gateway, _RESUME_PAUSE_S
    while True:
        try:
            await _read_http(bed, spec, history, place, bed.gateway_urls[gateway % len(bed.gateway_urls)])
            return
        except httpx.HTTPError as error:
            if not spec.resumes:
                history.fail("connection", f"{type(error).__name__}: {error}", time.monotonic())
                return
            if isinstance(error, httpx.ConnectError):
                history.num_refused += 1
            else:
                history.resumed_s.append(time.monotonic())
        gateway += 1
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, 1.0)


async def _read_http(bed: Bed, spec: StreamSpec, history: StreamHistory, place: _HttpPlace, url: str) -> None:
    """One connection. Raises `httpx.HTTPError` where it is lost, or the gateway is not ready to serve."""
    if place.stream_id:
        headers = {"Last-Event-ID": place.event_id} if place.event_id else {}
        request = bed.http.build_request("GET", f"{url}/v1/streams/{place.stream_id}", headers=headers)
    else:
        body = {
            "model": MODEL,
            "prompt": list(spec.prompt),
            "stream": True,
            "return_token_ids": True,
            **parameters(spec, bed.deadline_s),
        }
        headers = {"Idempotency-Key": spec.name}
        request = bed.http.build_request("POST", f"{url}/v1/completions", json=body, headers=headers)
    answer = await bed.http.send(request, stream=True)
    try:
        if answer.status_code != 200:
            await answer.aread()
            if answer.status_code == 503 and spec.resumes:
                history.num_refused += 1
                raise httpx.RemoteProtocolError(f"503: {answer.text[:300]}")
            history.fail(str(answer.status_code), answer.text[:300], time.monotonic())
            return
        await _read_events(answer, history, place)
    finally:
        await answer.aclose()


async def _read_events(answer: httpx.Response, history: StreamHistory, place: _HttpPlace) -> None:
    """All chunks up to the end; an answer that stops before is an error of the connection."""
    async for event_id, data in _events(answer):
        now_s = time.monotonic()
        if data == "[DONE]":
            history.end(now_s)
            return
        chunk = _decode_chunk(data)
        if chunk.error is not None:
            history.fail(chunk.error.code or "", chunk.error.message, now_s)
            return
        place.stream_id = chunk.id
        for choice in chunk.choices:
            ids = choice.token_ids
            index = _index_of(event_id, choice.index, len(ids)) if ids else None
            history.tokens(choice.index, index, ids, choice.text, choice.finish_reason, now_s)
        place.event_id = event_id or place.event_id
    raise httpx.RemoteProtocolError("the stream ended without [DONE]")


def _index_of(event_id: str, choice: int, num_ids: int) -> int | None:
    """The index of an event's first id: the event's own id says how many ids the choice then has."""
    parts = event_id.split(".")
    number = parts[choice].rstrip("ef") if choice < len(parts) else ""
    return int(number) - num_ids if number.isdigit() else None


async def _events(answer: httpx.Response) -> AsyncIterator[tuple[str, str]]:
    """Each event's id ("" where it has none) and data."""
    event_id = ""
    async for line in answer.aiter_lines():
        if line.startswith("id: "):
            event_id = line[4:]
        elif line.startswith("data: "):
            yield event_id, line[6:]
            event_id = ""
