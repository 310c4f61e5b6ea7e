"""The NATS bus on a real cluster of three servers: killed, stopped, cut off from each other, retired."""

import asyncio
import contextlib
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pagebus.bus import subjects
from pagebus.bus.nats_bus import NatsBus, split_urls
from pagebus.bus.protocol import BusError, KeyValue, MessageLog
from pagebus.cli.nats_server import ROLES, EmbeddedNats
from tests.support.buses import until_kept
from tests.support.cluster import NUM_SERVERS, NatsCluster, running_cluster
from tests.support.flow import Flow, flowing
from tests.support.nats import eventually, running_server

NOTICED_S = 4.0  # a server that is cut off from the others, by their pings
HEALED_S = 3.0
BUCKET_STREAM = f"KV_{subjects.STREAMS_BUCKET}"
NUM_PAIRS = 4


@pytest.fixture
async def cluster() -> AsyncIterator[NatsCluster]:
    async with running_cluster() as running:
        yield running


@asynccontextmanager
async def traffic(cluster: NatsCluster) -> AsyncIterator[list[Flow]]:
    """Executors that send to gateways, over one server and over two, with each server in use by somebody."""
    async with contextlib.AsyncExitStack() as stack:
        flows: list[Flow] = []
        for number in range(NUM_PAIRS):
            sender = await connected(cluster, stack, "executor", number % NUM_SERVERS)
            receiver = await connected(
                cluster, stack, "gateway", (number + number // NUM_SERVERS) % NUM_SERVERS
            )
            subject = subjects.out(f"gw-{number}")
            flows.append(await stack.enter_async_context(flowing(sender, receiver, subject)))
        yield flows


async def stopped(flows: Sequence[Flow]) -> None:
    await asyncio.gather(*(flow.stop() for flow in flows))


async def connected(
    cluster: NatsCluster, stack: contextlib.AsyncExitStack, role: str, number: int
) -> NatsBus:
    """A connection that begins at server `number` and knows all of them."""
    while True:
        bus = await NatsBus.connect(cluster.url(role), name=f"{role}-{number}", timeout_s=10)
        server = bus._client._current_server
        if server is not None and server.uri.port == cluster.servers[number].port:
            stack.push_async_callback(bus.close)
            return bus
        await bus.close()


@dataclass
class Renewals:
    """A leader that renews its record by compare and set, as schedulers do."""

    bucket: KeyValue
    written: list[tuple[float, int]] = field(default_factory=list)
    num_failed: int = 0

    async def run(self) -> None:
        revision = await self.bucket.put("leader", b"0")
        number = confirmed = 0
        while True:
            await asyncio.sleep(0.05)
            number += 1
            try:
                revision = await self.bucket.update("leader", b"%d" % number, revision)
            except BusError:  # it may have been written all the same: the record itself tells
                self.num_failed += 1
                with contextlib.suppress(BusError):
                    entry = await self.bucket.get("leader")
                    assert entry is not None
                    assert confirmed <= int(entry.value) <= number  # what was confirmed is never undone
                    revision, confirmed = entry.revision, int(entry.value)
            else:
                confirmed = number
                self.written.append((time.monotonic(), number))


@asynccontextmanager
async def renewing(bucket: KeyValue) -> AsyncIterator[Renewals]:
    renewals = Renewals(bucket)
    task = asyncio.create_task(renewals.run())
    try:
        await eventually(lambda: renewals.written)
        yield renewals
        assert not task.done(), task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def opened(bus: NatsBus) -> tuple[KeyValue, MessageLog]:
    log = await bus.message_log(subjects.OUT_LOG, [subjects.ALL_OUT], max_age_s=600, max_bytes=64 << 20)
    return await bus.key_value(subjects.STREAMS_BUCKET, max_age_s=600), log


async def numbers_in(log: MessageLog, subject: str) -> list[int]:
    return [int(stored.data) async for stored in log.read(subject, 1)]


async def has_replicas(cluster: NatsCluster, stream: str, wanted: int, timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while (number := await cluster.num_replicas(stream)) != wanted:
        assert time.monotonic() < deadline_s, f"{stream} has {number} copies"
        await asyncio.sleep(0.1)


async def written_after(renewals: Renewals, since_s: float, timeout_s: float) -> None:
    await eventually(lambda: renewals.written[-1][0] > since_s, timeout_s=timeout_s)


@pytest.mark.slow
async def test_any_server_may_be_killed_while_all_flows(cluster):
    """Each in turn, among them the leaders of bucket and log."""
    async with traffic(cluster) as flows:
        bucket, log = await opened(flows[0].receiver)
        await has_replicas(cluster, BUCKET_STREAM, NUM_SERVERS, 10)
        await has_replicas(cluster, subjects.OUT_LOG, NUM_SERVERS, 10)
        async with renewing(bucket) as renewals:
            victims = [
                await cluster.stream_leader(BUCKET_STREAM),
                await cluster.stream_leader(subjects.OUT_LOG),
            ]
            victims += [number for number in range(NUM_SERVERS) if number not in victims]
            for victim in victims:
                killed_s = time.monotonic()
                cluster.kill(victim)
                await asyncio.sleep(2)
                for flow in flows:
                    assert flow.longest_gap_s(killed_s) < 1.0
                await written_after(renewals, time.monotonic(), 20)  # a new leader is chosen
                await cluster.start(victim)
                await cluster.ready()
                await written_after(renewals, time.monotonic(), 20)
        await cluster.stream_leader(subjects.OUT_LOG)  # the log misses what came while it had none
        calm = [flow.num_published for flow in flows]
        await asyncio.sleep(1)
        await stopped(flows)
        for flow, first in zip(flows, calm, strict=True):
            flow.assert_nothing_lost_in_silence()
            kept = await numbers_in(log, flow.subject)
            assert kept == sorted(set(kept))
            assert {number for number in flow.sent if number > first} <= set(kept) <= set(flow.sent)


@pytest.mark.slow
async def test_all_killed_for_three_seconds(cluster):
    async with traffic(cluster) as flows:
        bucket, log = await opened(flows[0].receiver)
        await has_replicas(cluster, subjects.OUT_LOG, NUM_SERVERS, 10)
        await bucket.put("k", b"kept")
        before = await numbers_in(log, flows[0].subject)
        cluster.kill()
        await eventually(lambda: not any(flow.receiver.is_connected for flow in flows))
        await asyncio.sleep(3)
        refused = [len(flow.refused) for flow in flows]
        assert all(refused)
        await cluster.start()
        started_s = time.monotonic()
        buses = [bus for flow in flows for bus in (flow.sender, flow.receiver)]
        await eventually(lambda: all(bus.is_connected for bus in buses), timeout_s=HEALED_S)
        await eventually(
            lambda: all(max(flow.got) > flow.num_published - 50 for flow in flows), timeout_s=HEALED_S
        )
        assert time.monotonic() - started_s < HEALED_S
        await cluster.ready()
        await cluster.stream_leader(subjects.OUT_LOG)
        await cluster.stream_leader(BUCKET_STREAM)
        await until_kept(log, before[-1] + 1)
        assert (await numbers_in(log, flows[0].subject))[: len(before)] == before
        entry = await bucket.get("k")
        assert entry is not None
        assert entry.value == b"kept"
        await stopped(flows)
        for flow in flows:
            flow.assert_nothing_lost_in_silence()


async def test_a_stopped_server_is_left_and_the_others_go_on(cluster):
    async with traffic(cluster) as flows:
        stopped_s = time.monotonic()
        cluster.pause(1)
        await asyncio.sleep(HEALED_S + 1)
        for flow in flows:
            assert flow.longest_gap_s(stopped_s + HEALED_S) < 0.5
        cluster.resume(1)
        await asyncio.sleep(1)
        for flow in flows:
            assert all(len(arrivals) == 1 for arrivals in flow.got.values())
            for bus in (flow.sender, flow.receiver):
                assert bus.counters["disconnects"] <= 1


@pytest.mark.parametrize("direction", [None, "up", "down"])
async def test_a_server_cut_off_from_the_others_is_noticed(direction):
    """Clients of both sides learn that something may be lost, and again when it is healed."""
    async with running_cluster(with_route_proxies=True) as cluster, traffic(cluster) as flows:
        buses = [bus for flow in flows for bus in (flow.sender, flow.receiver)]
        before = [bus.counters["cluster_changes"] for bus in buses]
        cluster.cut_off(2, direction)

        def all_told() -> bool:
            return all(
                bus.counters["cluster_changes"] > number for bus, number in zip(buses, before, strict=True)
            )

        await eventually(all_told, timeout_s=NOTICED_S + 1)
        await asyncio.sleep(2)
        before = [bus.counters["cluster_changes"] for bus in buses]
        cluster.heal()
        healed_s = time.monotonic()
        await eventually(all_told, timeout_s=HEALED_S)
        await asyncio.sleep(max(healed_s + HEALED_S - time.monotonic(), 0) + 0.5)
        for flow in flows:
            assert flow.longest_gap_s(healed_s + HEALED_S) < 0.4
        await stopped(flows)
        for flow in flows:
            flow.assert_nothing_lost_in_silence(within_s=12)
        assert not any(
            bus.counters["disconnects"] for bus in buses
        )  # every client had its server all the time


async def test_two_of_three_servers_make_streams_and_the_third_gets_its_copies():
    with tempfile.TemporaryDirectory() as directory:
        cluster = NatsCluster(Path(directory))
        try:
            await cluster.start(0, 1)
            await cluster.meta_leader()
            bus = await NatsBus.connect(cluster.url("gateway"), name="g", timeout_s=10)
            bucket, _ = await opened(bus)
            await bucket.put("k", b"1")
            assert await cluster.num_replicas(BUCKET_STREAM) == 1
            await cluster.start(2)
            for stream in (BUCKET_STREAM, subjects.OUT_LOG):
                await has_replicas(cluster, stream, NUM_SERVERS, 40)
            await bucket.put("k", b"2")
            await bus.close()
        finally:
            await cluster.stop()


async def test_a_server_that_retires_is_left_in_time(cluster):
    async with traffic(cluster) as flows:
        began_s = time.monotonic()
        os.kill(cluster.servers[0].pid, signal.SIGUSR2)  # lame duck
        await asyncio.wait_for(cluster.servers[0].wait(), 20)
        await asyncio.sleep(0.5)
        assert sum(flow.sender.counters["lame_ducks"] for flow in flows) >= 1
        for flow in flows:
            assert flow.longest_gap_s(began_s) < 0.6
        await stopped(flows)
        for flow in flows:
            flow.assert_nothing_lost_in_silence()


async def test_one_url_finds_the_others(cluster):
    server = cluster.servers[0]
    bus = await NatsBus.connect(server.url("gateway"), name="one", timeout_s=10)
    several = await NatsBus.connect(cluster.url("gateway"), name="several", timeout_s=10)
    assert len(bus._client._server_pool) == len(several._client._server_pool) == NUM_SERVERS
    cluster.kill(0)
    await eventually(lambda: bus.counters["reconnects"] == 1)
    await bus.close()
    await several.close()


def addressed(servers: Sequence[EmbeddedNats]) -> str:
    return ", ".join(server.url("gateway") for server in servers)


async def test_each_url_has_its_own_password():
    async with running_server() as one, running_server() as other:
        assert one._passwords != other._passwords
        assert set(one._passwords) == set(ROLES)
        bus = await NatsBus.connect(addressed([one, other]), name="g", timeout_s=5)
        for server in (one, other, one):
            await server.restart() if server is one else None
            os.kill(server.pid, signal.SIGKILL)
            await server.wait()
            await eventually(lambda: bus.is_connected)
            await server.start()
        await bus.close()


def test_urls_are_split_at_commas():
    assert split_urls(" nats://a:1,nats://b:2 , nats://c") == ["nats://a:1", "nats://b:2", "nats://c"]
    assert split_urls(["nats://a:1", "nats://b"]) == ["nats://a:1", "nats://b"]
    for nothing in ("", " , ", []):
        with pytest.raises(ValueError, match="no NATS URL"):
            split_urls(nothing)


async def test_all_urls_name_one_user():
    with pytest.raises(ValueError, match="same user"):
        await NatsBus.connect("nats://gateway:a@127.0.0.1:1,nats://tool:a@127.0.0.1:2", name="x", timeout_s=1)
