"""Who leads: the decision as a table, and schedulers that meet on a memory bus."""

import asyncio
import time

import msgspec
import pytest

from pagebus.bus import subjects
from pagebus.bus.memory import MemoryBroker
from pagebus.bus.protocol import Entry
from pagebus.scheduler.leadership import Decision, Leadership, Record, Watch, has_lost

RECORD = Entry(msgspec.json.encode(Record("other", 50)), 3)


def watch(record=RECORD, **fields):
    made = Watch("me", started_s=100.0, **fields)
    made.see_record(record)
    return made


@pytest.mark.parametrize(
    ("record", "heartbeat_s", "beat_s", "now_s", "decision"),
    [
        (None, None, None, 100.0, Decision.CREATE),
        (None, 99.0, None, 100.0, Decision.WAIT),
        (RECORD, None, None, 100.0, Decision.WAIT),
        (RECORD, None, None, 101.6, Decision.TAKE_OVER),
        (RECORD, 101.0, None, 101.6, Decision.WAIT),
        (RECORD, None, 101.0, 101.6, Decision.WAIT),
        (RECORD, 101.0, 100.2, 102.6, Decision.TAKE_OVER),
        (RECORD, 100.2, 102.0, 102.6, Decision.WAIT),
        (Entry(b"{broken", 9), None, None, 100.5, Decision.WAIT),
        (Entry(b"{broken", 9), None, None, 101.6, Decision.TAKE_OVER),
    ],
)
def test_decide(record, heartbeat_s, beat_s, now_s, decision):
    made = watch(record)
    made.heartbeat_s, made.beat_s = heartbeat_s, beat_s
    assert made.decide(now_s) is decision


def test_only_a_change_of_the_beat_is_a_sign():
    made = watch()
    made.see_beat(b"1", 100.0)
    assert made.beat_s is None
    made.see_beat(b"1", 101.0)
    assert made.beat_s is None
    made.see_beat(b"2", 101.5)
    assert made.beat_s == 101.5


def test_a_heartbeat_of_an_older_term_or_of_oneself_is_no_sign():
    made = watch()
    made.hear_heartbeat("old", 49, 101.0)
    made.hear_heartbeat("me", 50, 101.0)
    assert made.heartbeat_s is None
    made.hear_heartbeat("other", 50, 101.0)
    assert made.heartbeat_s == 101.0


def test_the_next_epoch_is_above_everything():
    made = watch()
    assert made.next_epoch(20.9) == 51
    assert made.next_epoch(1000.9) == 1001
    made.hear_epoch(5000)
    assert made.next_epoch(1000.9) == 5001
    made.hear_epoch(1 << 63)
    assert made.next_epoch(1000.9) == 5001


def test_who_steps_down():
    assert has_lost("a", 5, "b", 6)
    assert not has_lost("a", 5, "b", 4)
    assert has_lost("b", 5, "a", 5)
    assert not has_lost("a", 5, "b", 5)
    assert not has_lost("a", 5, "a", 5)


class Group:
    """Leaderships on one broker, with heartbeats carried between those that are connected."""

    def __init__(self, *names):
        self.broker = MemoryBroker()
        self.buses = {name: self.broker.connect(name) for name in names}
        self.members = {name: Leadership(bus, "m", name) for name, bus in self.buses.items()}
        self.tasks = {name: asyncio.create_task(member.run()) for name, member in self.members.items()}
        self.hears = set(names)

    async def until(self, condition, timeout_s=6.0):
        started_s = time.monotonic()
        while not condition():
            assert time.monotonic() - started_s < timeout_s, self.epochs
            await asyncio.sleep(0.05)
            for sender in self.hears:
                for receiver in self.hears - {sender}:
                    if self.members[sender].epoch:
                        self.members[receiver].hear_heartbeat(sender, self.members[sender].epoch)
        return time.monotonic() - started_s

    async def kill(self, name):
        self.tasks[name].cancel()
        await asyncio.gather(self.tasks[name], return_exceptions=True)
        self.hears.discard(name)
        self.members[name].epoch = 0

    @property
    def epochs(self):
        return {name: member.epoch for name, member in self.members.items()}

    @property
    def leaders(self):
        return [name for name, epoch in self.epochs.items() if epoch]

    async def close(self):
        for task in self.tasks.values():
            task.cancel()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)


@pytest.fixture
async def group():
    made = Group("s1", "s2")
    yield made
    await made.close()


