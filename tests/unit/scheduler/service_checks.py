"""Checks of the scheduler's service with real executors (fake model) and requesters, whatever the bus."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from pagebus.bus import subjects
from pagebus.bus.messages import Sampling, encode
from pagebus.bus.protocol import Bus
from pagebus.executor.fake import FakeRunner, fake_sequence
from pagebus.requester.client import Requester
from pagebus.requester.events import NewTokens, RequestFailed, RequestSpec
from pagebus.scheduler import service
from pagebus.settings.structs import SchedulerSettings
from tests.support import executor_tests

MODEL = "fake"
GREEDY = Sampling(temperature=0.0)


@contextlib.asynccontextmanager
async def scheduler(bus: Bus, name="s1", on_ended=None, **settings) -> AsyncIterator[asyncio.Task]:
    stop = asyncio.Event()
    run = service.run(SchedulerSettings(model=MODEL, **settings), bus, name, stop, on_ended)
    task = asyncio.create_task(run)
    try:
        yield task
    finally:
        stop.set()
        if not task.cancelled():
            await asyncio.wait_for(asyncio.gather(task, return_exceptions=True), 5)


@contextlib.asynccontextmanager
async def requester(bus: Bus, instance="r1") -> AsyncIterator[Requester]:
    made = Requester(bus, model=MODEL, instance=instance)
    await made.start()
    try:
        yield made
    finally:
        await made.close()


def spec(request_id, prompt, max_tokens, **fields):
    return RequestSpec(
        **{"request_id": request_id, "prompt": prompt, "max_tokens": max_tokens, "sampling": GREEDY, **fields}
    )


async def collect(made: Requester, request: RequestSpec):
    """The ids of choice 0 and its finish reason, or the failure."""
    ids = []
    async for event in made.generate(request):
        match event:
            case NewTokens():
                assert event.index == len(ids)
                ids.extend(event.ids)
                if event.finish_reason:
                    return ids, event.finish_reason
            case RequestFailed():
                return event
    raise AssertionError("neither a finish reason nor a failure")


async def many_requests_finish_with_their_own_ids(scheduler_bus, executor_bus, requester_bus, **settings):
    ended = []
    prompts = {f"q{i}": [i, *range(3, 3 + 5 * i)] for i in range(24)}
    async with (
        scheduler(scheduler_bus, on_ended=ended.append, **settings),
        executor_tests.executor(executor_bus, FakeRunner(num_blocks=48, max_model_len=512)),
        requester(requester_bus) as made,
    ):
        results = await asyncio.wait_for(
            asyncio.gather(*[collect(made, spec(name, prompt, 40)) for name, prompt in prompts.items()]), 20
        )
        for (ids, reason), prompt in zip(results, prompts.values(), strict=True):
            assert (ids, reason) == (fake_sequence(prompt, 40), "length")
        await until(lambda: len(ended) == 24)
        await until(lambda: made.heartbeat.num_free_blocks == made.heartbeat.num_blocks == 48)
    assert all(timings.num_generated_tokens == 40 for timings in ended)
    assert all(
        timings.arrived_ns <= timings.scheduled_ns <= timings.first_token_ns <= timings.ended_ns
        for timings in ended
    )


async def a_standby_takes_over_and_streams_go_on(buses):
    one, two, executor_bus, requester_bus = buses
    prompt = list(range(20))
    async with (
        executor_tests.executor(executor_bus, FakeRunner(num_blocks=48, max_model_len=512, step_time_s=0.02)),
        requester(requester_bus) as made,
        scheduler(one, "s1") as first,
    ):
        await until(lambda: made.heartbeat and made.heartbeat.num_executors)
        async with scheduler(two, "s2"):
            stream = asyncio.create_task(collect(made, spec("long", prompt, 250)))
            await asyncio.sleep(0.6)
            epoch = made.heartbeat.epoch
            assert made.heartbeat.scheduler == "s1"
            first.cancel()
            ids, reason = await asyncio.wait_for(stream, 25)
            assert made.heartbeat.scheduler == "s2"
            assert made.heartbeat.epoch > epoch
    assert (ids, reason) == (fake_sequence(prompt, 250), "length")


async def rubbish_on_every_subject_harms_nobody(scheduler_bus, executor_bus, requester_bus):
    async with (
        scheduler(scheduler_bus),
        executor_tests.executor(executor_bus, FakeRunner(num_blocks=48, max_model_len=512)),
        requester(requester_bus) as made,
    ):
        await until(lambda: made.heartbeat and made.heartbeat.num_executors)
        for data in (b"", b"\xff" * 50, b"\x81\xa4type\xa8Generate", encode(made.heartbeat)):
            await requester_bus.publish(subjects.generate(MODEL), data)
            await executor_bus.publish(subjects.hello(MODEL), data)
            await executor_bus.publish(subjects.step_done(MODEL), data)
        refused = await collect(made, spec("big", list(range(600)), 5))
        assert isinstance(refused, RequestFailed)
        assert (refused.code, refused.is_client_fault) == ("context_length_exceeded", True)
        assert await collect(made, spec("a", [1, 2], 5)) == (fake_sequence([1, 2], 5), "length")


async def until(condition, timeout_s=5.0):
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
