"""The NATS bus under too much: a subscriber that is stopped is cut off by the server, a flood, errors."""

import asyncio
import os
import signal
import sys
import textwrap
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from pagebus.bus.nats_bus import NatsBus
from pagebus.bus.protocol import Msg, NotPermittedError, PayloadTooLargeError
from pagebus.cli.nats_server import EmbeddedNats
from tests.support.nats import RawConnection, connected, eventually, open_server, running_server

LIMITS = 'max_pending: 64MB\nwrite_deadline: "2s"\nping_interval: "2s"\nping_max: 2'

# Counts what it gets on "work"; says so, with its counters, at each reconnect and each message on "tell".
READER = textwrap.dedent(
    """
    import asyncio, json, sys
    from pagebus.bus.nats_bus import NatsBus

    async def main():
        bus = await NatsBus.connect(sys.argv[1], name="reader")
        got, told = 0, asyncio.Queue()

        def take(message):
            nonlocal got
            got += 1

        bus.on_reconnect(lambda: told.put("reconnect"))
        await bus.subscribe("work", take)
        await bus.subscribe("tell", lambda message: told.put_nowait("asked"))
        print("ready", flush=True)
        while True:
            why = await told.get()
            print(json.dumps({"why": why, "got": got, "counters": dict(bus.counters)}), flush=True)

    asyncio.run(main())
    """
)


@asynccontextmanager
async def reader(url: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", READER, url, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert await asyncio.wait_for(process.stdout.readline(), 20) == b"ready\n"
        yield process
    finally:
        process.kill()
        await process.wait()


async def test_a_stopped_subscriber_is_cut_off_and_learns_of_it(tmp_path):
    """Publishers and other subscribers notice nothing; what it missed it learns of as a reconnect."""
    async with (
        open_server(tmp_path, LIMITS) as server,
        connected(server, "client", "client") as [sender, other],
        reader(server.url("client")) as process,
    ):
        sent_s: list[float] = []
        late_s: list[float] = []
        clock = time.monotonic

        def take(message: Msg) -> None:
            late_s.append(clock() - sent_s[len(late_s)])

        await other.subscribe("work", take)
        os.kill(process.pid, signal.SIGSTOP)
        for _ in range(1000):  # four seconds: longer than the server bears a peer that takes nothing
            for _ in range(4):
                sent_s.append(clock())
                await sender.publish("work", bytes(10_000))
            await asyncio.sleep(0.004)
        await eventually(lambda: len(late_s) == 4000)
        assert max(late_s) < 1.0
        for bus in (sender, other):
            assert bus.counters["disconnects"] == 0
        os.kill(process.pid, signal.SIGCONT)
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), 10)
        assert b'"why": "reconnect"' in line
        assert b'"disconnects": 1' in line
        await sender.publish("tell", b"")
        assert b'"why": "asked"' in await asyncio.wait_for(process.stdout.readline(), 5)


async def test_a_flood_is_received_whole_and_stops_nobody(tmp_path):
    async with open_server(tmp_path) as server, connected(server, "client", "client", "client") as buses:
        flooder, flooded, other = buses
        num_got, largest_gap_s = 0, 0.0
        clock = asyncio.get_running_loop().time
        last_s = clock()

        def count(message: Msg) -> None:
            nonlocal num_got
            num_got += 1

        def tick(message: Msg) -> None:
            nonlocal last_s, largest_gap_s
            largest_gap_s, last_s = max(largest_gap_s, clock() - last_s), clock()

        await flooded.subscribe("flood", count)
        await flooded.subscribe("tick", tick)
        last_s = clock()
        for number in range(60_000):
            await flooder.publish("flood", bytes(200))
            if number % 500 == 0:
                await other.publish("tick", b"")
                await asyncio.sleep(0)
        await eventually(lambda: num_got == 60_000, timeout_s=20)
        assert largest_gap_s < 2.0
        for bus in buses:
            assert (
                bus.counters["dropped"] == bus.counters["disconnects"] == bus.counters["handler_errors"] == 0
            )
        assert flooded.counters["received"] >= 60_000


async def test_a_publish_without_permission_is_counted_and_nothing_else():
    async with running_server() as server, connected(server, "client") as [client]:
        await client.publish("pagebus.plan.ex-1", b"forged")
        await eventually(lambda: client.counters["permission_errors"] == 1)
        assert client.is_connected
        with pytest.raises(NotPermittedError):
            await client.subscribe("pagebus.out.*", lambda message: None)
        assert client.counters["permission_errors"] == 2
        assert client.counters["disconnects"] == 0


async def break_the_line(bus: NatsBus, data: bytes) -> None:
    """What the guard never sends."""
    await bus._client.publish_frame(data)


@pytest.mark.parametrize(
    "data",
    [
        b"PUB x 99999999\r\n",  # payload over the limit
        b"HPUB x 10 5\r\n",  # headers longer than all
        b"NONSENSE\r\n",
        b"SUB \r\n",
        b"PUB " + b"x" * 5000 + b" 0\r\n\r\n",  # control line over the limit
    ],
    ids=["payload", "header sizes", "verb", "no subject", "control line"],
)
async def test_what_makes_the_server_hang_up_is_a_reconnect(data, tmp_path):
    async with open_server(tmp_path) as server, connected(server, "client", "client") as [bus, other]:
        got: list[Msg] = []
        await bus.subscribe("pagebus.a", got.append)
        await break_the_line(bus, data)
        await eventually(lambda: bus.counters["reconnects"] == 1, timeout_s=3)
        await other.publish("pagebus.a", b"")
        await eventually(lambda: got)
        assert bus.counters["read_loop_deaths"] == 0
        assert other.counters["disconnects"] == 0


async def test_connections_over_the_limit_are_tried_again(tmp_path):
    async with open_server(tmp_path, "max_connections: 2") as server:
        one = await NatsBus.connect(server.url("client"), name="one", timeout_s=5)
        async with RawConnection(server.url("client")):
            waiting = asyncio.ensure_future(NatsBus.connect(server.url("client"), name="late", timeout_s=10))
            await asyncio.sleep(0.5)
            assert not waiting.done()
        late = await waiting
        await late.close()
        await one.close()


async def test_an_expired_user_comes_back_when_it_is_known_again(tmp_path):
    """A server that was started with other passwords refuses for a while; nobody gives up for good."""
    server = EmbeddedNats()
    await server.start()
    try:
        bus = await NatsBus.connect(server.url("gateway"), name="g", timeout_s=5)
        own = dict(server._passwords)
        server._passwords["gateway"] = "another"
        await server.restart()
        await asyncio.sleep(1)
        assert not bus.is_connected
        server._passwords.update(own)
        await server.restart()
        await eventually(lambda: bus.is_connected, timeout_s=3)
        await bus.close()
    finally:
        await server.stop()


async def test_too_large_is_said_with_numbers(tmp_path):
    async with open_server(tmp_path) as server, connected(server, "client") as [bus]:
        with pytest.raises(PayloadTooLargeError) as caught:
            await bus.publish("a", bytes(bus.max_payload + 7))
        assert (caught.value.size, caught.value.max_payload) == (bus.max_payload + 7, 1 << 20)
        assert bus.counters["published"] == 0
