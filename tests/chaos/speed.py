"""How many tokens a second the fake model gives through the whole path, beside the load of chaos runs.

One executor, one scheduler, one in-process requester on a real nats-server; no step time.
"""

import asyncio
import random
import time

from pagebus.bus.messages import Sampling
from tests.chaos.bed import Layout, running
from tests.chaos.drivers import drive
from tests.chaos.specs import StreamSpec

_NUM_STREAMS = 128
_NUM_TOKENS = 600


async def tokens_a_second() -> float:
    """Tokens that arrived, checked id by id, over the time from the first request to the last token."""
    rng = random.Random(0)
    specs = [
        StreamSpec(
            name=f"speed-{number}",
            path="requester",
            prompt=tuple(rng.randint(3, 511) for _ in range(16)),
            num_choices=1,
            sampling=Sampling(temperature=float(number % 2), seed=number),
            max_tokens=_NUM_TOKENS,
        )
        for number in range(_NUM_STREAMS)
    ]
    for spec in specs:
        spec.expected  # noqa: B018  # computed before the clock runs
    async with running(Layout(executors=1, gateways=0, step_s=0.0)) as bed:
        began_s = time.monotonic()
        histories = await asyncio.gather(*(drive(bed, spec, 60.0) for spec in specs))
        seconds = time.monotonic() - began_s
    flaws = [
        flaw for history in histories for flaw in (*history.violations(), *filter(None, [history.error]))
    ]
    if flaws:
        raise AssertionError(f"the measured streams are not right: {flaws[:5]}")
    return _NUM_STREAMS * _NUM_TOKENS / seconds
