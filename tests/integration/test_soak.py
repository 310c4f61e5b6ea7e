"""Two thousand random requests through the real services, cancelled at random tokens: no block is lost."""

import asyncio
import random

from pagebus.bus.memory import MemoryBroker
from pagebus.bus.messages import PoolGroup, Sampling
from pagebus.executor.fake import FakeModel, FakeRunner, fake_sequence
from pagebus.requester.events import NewTokens, RequestFailed, RequestSpec
from tests.support import executor_tests
from tests.unit.scheduler.service_checks import requester, scheduler, until

NUM_REQUESTS = 2000
NUM_LIVE = 64
NUM_BLOCKS = 160


async def one(made, request: RequestSpec, stop_after: int | None, model: FakeModel) -> str:
    """Follow a request, perhaps only up to some token; every id must be the right one."""
    ids = {choice: [] for choice in range(request.num_choices)}
    num_open = request.num_choices
    stream = made.generate(request)
    try:
        async for event in stream:
            assert not isinstance(event, RequestFailed), event
            if not isinstance(event, NewTokens):
                continue
            assert event.index == len(ids[event.choice])
            ids[event.choice].extend(event.ids)
            num_open -= event.finish_reason is not None
            if stop_after is not None and len(ids[event.choice]) >= stop_after:
                return "cancelled"
    finally:
        await stream.aclose()
        for choice, received in ids.items():
            expected = fake_sequence(
                list(request.prompt),
                request.max_tokens,
                model=model,
                sampling=request.sampling,
                choice=choice,
            )
            assert received == expected[: len(received)], f"{request.request_id} choice {choice}"
    assert num_open == 0
    return "finished"


async def test_two_thousand_random_requests_leave_every_block_free():
    model = FakeModel(windows=(None, 40))
    runner = FakeRunner(model, num_blocks=NUM_BLOCKS, max_model_len=400)
    assert [group.window for group in runner.pool] == [None, 40]
    assert isinstance(runner.pool[0], PoolGroup)
    rng = random.Random(7)
    broker = MemoryBroker()
    prefixes = [[rng.randrange(400) for _ in range(60)] for _ in range(6)]
    outcomes: list[str] = []
    async with (
        scheduler(broker.connect(), max_num_seqs=48, max_num_batched_tokens=256),
        executor_tests.executor(broker.connect(), runner),
        requester(broker.connect()) as made,
    ):
        gate = asyncio.Semaphore(NUM_LIVE)

        async def run(i: int) -> None:
            async with gate:
                prefix = rng.choice(prefixes)[: rng.randint(0, 60)]
                request = RequestSpec(
                    request_id=f"q{i}",
                    prompt=[*prefix, *(rng.randrange(400) for _ in range(rng.randint(1, 40)))],
                    num_choices=rng.choice((1, 1, 1, 2, 4)),
                    max_tokens=rng.randint(1, 40),
                    sampling=Sampling(temperature=rng.choice((0.0, 1.0)), seed=rng.randrange(1 << 40)),
                    priority=rng.choice((0, 0, 0, 1, -1)),
                    tenant=rng.choice(("", "a", "b")),
                )
                stop_after = rng.choice((None, None, rng.randint(1, 20)))
                outcomes.append(await one(made, request, stop_after, model))

        await asyncio.wait_for(asyncio.gather(*(run(i) for i in range(NUM_REQUESTS))), 240)
        await until(lambda: made.heartbeat.num_running == made.heartbeat.num_waiting == 0)
        await until(lambda: made.heartbeat.num_free_blocks == made.heartbeat.num_blocks == NUM_BLOCKS)
    assert len(outcomes) == NUM_REQUESTS
    assert outcomes.count("cancelled") > 300
    assert outcomes.count("finished") > 1000
