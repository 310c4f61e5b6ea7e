import asyncio
import random

import pytest

from pagebus.bus.faults import SeededFaults
from pagebus.bus.memory import MemoryBroker, MemoryBus
from pagebus.bus.protocol import Bus, Msg, NotConnectedError
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
