"""The NATS bus behind a path that is cut, one way too, slow, or reset: noticed, healed, no silent loss."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from pagebus.bus.nats_bus import NatsBus
from pagebus.bus.protocol import NotConnectedError
from tests.support.flow import flowing
from tests.support.nats import eventually, open_server
from tests.support.proxy import TcpProxy

NOTICED_S = 3.0
HEALED_S = 3.0


@dataclass
class Pair:
    """Two connections to one server: `cut` goes through the proxy, `other` does not."""

    cut: NatsBus
    other: NatsBus
    proxy: TcpProxy


@pytest.fixture
async def pair(tmp_path) -> AsyncIterator[Pair]:
    async with open_server(tmp_path, 'ping_interval: "2s"\nping_max: 2\nwrite_deadline: "2s"') as server:
        with TcpProxy(server.port, seed=3) as proxy:
            url = server.url("client")
            cut = await NatsBus.connect(proxy.url(url), name="cut", timeout_s=5)
            other = await NatsBus.connect(url, name="other", timeout_s=5)
            try:
                yield Pair(cut, other, proxy)
            finally:
                proxy.heal()
                await cut.close()
                await other.close()


@pytest.mark.parametrize(
    ("direction", "num_unsent_bytes"), [("both", 0), ("both", 4 << 20), ("up", 0), ("down", 0)]
)
async def test_a_silent_path_is_given_up_and_healed(pair, direction, num_unsent_bytes):
    async with flowing(pair.cut, pair.other, "away") as away, flowing(pair.other, pair.cut, "back") as back:
        began_s = time.monotonic()
        pair.proxy.cut() if direction == "both" else pair.proxy.cut_one_way(direction)
        for _ in range(num_unsent_bytes >> 19):
            await pair.cut.publish("bulk", bytes(1 << 19))
        await eventually(lambda: not pair.cut.is_connected, timeout_s=NOTICED_S)
        with pytest.raises(NotConnectedError):
            await pair.cut.publish("away", b"0")
        assert pair.other.is_connected
        await asyncio.sleep(max(began_s + 4 - time.monotonic(), 0))  # some attempts fail meanwhile
        healed_s = time.monotonic()
        pair.proxy.heal()
        await eventually(lambda: pair.cut.is_connected, timeout_s=HEALED_S)
        await eventually(lambda: away.longest_gap_s(healed_s + HEALED_S) < 0.5, timeout_s=HEALED_S + 2)
        assert back.longest_gap_s(healed_s + HEALED_S) < 0.5
        assert pair.cut.counters["disconnects"] == pair.cut.counters["reconnects"] == 1
        assert pair.other.counters["disconnects"] == 0
        await asyncio.gather(away.stop(), back.stop())
    for flow in (away, back):
        flow.assert_nothing_lost_in_silence(within_s=4 + HEALED_S + 1)


async def test_attempts_on_a_silent_path_leave_no_sockets(pair):
    pair.proxy.cut()
    await eventually(lambda: not pair.cut.is_connected, timeout_s=NOTICED_S)
    await asyncio.sleep(5)
    assert pair.proxy.num_accepted >= 3  # several were tried
    pair.proxy.heal()
    await eventually(lambda: pair.cut.is_connected, timeout_s=HEALED_S)
    await eventually(lambda: pair.proxy.num_connections == 1)


async def test_a_request_on_a_silent_path_fails_when_that_is_noticed(pair):
    await pair.other.subscribe("ask", lambda message: None)
    pair.proxy.cut()
    began_s = time.monotonic()
    with pytest.raises(NotConnectedError):
        await pair.cut.request("ask", b"", timeout_s=30)
    assert time.monotonic() - began_s < NOTICED_S


async def test_close_on_a_silent_path_ends(pair):
    pair.proxy.cut()
    for _ in range(8):
        await pair.cut.publish("bulk", bytes(1 << 19))
    began_s = time.monotonic()
    await pair.cut.close()
    assert time.monotonic() - began_s < 6


async def test_a_slow_path_is_no_dead_one(pair):
    pair.proxy.delay_s = 0.2
    async with flowing(pair.cut, pair.other, "away") as away, flowing(pair.other, pair.cut, "back") as back:
        began_s = time.monotonic()
        await asyncio.sleep(4)
        assert away.longest_gap_s(began_s) < 1
        assert back.longest_gap_s(began_s) < 1
        pair.proxy.reset_all()  # a handshake takes several ways
        await eventually(lambda: pair.cut.counters["reconnects"] == 1, timeout_s=HEALED_S + 1)
        assert pair.cut.counters["disconnects"] == 1


async def test_random_resets_lose_nothing_in_silence(pair):
    async with flowing(pair.cut, pair.other, "away") as away, flowing(pair.other, pair.cut, "back") as back:
        pair.proxy.reset_at_random(0.4)
        await asyncio.sleep(5)
        pair.proxy.heal()
        await eventually(lambda: pair.cut.is_connected, timeout_s=HEALED_S)
        healed_s = time.monotonic()
        await asyncio.sleep(0.5)
        assert away.longest_gap_s(healed_s) < 0.4
        assert pair.cut.counters["reconnects"] >= 3
        await asyncio.gather(away.stop(), back.stop())
    for flow in (away, back):
        flow.assert_nothing_lost_in_silence()


async def test_refused_connections_are_tried_again(pair):
    pair.proxy.refuse()
    pair.proxy.reset_all()
    await eventually(lambda: not pair.cut.is_connected)
    await asyncio.sleep(1)
    assert not pair.cut.is_connected
    pair.proxy.heal()
    await eventually(lambda: pair.cut.is_connected, timeout_s=1.5)
