"""The real services in virtual time: a device never waits for its host, however slow messages are.

What the host itself costs is no time here; `pagebus bench idle` measures that.
"""

import asyncio
import random
import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest

from pagebus.bus.memory import MemoryBroker
from pagebus.executor import service as executor_service
from pagebus.executor.fake import FakeRunner, fake_sequence
from pagebus.executor.fake_device import DeviceFigures, FakeDevice
from pagebus.requester.client import Requester
from pagebus.requester.events import NewTokens, RequestSpec
from pagebus.scheduler.service import SchedulerService
from pagebus.settings.structs import ExecutorSettings, SchedulerSettings
from pagebus.sim import virtual_time
from pagebus.sim.timed_steps import TimedSteps

MODEL = "m"
WARM_UP_S, DURATION_S = 4.0, 1.5


class SlowBus:
    """Every message takes so long."""

    def __init__(self, delay_s: float) -> None:
        self._delay_s = delay_s

    def delays_s(self, subject: str, sender: str, receiver: str) -> Sequence[float]:
        return (self._delay_s,)


async def measure(step_s: float, delay_s: float, *, is_pipelined: bool, num_output: int) -> DeviceFigures:
    """Of eight rows, one after the other, after a warm-up."""
    loop = asyncio.get_running_loop()
    broker = MemoryBroker(faults=SlowBus(delay_s))
    model = FakeRunner(num_blocks=2048, max_model_len=4096)
    device = FakeDevice(
        model, step_time_s=step_s, is_pipelined=is_pipelined, clock=loop.time, sleep=lambda _s: None
    )
    steps = TimedSteps("ex", lambda: device, loop=loop, step_s=step_s, row_s=0.0)

    def make(executor, build, on_event, *, loop):  # type: ignore[no-untyped-def]
        steps.on_event = on_event
        return steps

    stop = asyncio.Event()
    executor = loop.create_task(
        executor_service.run(
            ExecutorSettings(model=MODEL, fake=True, drain_timeout_s=0.0),
            broker.connect("ex"),
            Path(),
            "ex",
            stop,
            clock=loop.time,
            make_steps=make,
        )
    )
    scheduler = SchedulerService(SchedulerSettings(model=MODEL), broker.connect("sched"), "sched")
    scheduling = loop.create_task(scheduler.run(stop))
    requester = Requester(broker.connect("gw"), model=MODEL, instance="gw", rng=random.Random(0))
    await requester.start()

    async def rows_of(number: int) -> None:
        for count in range(10_000):
            prompt = [7 * number + count % 50 + n for n in range(40)]
            made: list[int] = []
            num_tokens = num_output - (5 * number if count == 0 else 0)
            spec = RequestSpec(
                request_id=f"r{number}-{count}", prompt=prompt, max_tokens=num_tokens, timeout_s=100.0
            )
            async for event in requester.generate(spec):
                assert isinstance(event, NewTokens)
                made += event.ids
            assert made == fake_sequence(prompt, num_tokens, sampling=spec.sampling)

    users = [loop.create_task(rows_of(number)) for number in range(8)]
    await asyncio.sleep(WARM_UP_S)
    before = device.figures
    device.figures = DeviceFigures()
    await asyncio.sleep(DURATION_S)
    assert before.num_steps > 10
    for user in users:
        assert not user.done()
        user.cancel()
    stop.set()
    await asyncio.wait([executor, scheduling])
    await requester.close()
    return device.figures


def figures_of(
    step_s: float, delay_s: float, *, is_pipelined: bool = True, num_output: int = 60
) -> DeviceFigures:
    async def run() -> DeviceFigures:
        loop = asyncio.get_running_loop()
        with (
            mock.patch.object(time, "monotonic", loop.time),
            mock.patch.object(time, "time", return_value=1e9),
        ):
            return await measure(step_s, delay_s, is_pipelined=is_pipelined, num_output=num_output)

    return virtual_time.run(run())


@pytest.mark.parametrize("step_ms", [1.5, 4.0, 8.0])
@pytest.mark.parametrize("delay_ms", [0.0, 2.0])
def test_a_device_never_waits_inside_a_lease_or_between_two(step_ms: float, delay_ms: float) -> None:
    """The bar is 0.5 %; what is left to be measured is the host's own time."""
    figures = figures_of(step_ms / 1000, delay_ms / 1000)
    share = figures.idle_s / (figures.idle_s + figures.busy_s)
    assert figures.busy_s > 0.5 * DURATION_S
    assert share <= 0.001
