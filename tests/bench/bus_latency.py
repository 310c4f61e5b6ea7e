"""One-way latency and CPU of the bus beside plain nats-py: `python -m tests.bench.bus_latency`.

Both sides live in one process, so CPU figures count one publish and one receive. Runs are interleaved.
"""

import asyncio
import resource
import statistics
import time
from collections.abc import Awaitable, Callable

import nats
import uvloop
from nats.aio.msg import Msg as PlainMsg

from pagebus.bus.protocol import Msg
from tests.support.nats import connected, running_server

SUBJECT = "pagebus.out.bench"
PAYLOAD = bytes(512)
NUM_SINGLE = 2000
NUM_BURST = 20_000
NUM_ROUNDS = 5
BURST = 64

Publish = Callable[[], Awaitable[None]]


class Side:
    """One way to use the bus: how to publish, and what arrives."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.publish: Publish | None = None
        self.arrived = asyncio.Event()
        self.num_arrived = 0
        self.figures: dict[str, list[float]] = {}

    def count(self) -> None:
        self.num_arrived += 1
        self.arrived.set()

    def note(self, figure: str, value: float) -> None:
        self.figures.setdefault(figure, []).append(value)

    async def one(self) -> float:
        assert self.publish is not None
        self.arrived.clear()
        start_s = time.perf_counter()
        await self.publish()
        await self.arrived.wait()
        return time.perf_counter() - start_s


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def measure(side: Side) -> None:
    start_s = cpu_s()
    latencies = sorted([await side.one() for _ in range(NUM_SINGLE)])
    side.note("single: CPU us", (cpu_s() - start_s) / NUM_SINGLE * 1e6)
    side.note("single: p50 us", latencies[NUM_SINGLE // 2] * 1e6)
    side.note("single: p99 us", latencies[NUM_SINGLE * 99 // 100] * 1e6)
    assert side.publish is not None
    until, start_s = side.num_arrived + NUM_BURST, cpu_s()
    for number in range(NUM_BURST):
        await side.publish()
        if number % BURST == 0:
            await asyncio.sleep(0)
    while side.num_arrived < until:
        side.arrived.clear()
        await side.arrived.wait()
    side.note("burst: CPU us", (cpu_s() - start_s) / NUM_BURST * 1e6)


async def main() -> None:
    ours, plain = Side("pagebus"), Side("nats-py")
    async with running_server() as server, connected(server, "executor", "gateway") as [sender, receiver]:

        def on_message(message: Msg) -> None:
            ours.count()

        async def on_plain_message(message: PlainMsg) -> None:
            plain.count()

        await receiver.subscribe(SUBJECT, on_message)
        plain_sender = await nats.connect(server.url("executor"))
        plain_receiver = await nats.connect(server.url("gateway"))
        await plain_receiver.subscribe(f"{SUBJECT}-plain", cb=on_plain_message)
        await plain_receiver.flush()
        ours.publish = lambda: sender.publish(SUBJECT, PAYLOAD)
        plain.publish = lambda: plain_sender.publish(f"{SUBJECT}-plain", PAYLOAD)
        for _ in range(NUM_ROUNDS):
            await measure(ours)
            await measure(plain)
        await plain_sender.close()
        await plain_receiver.close()
    for figure, values in ours.figures.items():
        own, other = statistics.median(values), statistics.median(plain.figures[figure])
        print(f"{figure:16} {ours.name} {own:8.1f}   {plain.name} {other:8.1f}   ratio {own / other:.2f}")


if __name__ == "__main__":
    uvloop.run(main())
