"""What every bus must do, as a table of checks that run on the memory bus and on a real nats-server alike."""

import asyncio

import pytest

from pagebus.bus.protocol import (
    Bus,
    InvalidMessageError,
    MessageLog,
    Msg,
    NoRespondersError,
    PayloadTooLargeError,
    RequestTimeoutError,
    WrongRevisionError,
)
from tests.support.nats import eventually


async def delivers_in_order_to_every_subscriber(one: Bus, other: Bus) -> None:
    first: list[Msg] = []
    second: list[Msg] = []
    await other.subscribe("pagebus.x.>", first.append)
    await other.subscribe("pagebus.*.y", second.append)
    for number in range(200):
        await one.publish("pagebus.x.y", b"%d" % number)
    await eventually(lambda: len(first) == len(second) == 200)
    assert [int(message.data) for message in first] == list(range(200))
    assert first == second
    assert first[0].subject == "pagebus.x.y"


async def knows_a_subscription_when_subscribe_returns(one: Bus, other: Bus) -> None:
    for number in range(50):
        got: list[Msg] = []
        await other.subscribe(f"pagebus.new.{number}", got.append)
        await one.publish(f"pagebus.new.{number}", b"")
        await eventually(lambda got=got: got)


async def carries_reply_and_headers(one: Bus, other: Bus) -> None:
    got: list[Msg] = []
    await other.subscribe("pagebus.a.b", got.append)
    data, headers = b"\x00\r\n\xff", {"traceparent": "00-ab", "b": ""}
    await one.publish("pagebus.a.b", data, reply="pagebus.r.s", headers=headers)
    await eventually(lambda: got)
    assert got == [Msg("pagebus.a.b", data, "pagebus.r.s", headers)]


async def gives_a_queue_group_one_copy(one: Bus, other: Bus) -> None:
    members: list[list[Msg]] = [[], [], []]
    everybody: list[Msg] = []
    for got in members:
        await other.subscribe("pagebus.q", got.append, queue="workers")
    await other.subscribe("pagebus.q", everybody.append)
    for _ in range(100):
        await one.publish("pagebus.q", b"")
    await eventually(lambda: len(everybody) == 100)
    await eventually(lambda: sum(map(len, members)) == 100)


async def stops_on_unsubscribe(one: Bus, other: Bus) -> None:
    got: list[Msg] = []
    marks: list[Msg] = []
    subscription = await other.subscribe("pagebus.a.b", got.append)
    await other.subscribe("pagebus.mark", marks.append)
    await subscription.unsubscribe()
    await subscription.unsubscribe()
    await one.publish("pagebus.a.b", b"")
    await one.publish("pagebus.mark", b"")
    await eventually(lambda: marks)
    assert got == []


