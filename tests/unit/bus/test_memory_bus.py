import asyncio
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagebus.bus.faults import SeededFaults
from pagebus.bus.memory import MemoryBroker, MemoryBus
from pagebus.bus.protocol import Bus, Msg, NotConnectedError, RequestTimeoutError
from tests.support.buses import CHECKS


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_does_what_every_bus_does(check):
    broker = MemoryBroker()
    await check(broker.connect(), broker.connect())


async def test_a_lone_bus_hears_itself():
    bus: Bus = MemoryBus()
    got: list[Msg] = []
    await bus.subscribe("a", got.append)
    await bus.publish("a", b"1")
    assert got == []  # never from within publish
    await asyncio.sleep(0)
    assert [message.data for message in got] == [b"1"]


async def test_what_is_under_way_to_a_cut_connection_is_lost():
    broker = MemoryBroker()
    sender, receiver = broker.connect(), broker.connect()
    got: list[bytes] = []
    reconnects = []

    async def reconnected() -> None:
        reconnects.append(1)
        await receiver.publish("up", b"")

    receiver.on_reconnect(reconnected)
    await receiver.subscribe("a", lambda message: got.append(message.data))
    await sender.publish("a", b"1")
    receiver.disconnect()
    assert not receiver.is_connected
    await sender.publish("a", b"2")
    with pytest.raises(NotConnectedError):
        await receiver.publish("a", b"")
    with pytest.raises(NotConnectedError):
        await receiver.key_value("b")
    receiver.reconnect()
    await sender.publish("a", b"3")
    await asyncio.sleep(0.01)
    assert got == [b"3"]
    assert reconnects == [1]


async def test_a_closed_connection_receives_and_sends_nothing():
    broker = MemoryBroker()
    one, other = broker.connect(), broker.connect()
    got: list[Msg] = []
    await other.subscribe("a", got.append)
    await one.publish("a", b"")
    await one.close()
    await asyncio.sleep(0)
    assert len(got) == 1  # sent before it closed
    await other.close()
    assert broker.subscriptions == {}
    with pytest.raises(NotConnectedError):
        await other.publish("a", b"")
    with pytest.raises(NotConnectedError):
        await other.subscribe("a", got.append)


async def run_with_faults(seed: int) -> list[int]:
    broker = MemoryBroker(faults=SeededFaults(seed, loss=0.2, duplication=0.2, delay=0.3, max_delay_s=0.02))
    sender, receiver = broker.connect("sender"), broker.connect("receiver")
    got: list[int] = []
    await receiver.subscribe("a", lambda message: got.append(int(message.data)))
    for number in range(300):
        await sender.publish("a", b"%d" % number)
    await asyncio.sleep(0.1)
    return got


async def test_seeded_faults_lose_double_and_reorder():
    got = await run_with_faults(1)
    assert 180 < len(set(got)) < 280
    assert len(got) > len(set(got))
    assert got != sorted(got)
    other = await run_with_faults(2)
    assert set(other) != set(got)


def test_a_seed_decides_alone():
    first, second = (SeededFaults(7, loss=0.3, duplication=0.3, delay=0.5, max_delay_s=1.0) for _ in range(2))
    random.seed(1)
    one = [first.delays_s("a", "x", "y") for _ in range(50)]
    random.seed(2)
    assert one == [second.delays_s("a", "x", "y") for _ in range(50)]


def test_faults_spare_what_they_are_told_to_spare():
    faults = SeededFaults(1, loss=1.0, spare=lambda subject: subject.startswith("safe."))
    assert faults.delays_s("safe.a", "x", "y") == (0.0,)
    assert faults.delays_s("a", "x", "y") == ()


@pytest.mark.parametrize("loss", [-0.1, 1.1])
def test_a_probability_is_one(loss):
    with pytest.raises(ValueError, match="loss"):
        SeededFaults(1, loss=loss)


async def test_what_is_kept_outlives_connections():
    broker = MemoryBroker()
    one, other = broker.connect(), broker.connect()
    log = await one.message_log("log", ["out.*"], max_age_s=60, max_bytes=1 << 20)
    bucket = await one.key_value("bucket")
    await bucket.put("k", b"1")
    await one.publish("out.a", b"1")
    one.disconnect()
    await other.publish("out.a", b"2")
    for use in (log.last_sequence(), anext(aiter(log.read("out.a", 1))), bucket.get("k")):
        with pytest.raises(NotConnectedError):
            await use
    await one.close()
    same = await other.message_log("log", ["out.*"], max_age_s=60, max_bytes=1 << 20)
    assert [stored async for stored in same.read("out.a", 1)] == [(1, b"1"), (2, b"2")]
    assert await (await other.key_value("bucket")).get("k") == (b"1", 1)


