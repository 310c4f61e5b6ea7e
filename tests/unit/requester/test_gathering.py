"""Ids that gather while the loop is behind are told together, each once and in order; an idle loop waits for
nothing."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from pagebus.bus.memory import MemoryBus
from pagebus.bus.messages import Failed, TokenRow, Tokens, encode, pack_ids
from pagebus.requester.client import Requester
from pagebus.requester.events import Event, NewTokens, RequestFailed, RequestSpec
from pagebus.requester.gathering import MOST_A_TURN, Gathering

MODEL = "m"


@asynccontextmanager
async def requester(interval: int) -> AsyncIterator[tuple[Requester, MemoryBus]]:
    bus = MemoryBus()
    made = Requester(bus, model=MODEL, instance="gw", stream_interval=interval, rng=random.Random(1))
    await made.start()
    yield made, bus
    await made.close()


def spec(num_choices: int = 1) -> RequestSpec:
    return RequestSpec(request_id="r", prompt=[1], num_choices=num_choices, max_tokens=1000)


async def send(bus: MemoryBus, *rows: TokenRow) -> None:
    await bus.publish("pagebus.out.gw", encode(Tokens(epoch=1, rows=rows)))


def row(index: int, ids: list[int], choice: int = 0, **fields) -> TokenRow:
    return TokenRow(request_id="r", choice=choice, index=index, ids=pack_ids(ids), **fields)


async def settle() -> None:
    for _ in range(8):
        await asyncio.sleep(0)


def told(events: list[Event]) -> list[tuple[int, int, list[int]]]:
    return [(e.choice, e.index, list(e.ids)) for e in events if isinstance(e, NewTokens)]


async def test_what_came_before_the_loop_turned_is_told_together():
    async with requester(0) as (made, bus):
        events: list[Event] = []
        made.submit(spec(2), events.append)
        await send(bus, row(0, [5], num_cached=0), row(0, [6], 1))
        await settle()
        events.clear()
        for index in range(1, 5):
            await send(bus, row(index, [10 + index]), row(index, [20 + index], 1))
        await settle()
        assert told(events) == [(0, 1, [11, 12, 13, 14]), (1, 1, [21, 22, 23, 24])]


async def test_an_idle_loop_tells_each_id_by_itself():
    async with requester(0) as (made, bus):
        events: list[Event] = []
        made.submit(spec(), events.append)
        for index in range(4):
            await send(bus, row(index, [index]))
            await settle()
        assert told(events) == [(0, index, [index]) for index in range(4)]


async def test_without_gathering_every_message_is_told_at_once():
    async with requester(1) as (made, bus):
        events: list[Event] = []
        made.submit(spec(), events.append)
        for index in range(4):
            await send(bus, row(index, [index]))
        await settle()
        assert told(events) == [(0, index, [index]) for index in range(4)]


async def test_an_interval_holds_ids_until_there_are_enough_but_neither_the_first_nor_the_last():
    async with requester(3) as (made, bus):
        events: list[Event] = []
        made.submit(spec(), events.append)
        for index in range(9):
            await send(bus, row(index, [index]))
            await settle()
        await send(bus, row(9, [9], finish_reason="stop"))
        await settle()
        assert told(events) == [
            (0, 0, [0]),
            (0, 1, [1, 2, 3]),
            (0, 4, [4, 5, 6]),
            (0, 7, [7, 8]),
            (0, 9, [9]),
        ]
        assert events[-1].finish_reason == "stop"


async def test_what_has_gathered_comes_before_an_end_and_before_a_failure():
    async with requester(0) as (made, bus):
        events: list[Event] = []
        made.submit(spec(), events.append)
        await send(bus, row(0, [1]))
        await settle()
        await send(bus, row(1, [2]))
        await send(bus, row(2, [3]))
        await bus.publish(
            "pagebus.out.gw", encode(Failed(request_id="r", attempt=1, code="broken", message="no"))
        )
        await settle()
        assert told(events) == [(0, 0, [1]), (0, 1, [2, 3])]
        assert isinstance(events[-1], RequestFailed)
        assert made.num_live == 0


async def test_a_released_request_was_told_all_that_it_received():
    async with requester(64) as (made, bus):
        events: list[Event] = []
        made.submit(spec(), events.append)
        await send(bus, row(0, [1]))
        await send(bus, row(1, [2]))
        await settle()
        state = made.release("r")
        assert state is not None
        assert [list(choice.ids) for choice in state.received()] == [[1, 2]]
        assert [token for _, _, ids in told(events) for token in ids] == [1, 2]


@pytest.mark.parametrize("cancels", [True, False])
async def test_nothing_is_told_of_what_its_owner_ended(cancels: bool):
    async with requester(0) as (made, bus):
        events: list[Event] = []
        ticket = made.submit(spec(2), events.append)
        await send(bus, row(0, [1]), row(0, [1], 1))
        await settle()
        events.clear()
        await send(bus, row(1, [2]), row(1, [2], 1))
        if cancels:
            ticket.cancel()
        else:
            ticket.end_choice(0)
        await settle()
        assert told(events) == ([] if cancels else [(1, 1, [2])])


@pytest.mark.parametrize("interval", [0, 1, 2, 5])
@pytest.mark.parametrize("seed", range(6))
async def test_every_id_is_told_once_and_in_order(interval: int, seed: int):
    """Rows doubled, overlapping, of several ids; turns of the loop in between at random."""
    rng = random.Random(seed)
    async with requester(interval) as (made, bus):
        events: list[Event] = []
        made.submit(spec(3), events.append)
        have = [0, 0, 0]
        for _ in range(200):
            choice = rng.randrange(3)
            start = max(0, have[choice] - rng.choice((0, 0, 0, 1, 2)))
            end = have[choice] + rng.choice((0, 1, 1, 1, 3))
            fields = {"num_cached": 0} if rng.random() < 0.1 else {}
            await send(bus, row(start, [*range(start, end)], choice, **fields))
            have[choice] = max(have[choice], end)
            if rng.random() < 0.3:
                await settle()
        for choice, end in enumerate(have):
            await send(bus, row(end, [end], choice, finish_reason="length"))
        await settle()
        for choice, end in enumerate(have):
            parts = [(index, ids) for number, index, ids in told(events) if number == choice]
            assert [token for _, ids in parts for token in ids] == [*range(end + 1)]
            assert [index for index, _ in parts] == [ids[0] for _, ids in parts]
        assert sum(isinstance(e, NewTokens) and e.finish_reason == "length" for e in events) == 3


class _Request:
    is_gathered = False


async def test_a_stream_of_messages_that_does_not_end_is_told_in_between():
    """No turn tells more than its share, so that messages are taken in between; nobody is passed over."""
    told_ids: list[int] = []
    gathering: Gathering[_Request] = Gathering(0, lambda request, at_least: told_ids.append(id(request)))
    requests = [_Request() for _ in range(3 * MOST_A_TURN + 5)]
    for turn in range(8):
        for request in requests:  # all of them have news again
            gathering.add(request)
        await asyncio.sleep(0)
        assert len(told_ids) == (turn + 1) * MOST_A_TURN
    times_told = Counter(told_ids)
    assert {times_told[id(request)] for request in requests} == {2, 3}


async def test_a_request_that_cannot_be_told_keeps_no_other_waiting():
    told_requests: list[_Request] = []

    def tell(request: _Request, at_least: int) -> None:
        if request is broken:
            raise RuntimeError
        told_requests.append(request)

    broken, good = _Request(), _Request()
    gathering: Gathering[_Request] = Gathering(0, tell)
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
    gathering.add(broken)
    gathering.add(good)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert told_requests == [good]
