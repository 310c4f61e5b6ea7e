"""`pagebus bench idle`: how long a simulated device waits for its host; services and NATS are as they are.

The fake model runs behind a device on which a step takes a fixed time (`pagebus.executor.fake_device`). It is
idle when nothing is queued there although a row that was in the last step is in the next one too.
"""

import asyncio
import contextlib
import json
import os
import random
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from pagebus.bench.stack import stack
from pagebus.bus.messages import Sampling
from pagebus.requester.client import Requester
from pagebus.requester.events import RequestFailed, RequestSpec
from pagebus.settings.structs import ServeSettings

_GREEDY = Sampling(temperature=0.0)
_FIRST_ID, _END_ID = 5, 500


@dataclass(frozen=True, kw_only=True)
class IdleRequest:
    """What the command line asks for."""

    steps_ms: tuple[float, ...] = (1.5, 4.0, 8.0)
    delays_ms: tuple[float, ...] = (0.0, 2.0)  # added to every message
    num_rows: int = 16
    num_prompt: int = 128
    num_output: int = 256
    duration_s: float = 5.0
    warm_up_s: float = 2.0
    num_repetitions: int = 1
    is_in_turn: bool = True  # measure the same device without launching ahead, too
    is_json: bool = False


class IdleFigures(msgspec.Struct, frozen=True):
    """One measurement. `idle_fraction`: of the time in which the device had rows to work for."""

    is_pipelined: bool
    step_ms: float
    delay_ms: float
    idle_fraction: float
    num_gaps: int  # in which it was idle
    num_steps: int
    rows_a_step: float
    tokens_per_s: float
    load_1min: float


class IdleError(Exception):
    """Nothing could be measured."""


def run(request: IdleRequest) -> list[IdleFigures]:
    """Measure, and print a line each. Raises `IdleError` and `StackError`."""
    found = []
    if not request.is_json:
        print(f"{request.num_rows} rows, {request.num_prompt} ids in, {request.num_output} out")
        print("launched  step ms  delay ms    idle %    gaps   steps   rows  tokens/s   load")
    for is_pipelined, step_ms, delay_ms in _cases(request):
        one = asyncio.run(_measure(request, is_pipelined, step_ms, delay_ms))
        found.append(one)
        if not request.is_json:
            print(_line(one), flush=True)
    if request.is_json:
        print(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())
    return found


def _cases(request: IdleRequest) -> Iterator[tuple[bool, float, float]]:
    for _ in range(request.num_repetitions):
        for step_ms in request.steps_ms:
            for delay_ms in request.delays_ms:
                yield True, step_ms, delay_ms
                if request.is_in_turn:
                    yield False, step_ms, delay_ms


def _line(one: IdleFigures) -> str:
    way = "ahead   " if one.is_pipelined else "in turn "
    return (
        f"{way}  {one.step_ms:7.2f}  {one.delay_ms:8.1f}  {100 * one.idle_fraction:8.3f}  {one.num_gaps:6d}"
        f"  {one.num_steps:6d}  {one.rows_a_step:5.1f}  {one.tokens_per_s:8.0f}  {one.load_1min:5.1f}"
    )


async def _measure(request: IdleRequest, is_pipelined: bool, step_ms: float, delay_ms: float) -> IdleFigures:
    with tempfile.TemporaryDirectory() as folder:
        figures_path = Path(folder) / "device.json"
        environment = {
            "PAGEBUS_FAKE_PIPELINED": "1" if is_pipelined else "0",
            "PAGEBUS_FAKE_STEP_S": str(step_ms / 1000),
            "PAGEBUS_FAKE_FIGURES": str(figures_path),
        }
        settings = ServeSettings(fake=True, max_num_seqs=max(8, request.num_rows), drain_timeout_s=0.0)
        log = Path(folder) / "services.log"
        async with (
            stack(settings, log, environment, message_delay_s=delay_ms / 1000) as requester,
            _load(requester, request),
        ):
            await asyncio.sleep(request.warm_up_s)
            before = _read(figures_path)
            began_s = time.monotonic()
            await asyncio.sleep(request.duration_s)
            after = _read(figures_path)
            took_s = time.monotonic() - began_s
    busy_s, idle_s = after["busy_s"] - before["busy_s"], after["idle_s"] - before["idle_s"]
    num_steps, num_rows = after["num_steps"] - before["num_steps"], after["num_rows"] - before["num_rows"]
    if num_steps <= 0:
        raise IdleError("the device did nothing")
    return IdleFigures(
        is_pipelined=is_pipelined,
        step_ms=step_ms,
        delay_ms=delay_ms,
        idle_fraction=idle_s / (busy_s + idle_s),
        num_gaps=int(after["num_gaps"] - before["num_gaps"]),
        num_steps=int(num_steps),
        rows_a_step=num_rows / num_steps,
        tokens_per_s=num_rows / took_s,
        load_1min=os.getloadavg()[0],
    )


def _read(path: Path) -> dict[str, float]:
    try:
        return msgspec.convert(json.loads(path.read_text()), dict[str, float])
    except FileNotFoundError:
        raise IdleError("the device wrote no figures: no step was computed") from None


@contextlib.asynccontextmanager
async def _load(requester: Requester, request: IdleRequest) -> AsyncIterator[None]:
    """So many requests at a time, one after the other, each with a prompt of its own."""
    rng = random.Random(0)  # noqa: S311

    async def one_after_the_other(number: int) -> None:
        for count in range(1_000_000):
            prompt = [rng.randrange(_FIRST_ID, _END_ID) for _ in range(request.num_prompt)]
            spec = RequestSpec(
                request_id=f"r{number}-{count}",
                prompt=prompt,
                # Ends are spread over all steps from the start.
                max_tokens=request.num_output if count else rng.randint(1, request.num_output),
                sampling=_GREEDY,
            )
            async for event in requester.generate(spec):
                if isinstance(event, RequestFailed):
                    raise IdleError(f"{event.code}: {event.message}")

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one_after_the_other(number)) for number in range(request.num_rows)]
        yield
        for task in tasks:
            task.cancel()