async def test_a_store_that_is_away_raises_and_keeps_nothing():
    broker = MemoryBroker()
    bus = broker.connect()
    log = await bus.message_log("log", ["out.*"], max_age_s=60, max_bytes=1 << 20)
    bucket = await bus.key_value("bucket")
    await bus.publish("out.a", b"1")
    broker.store.is_available = False
    await bus.publish("out.a", b"2")  # delivery does not care
    for use in (
        log.last_sequence(),
        anext(aiter(log.read("out.a", 1))),
        bucket.put("k", b"1"),
        bus.key_value("bucket"),
        bus.message_log("log", ["out.*"], max_age_s=60, max_bytes=1 << 20),
    ):
        with pytest.raises(RequestTimeoutError):
            await use
    broker.store.is_available = True
    await bus.publish("out.a", b"3")
    assert [stored async for stored in log.read("out.a", 1)] == [(1, b"1"), (2, b"3")]


async def test_a_wiped_store_begins_anew():
    broker = MemoryBroker()
    bus = broker.connect()
    log = await bus.message_log("log", ["out.*"], max_age_s=60, max_bytes=1 << 20)
    bucket = await bus.key_value("bucket")
    await bucket.put("k", b"1")
    await bus.publish("out.a", b"1")
    broker.store.wipe()
    await bus.publish("out.a", b"missed: nobody has made the log again")
    assert await log.last_sequence() == 0
    await bus.publish("out.a", b"2")
    assert [stored async for stored in log.read("out.a", 1)] == [(1, b"2")]
    assert await bucket.get("k") is None
    assert await bucket.create("k", b"2") == 1


async def test_a_log_forgets_by_age():
    broker = MemoryBroker()
    bus = broker.connect()
    log = await bus.message_log("log", ["out.*"], max_age_s=0.2, max_bytes=1 << 20)
    await bus.publish("out.a", b"1")
    await asyncio.sleep(0.15)
    await bus.publish("out.a", b"2")
    await asyncio.sleep(0.1)
    assert [stored async for stored in log.read("out.a", 1)] == [(2, b"2")]
    assert await log.last_sequence() == 2


async def test_a_read_goes_on_with_what_comes_meanwhile():
    broker = MemoryBroker()
    bus = broker.connect()
    log = await bus.message_log("log", ["out.>"], max_age_s=60, max_bytes=1 << 20)
    await bus.publish("out.a", b"1")
    got = []
    async for stored in log.read("out.a", 1):
        got.append(stored)
        if len(got) < 5:
            await bus.publish("out.b.c", b"")
            await bus.publish("out.a", b"%d" % (len(got) + 1))
    assert got == [(2 * number - 1, b"%d" % number) for number in range(1, 6)]


@given(
    sent=st.lists(st.tuples(st.sampled_from(["out.a", "out.b", "life.a"]), st.integers(0, 120)), max_size=60),
    max_bytes=st.integers(50, 3000),
    first=st.integers(0, 70),
)
def test_a_log_keeps_the_newest_of_its_subjects(sent, max_bytes, first):
    async def check() -> None:
        bus = MemoryBus()
        log = await bus.message_log("log", ["out.*"], max_age_s=60, max_bytes=max_bytes)
        kept: list[tuple[int, str, bytes]] = []
        for subject, size in sent:
            data = bytes(size)
            await bus.publish(subject, data)
            if subject != "life.a":
                kept.append((len(kept) + 1, subject, data))
        assert await log.last_sequence() == len(kept)
        room = max_bytes
        newest = 0
        while newest < len(kept) and (room := room - len(kept[-1 - newest][2]) - len("out.a") - 32) >= 0:
            newest += 1
        for subject in ("out.a", "out.b"):
            expected = [
                (number, data)
                for number, one, data in kept[len(kept) - newest :]
                if one == subject and number >= first
            ]
            assert [stored async for stored in log.read(subject, first)] == expected

    asyncio.run(check())