async def survives_a_handler_that_raises(one: Bus, other: Bus) -> None:
    got: list[int] = []

    def handle(message: Msg) -> None:
        got.append(1 // int(message.data))

    await other.subscribe("pagebus.a.b", handle)
    for number in (b"0", b"1"):
        await one.publish("pagebus.a.b", number)
    await eventually(lambda: got == [1])


async def answers_requests(one: Bus, other: Bus) -> None:
    tasks: list[asyncio.Task[None]] = []

    def echo(message: Msg) -> None:
        tasks.append(asyncio.ensure_future(other.publish(message.reply, message.data + b"!")))

    await other.subscribe("pagebus.echo", echo)
    answers = await asyncio.gather(*[one.request("pagebus.echo", b"%d" % n, timeout_s=5) for n in range(20)])
    assert [answer.data for answer in answers] == [b"%d!" % n for n in range(20)]


async def says_when_nobody_answers(one: Bus, other: Bus) -> None:
    with pytest.raises(NoRespondersError):
        await one.request("pagebus.nobody", b"", timeout_s=5)
    await other.subscribe("pagebus.silent", lambda message: None)
    with pytest.raises(RequestTimeoutError):
        await one.request("pagebus.silent", b"", timeout_s=0.05)


async def tells_a_publisher_that_nobody_listens(one: Bus, other: Bus) -> None:
    got: list[Msg] = []
    await one.subscribe("pagebus.back", got.append)
    await one.publish("pagebus.nobody", b"x", reply="pagebus.back")
    await eventually(lambda: got)
    assert got[0].is_no_responders
    assert got[0].subject == "pagebus.back"
    await other.subscribe("pagebus.somebody", lambda message: None)
    await one.publish("pagebus.somebody", b"x", reply="pagebus.back")
    await one.publish("pagebus.back", b"")
    await eventually(lambda: len(got) == 2)
    assert not got[1].is_no_responders


async def refuses_what_cannot_be_sent(one: Bus, other: Bus) -> None:
    got: list[Msg] = []
    await other.subscribe("pagebus.>", got.append)
    for subject in ("pagebus.*", "pagebus.>", "", "pagebus.a b", "pagebus.a\r\nPUB pagebus.b 0\r\n"):
        with pytest.raises(InvalidMessageError):
            await one.publish(subject, b"")
        with pytest.raises(InvalidMessageError):
            await one.publish("pagebus.a", b"", reply=subject or "*")
    limit = one.max_payload
    overhead = len("NATS/1.0\r\na: b\r\n\r\n")
    with pytest.raises(PayloadTooLargeError):
        await one.publish("pagebus.a", bytes(limit + 1))
    with pytest.raises(PayloadTooLargeError):
        await one.publish("pagebus.a", bytes(limit - overhead + 1), headers={"a": "b"})
    await one.publish("pagebus.a", bytes(limit))
    await one.publish("pagebus.a", bytes(limit - overhead), headers={"a": "b"})
    await eventually(lambda: len(got) == 2)
    assert one.is_connected


async def compares_and_sets(one: Bus, other: Bus) -> None:
    mine, theirs = await asyncio.gather(one.key_value("pagebus"), other.key_value("pagebus"))
    assert await mine.get("leader.m") is None
    created = await asyncio.gather(
        mine.create("leader.m", b"1"), theirs.create("leader.m", b"2"), return_exceptions=True
    )
    assert sorted(type(result).__name__ for result in created) == ["WrongRevisionError", "int"]
    entry = await mine.get("leader.m")
    assert entry is not None
    assert entry.value == (b"1" if isinstance(created[0], int) else b"2")
    revision = await mine.update("leader.m", b"3", entry.revision)
    assert revision > entry.revision
    with pytest.raises(WrongRevisionError):
        await theirs.update("leader.m", b"4", entry.revision)
    assert await theirs.put("leader.m", b"5") > revision
    newest = await mine.get("leader.m")
    assert newest is not None
    assert newest.value == b"5"
    with pytest.raises(WrongRevisionError):
        await mine.update("other", b"", 7)


async def forgets_values_that_are_too_old(one: Bus, other: Bus) -> None:
    mine, theirs = await asyncio.gather(
        one.key_value("aging", max_age_s=1.0), other.key_value("aging", max_age_s=1.0)
    )
    await mine.create("k", b"1")
    assert await theirs.get("k") is not None
    with pytest.raises(WrongRevisionError):
        await theirs.create("k", b"2")
    await asyncio.sleep(2.0)
    assert await theirs.get("k") is None
    await theirs.create("k", b"2")
    newest = await mine.get("k")
    assert newest is not None
    assert newest.value == b"2"


async def keeps_what_was_published_in_a_log(one: Bus, other: Bus) -> None:
    before: list[Msg] = []
    await other.subscribe("pagebus.out.*", before.append)
    log = await one.message_log("kept", ["pagebus.out.*"], max_age_s=600, max_bytes=64 << 20)
    assert await log.last_sequence() == 0
    assert [stored async for stored in log.read("pagebus.out.a", 1)] == []
    sent: dict[str, list[bytes]] = {"pagebus.out.a": [], "pagebus.out.b": []}
    for number in range(1500):
        subject = f"pagebus.out.{'ab'[number % 3 == 0]}"
        data = b"%d" % number * (number % 7)
        sent[subject].append(data)
        await one.publish(subject, data, headers={"h": "1"} if number % 2 else None)
    await one.publish("pagebus.life.a", b"not kept")
    await eventually(lambda: len(before) == 1500)
    same = await other.message_log("kept", ["pagebus.out.*"], max_age_s=600, max_bytes=64 << 20)
    for _ in range(200):  # a log is filled beside delivery: it may be a moment behind
        if await same.last_sequence() == 1500:
            break
        await asyncio.sleep(0.01)
    assert await same.last_sequence() == 1500
    for subject, expected in sent.items():
        got = [stored async for stored in same.read(subject, 1)]
        assert [stored.data for stored in got] == expected
        assert [stored.sequence for stored in got] == sorted({stored.sequence for stored in got})
        middle = got[len(got) // 2]
        rest = [stored async for stored in log.read(subject, middle.sequence)]
        assert rest == got[len(got) // 2 :]
        assert [stored async for stored in log.read(subject, 1501)] == []
    assert [stored async for stored in same.read("pagebus.out.nobody", 0)] == []


async def reads_large_messages_from_a_log(one: Bus, other: Bus) -> None:
    log = await one.message_log("large", ["pagebus.out.*"], max_age_s=600, max_bytes=1 << 30)
    for number in range(9):
        await other.publish("pagebus.out.a", bytes([number]) * (other.max_payload - 1000))
    got = []
    while len(got) < 9:
        got = [stored async for stored in log.read("pagebus.out.a", 1)]
    assert [stored.data[:1] for stored in got] == [bytes([number]) for number in range(9)]
    assert {len(stored.data) for stored in got} == {other.max_payload - 1000}


async def gives_a_log_up_early(one: Bus, other: Bus) -> None:
    log = await one.message_log("early", ["pagebus.out.*"], max_age_s=600, max_bytes=64 << 20)
    for number in range(800):
        await one.publish("pagebus.out.a", b"%d" % number)
    await until_kept(log, 800)
    async for stored in log.read("pagebus.out.a", 3):
        assert stored.data == b"2"
        break
    both = await asyncio.gather(*[_data(log, first) for first in (1, 500)])
    assert [len(data) for data in both] == [800, 301]


async def until_kept(log: MessageLog, sequence: int) -> None:
    for _ in range(500):
        if await log.last_sequence() >= sequence:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"message {sequence} was never kept")


async def _data(log: MessageLog, first_sequence: int) -> list[bytes]:
    return [stored.data async for stored in log.read("pagebus.out.a", first_sequence)]


async def a_log_forgets_the_oldest(one: Bus, other: Bus) -> None:
    log = await one.message_log("small", ["pagebus.out.*"], max_age_s=600, max_bytes=100_000)
    for number in range(300):
        await one.publish("pagebus.out.a", b"%04d" % number * 250)
    await until_kept(log, 300)
    kept = await _data(log, 1)
    assert 50 < len(kept) < 110
    assert [int(data[:4]) for data in kept] == list(range(300 - len(kept), 300))


async def a_log_answers_no_publisher(one: Bus, other: Bus) -> None:
    await one.message_log("silent", ["pagebus.out.*"], max_age_s=600, max_bytes=1 << 20)
    with pytest.raises((NoRespondersError, RequestTimeoutError)):
        await one.request("pagebus.out.gone", b"", timeout_s=0.3)


CHECKS = [
    knows_a_subscription_when_subscribe_returns,
    delivers_in_order_to_every_subscriber,
    carries_reply_and_headers,
    gives_a_queue_group_one_copy,
    stops_on_unsubscribe,
    survives_a_handler_that_raises,
    answers_requests,
    says_when_nobody_answers,
    tells_a_publisher_that_nobody_listens,
    refuses_what_cannot_be_sent,
    compares_and_sets,
    forgets_values_that_are_too_old,
    keeps_what_was_published_in_a_log,
    reads_large_messages_from_a_log,
    gives_a_log_up_early,
    a_log_forgets_the_oldest,
    a_log_answers_no_publisher,
]
