"""The scheduler's service on the memory bus, with executors that run the fake model, and real requesters."""

import asyncio
import time

import pytest

from pagebus.bus import subjects
from pagebus.bus.memory import MemoryBroker
from pagebus.bus.messages import Heartbeat, decode, encode
from pagebus.scheduler.core import SchedulerCore
from tests.support import executor_tests
from tests.unit.scheduler import service_checks as checks


@pytest.fixture
def broker():
    return MemoryBroker()


@pytest.mark.parametrize("horizon", [1, 3, 8])
async def test_many_requests_finish_with_their_own_ids(broker, horizon):
    await checks.many_requests_finish_with_their_own_ids(
        *[broker.connect() for _ in range(3)], horizon=horizon, max_num_batched_tokens=64
    )


async def test_rubbish_harms_nobody(broker):
    await checks.rubbish_on_every_subject_harms_nobody(*[broker.connect() for _ in range(3)])


async def test_a_standby_takes_over_and_streams_go_on(broker):
    await checks.a_standby_takes_over_and_streams_go_on([broker.connect() for _ in range(4)])


async def test_a_message_that_breaks_the_core_fails_alone(broker, monkeypatch):
    real = SchedulerCore.on_generate

    def on_generate(self, generate, now_s, headers=None):
        if generate.request_id == "bad":
            raise ZeroDivisionError
        real(self, generate, now_s, headers)

    monkeypatch.setattr(SchedulerCore, "on_generate", on_generate)
    async with (
        checks.scheduler(broker.connect()),
        executor_tests.executor(broker.connect(), checks.FakeRunner(num_blocks=48, max_model_len=512)),
        checks.requester(broker.connect()) as made,
    ):
        bad, good = await asyncio.gather(
            checks.collect(made, checks.spec("bad", [1], 5)),
            checks.collect(made, checks.spec("good", [1], 5)),
        )
    assert (bad.code, bad.is_client_fault) == ("internal_error", False)
    assert good == (checks.fake_sequence([1], 5), "length")


async def test_a_plan_that_raises_begins_a_new_term(broker, monkeypatch):
    real, raised = SchedulerCore.plan, []

    def plan(self, now_s):
        if not raised and self.figures.num_running:
            raised.append(self.epoch)
            raise ZeroDivisionError
        return real(self, now_s)

    monkeypatch.setattr(SchedulerCore, "plan", plan)
    async with (
        checks.scheduler(broker.connect()),
        executor_tests.executor(
            broker.connect(), checks.FakeRunner(num_blocks=48, max_model_len=512, step_time_s=0.01)
        ),
        checks.requester(broker.connect()) as made,
    ):
        got = await asyncio.wait_for(checks.collect(made, checks.spec("a", [1, 2, 3], 60)), 20)
        assert raised
        assert made.heartbeat.epoch > raised[0]
    assert got == (checks.fake_sequence([1, 2, 3], 60), "length")


async def test_a_leader_steps_down_for_a_higher_epoch_and_leads_again_later(broker):
    beats = []
    other = broker.connect()
    await other.subscribe(subjects.heartbeat(checks.MODEL), lambda msg: beats.append(decode(msg.data)))
    async with checks.scheduler(broker.connect(), "s1"):
        await checks.until(lambda: beats)
        rival = Heartbeat(scheduler="rival", model=checks.MODEL, epoch=beats[0].epoch + 5)
        await other.publish(subjects.heartbeat(checks.MODEL), encode(rival))
        started_s = time.monotonic()
        await checks.until(lambda: beats[-1].scheduler == "s1" and beats[-1].epoch > rival.epoch)
        assert 1.4 < time.monotonic() - started_s < 3.5


async def test_after_a_pause_a_replaced_leader_sends_nothing(broker):
    sent = []
    listener = broker.connect()
    await listener.subscribe(subjects.heartbeat(checks.MODEL), lambda msg: sent.append(decode(msg.data)))
    async with checks.scheduler(broker.connect(), "s1"):
        await checks.until(lambda: sent)
        bucket = await listener.key_value(subjects.BUCKET)
        record = await bucket.get(subjects.leader_key(checks.MODEL))
        epoch = sent[-1].epoch + 1
        await bucket.update(
            subjects.leader_key(checks.MODEL), b'{"instance":"s2","epoch":%d}' % epoch, record.revision
        )
        time.sleep(0.7)  # noqa: ASYNC251 (the loop stands still, as in a stopped process)
        sent.clear()
        await asyncio.sleep(0.6)
        assert [beat for beat in sent if beat.epoch < epoch] == []