async def test_the_first_leads_at_once_and_a_standby_takes_over(group):
    assert await group.until(lambda: len(group.leaders) == 1) < 0.5
    (leader,) = group.leaders
    old_epoch = group.epochs[leader]
    assert old_epoch >= int(time.time()) - 1
    await asyncio.sleep(1.7)
    assert group.leaders == [leader]
    await group.kill(leader)
    took_s = await group.until(lambda: group.leaders)
    assert 1.0 < took_s < 3.0
    assert group.leaders != [leader]
    assert group.epochs[group.leaders[0]] > old_epoch


async def test_a_leader_that_lost_the_bucket_leads_on_until_it_hears_a_higher_epoch(group):
    await group.until(lambda: len(group.leaders) == 1)
    (leader,) = group.leaders
    group.buses[leader].disconnect()
    for _ in range(40):
        await asyncio.sleep(0.05)
        for other in group.members:
            if other != leader:
                group.members[other].hear_heartbeat(leader, group.epochs[leader])
    assert group.leaders == [leader]
    group.members[leader].hear_epoch(group.epochs[leader] + 1)
    assert group.leaders == []


async def test_a_leader_cut_off_steps_down_when_it_reads_the_record_again(group):
    await group.until(lambda: len(group.leaders) == 1)
    (leader,) = group.leaders
    group.buses[leader].disconnect()
    group.hears.discard(leader)
    await group.until(lambda: len(group.leaders) == 2)
    group.buses[leader].reconnect()
    await group.members[leader].check()
    assert leader not in group.leaders
    assert len(group.leaders) == 1


async def test_a_wiped_bucket_is_written_again_by_the_leader(group):
    await group.until(lambda: len(group.leaders) == 1)
    epochs = group.epochs
    group.broker.buckets.clear()
    for bus in group.buses.values():
        await bus.key_value(subjects.BUCKET)
    for member in group.members.values():
        member._bucket = await member._bus.key_value(subjects.BUCKET)
    await asyncio.sleep(0)
    bucket = await next(iter(group.buses.values())).key_value(subjects.BUCKET)
    await group.until(lambda: group.broker.buckets[subjects.BUCKET].values.get(subjects.leader_key("m")))
    entry = await bucket.get(subjects.leader_key("m"))
    assert msgspec.json.decode(entry.value, type=Record).epoch == max(epochs.values())
    assert group.epochs == epochs


# -- terms that end in order ---------------------------------------------------------------------------------

LEFT = Entry(msgspec.json.encode(Record("other", 50, has_left=True)), 4)


def test_what_a_leader_left_is_taken_over_at_once():
    made = watch(LEFT)
    made.hear_heartbeat("other", 50, 99.9)
    assert made.decide(100.0) is Decision.TAKE_OVER
    made.hear_heartbeat("third", 51, 99.9)
    assert made.decide(100.0) is Decision.WAIT, "a newer term is under way"
    assert made.decide(102.0) is Decision.TAKE_OVER


def test_its_last_heartbeat_is_enough_where_the_record_could_not_be_written():
    made = watch()
    made.hear_heartbeat("other", 50, 99.9)
    made.hear_leaving(49)
    assert made.decide(100.0) is Decision.WAIT
    made.hear_leaving(50)
    assert made.decide(100.0) is Decision.TAKE_OVER


async def test_a_standby_takes_over_from_a_leader_that_leaves_within_a_moment():
    broker = MemoryBroker()
    buses = [broker.connect(name) for name in "ab"]
    terms = [Leadership(bus, "m", name) for bus, name in zip(buses, "ab", strict=True)]
    tasks = [asyncio.create_task(terms[0].run())]
    try:
        await until(lambda: terms[0].epoch > 0)
        tasks.append(asyncio.create_task(terms[1].run()))
        await asyncio.sleep(0.05)
        terms[1].hear_heartbeat("a", terms[0].epoch)
        epoch, began_s = terms[0].epoch, time.monotonic()
        await terms[0].leave()
        assert terms[0].epoch == 0
        terms[1].hear_heartbeat("a", epoch, is_leaving=True)
        await until(lambda: terms[1].epoch > epoch)
        assert time.monotonic() - began_s < 0.3
        third = Leadership(buses[0], "m", "c")
        await terms[1].leave()
        tasks.append(asyncio.create_task(third.run()))
        began_s = time.monotonic()
        await until(lambda: third.epoch > epoch + 1)
        assert time.monotonic() - began_s < 0.3, "nobody stood by: the next one to come need not wait"
        third.close()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 (any condition)
            await asyncio.sleep(0.005)
