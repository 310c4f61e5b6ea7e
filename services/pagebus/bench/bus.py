"""`pagebus bench bus`: what the bus itself costs: one way's latency, and messages a second, by payload size.

Two connections of one process and a nats-server of its own, so CPU figures count one publish and one receive.
"""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from pagebus.bench.processes import Machine, cpu_s, machine, percentile
from pagebus.bus import subjects
from pagebus.bus.nats_bus import NatsBus
from pagebus.bus.protocol import Msg
from pagebus.cli.nats_server import EmbeddedNats

_SUBJECT = subjects.out("bench")
_IDLE_S = 0.003
_TURN = 64  # messages of a burst between two turns of the loop


class Size(msgspec.Struct, frozen=True, kw_only=True):
    """One payload size. Latencies are one way, publish to handler: one after the other, and after pauses."""

    num_bytes: int
    hot_p50_us: float
    hot_p99_us: float
    idle_p50_us: float
    idle_p99_us: float
    messages_per_s: float
    cpu_us_per_message: float
    nats_cpu_us_per_message: float


class BusFigures(msgspec.Struct, frozen=True, kw_only=True):
    """All that was measured."""

    machine: Machine
    sizes: list[Size]


@dataclass
class _Arrivals:
    """What the receiver has had."""

    count: int = 0
    event: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self, msg: Msg) -> None:
        self.count += 1
        self.event.set()


async def measure_bus(sizes: Sequence[int], num_messages: int) -> BusFigures:
    """All sizes, one after the other."""
    nats = EmbeddedNats()
    await nats.start()
    try:
        sender = await NatsBus.connect(nats.url("executor"), name="bench-sender")
        receiver = await NatsBus.connect(nats.url("gateway"), name="bench-receiver")
        arrivals = _Arrivals()
        await receiver.subscribe(_SUBJECT, arrivals.take)
        found = [await _measure_size(nats.pid, sender, arrivals, size, num_messages) for size in sizes]
        await sender.close()
        await receiver.close()
    finally:
        await nats.stop()
    return BusFigures(machine=machine(), sizes=found)


async def _measure_size(
    nats_pid: int, sender: NatsBus, arrivals: _Arrivals, num_bytes: int, num_messages: int
) -> Size:
    payload = bytes(num_bytes)
    num_single = max(10, num_messages // 20)
    hot = [await _one(sender, arrivals, payload) for _ in range(num_single)]
    idle = []
    for _ in range(max(10, num_single // 5)):
        await asyncio.sleep(_IDLE_S)
        idle.append(await _one(sender, arrivals, payload))
    until, began_s = arrivals.count + num_messages, time.perf_counter()
    own_s, nats_s = time.process_time(), cpu_s(nats_pid)
    for number in range(num_messages):
        await sender.publish(_SUBJECT, payload)
        if number % _TURN == 0:
            await asyncio.sleep(0)
    while arrivals.count < until:
        arrivals.event.clear()
        await arrivals.event.wait()
    seconds = time.perf_counter() - began_s
    return Size(
        num_bytes=num_bytes,
        hot_p50_us=round(percentile(hot, 0.5) * 1e6, 1),
        hot_p99_us=round(percentile(hot, 0.99) * 1e6, 1),
        idle_p50_us=round(percentile(idle, 0.5) * 1e6, 1),
        idle_p99_us=round(percentile(idle, 0.99) * 1e6, 1),
        messages_per_s=round(num_messages / seconds),
        cpu_us_per_message=round((time.process_time() - own_s) / num_messages * 1e6, 2),
        nats_cpu_us_per_message=round((cpu_s(nats_pid) - nats_s) / num_messages * 1e6, 2),
    )


async def _one(sender: NatsBus, arrivals: _Arrivals, payload: bytes) -> float:
    arrivals.event.clear()
    began_s = time.perf_counter()
    await sender.publish(_SUBJECT, payload)
    await arrivals.event.wait()
    return time.perf_counter() - began_s


def table(found: BusFigures) -> str:
    """For people."""
    lines = [
        "   bytes   hot p50     p99   idle p50     p99 us   messages/s   CPU us a message: ours  nats-server"
    ]
    for size in found.sizes:
        lines.append(
            f"{size.num_bytes:8,} {size.hot_p50_us:9.0f} {size.hot_p99_us:7.0f} {size.idle_p50_us:10.0f} "
            f"{size.idle_p99_us:7.0f} {size.messages_per_s:15,.0f} {size.cpu_us_per_message:24.1f} "
            f"{size.nats_cpu_us_per_message:12.1f}"
        )
    return "\n".join(lines)


def run_bus(sizes: Sequence[int], num_messages: int, json_file: Path | None) -> BusFigures:
    """Measure and print. Raises `OSError` where the file cannot be written."""
    runner = asyncio.run
    with contextlib.suppress(ImportError):
        import uvloop

        runner = uvloop.run
    found = runner(measure_bus(sizes, num_messages))
    print(table(found))
    if json_file is not None:
        json_file.write_text(msgspec.json.format(msgspec.json.encode(found), indent=2).decode() + "\n")
    return found
