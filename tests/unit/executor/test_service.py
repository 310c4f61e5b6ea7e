"""The executor's service on the memory bus, with a scheduler written by hand."""

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from pagebus.bus import subjects
from pagebus.bus.memory import MemoryBroker, MemoryBus
from pagebus.bus.messages import encode
from pagebus.executor.batch import RowInput, RowOutput
from pagebus.executor.fake import FakeRunner, fake_sequence
from pagebus.executor.service import run
from pagebus.settings.structs import ExecutorSettings
from tests.support import executor_tests
from tests.support.executor_tests import PROMPTS, SETTINGS, executor, scheduler
from tests.support.hand_scheduler import HandScheduler


@pytest.fixture(autouse=True, params=["in_turn", "ahead"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Steps one after the other, or launched ahead of what was collected."""
    monkeypatch.setattr(executor_tests, "as_built", getattr(executor_tests, request.param))
    return str(request.param)


@pytest.fixture
def buses() -> tuple[MemoryBus, MemoryBus]:
    broker = MemoryBroker()
    return broker.connect("executor"), broker.connect("scheduler")


@pytest.mark.parametrize("horizon", [1, 4, 16])
async def test_results_are_the_same_for_every_horizon(
    buses: tuple[MemoryBus, MemoryBus], horizon: int
) -> None:
    await executor_tests.check_horizon(*buses, horizon)


@pytest.mark.parametrize(
    "check",
    [
        executor_tests.check_lost_plans,
        executor_tests.check_preemption,
        executor_tests.check_epoch_change,
        executor_tests.check_step_failure,
        executor_tests.check_out_of_memory,
        executor_tests.check_drain,
        executor_tests.check_nobody_listens,
        executor_tests.check_stop,
    ],
)
async def test_on_the_bus(check: executor_tests.Check, buses: tuple[MemoryBus, MemoryBus]) -> None:
    await check(*buses)


class LossyFaults:
    """Loses every third plan and report, doubles every fifth; hellos and tokens pass."""

    def __init__(self) -> None:
        self.num_seen = 0

    def delays_s(self, subject: str, sender: str, receiver: str) -> Sequence[float]:
        if not (subject.startswith("pagebus.plan.") or subject.endswith(".done")):
            return (0.0,)
        self.num_seen += 1
        if self.num_seen % 3 == 0:
            return ()
        return (0.0, 0.003) if self.num_seen % 5 == 0 else (0.001,)


async def test_lost_and_doubled_messages_change_nothing() -> None:
    broker = MemoryBroker(faults=LossyFaults())
    runner = FakeRunner(num_blocks=64, max_model_len=256)
    hand = HandScheduler("ex", horizon=4)
    for number, prompt in enumerate(PROMPTS):
        hand.add(f"r{number}", prompt, max_tokens=20)
    async with scheduler(broker.connect("s"), hand) as lead, executor(broker.connect("e"), runner):
        await lead.until_finished(*(f"r{number}" for number in range(len(PROMPTS))))
    assert lead.received == {f"r{n}": fake_sequence(prompt, 20) for n, prompt in enumerate(PROMPTS)}


async def test_plans_are_acknowledged_at_once_when_idle_also_again(
    buses: tuple[MemoryBus, MemoryBus],
) -> None:
    hand = HandScheduler("ex")
    async with scheduler(buses[1], hand) as lead, executor(buses[0], FakeRunner(num_blocks=4)):
        await lead.until_serving()
        plan = hand.plan()
        for count in (1, 2):
            await buses[1].publish("pagebus.plan.ex", encode(plan))
            await lead.until(lambda count=count: len(lead.dones) == count, timeout_s=2.0)  # type: ignore[misc]
        assert [(d.plan, d.num_steps, d.handles) for d in lead.dones] == [(1, 0, b"")] * 2


async def test_reports_are_repeated_until_a_plan_acknowledges_them(
    buses: tuple[MemoryBus, MemoryBus],
) -> None:
    hand = HandScheduler("ex", horizon=2)
    async with scheduler(buses[1], hand) as lead, executor(buses[0], FakeRunner(num_blocks=64)):
        lead.is_muted = True
        await lead.until_serving()
        hand.add("r0", [1, 2, 3], max_tokens=40)
        plan = hand.plan()
        await buses[1].publish("pagebus.plan.ex", encode(plan))
        await lead.until(lambda: len(lead.dones) >= 6)
        assert [done.num_steps for done in lead.dones[:6]] == [1, 2, 1, 2, 1, 2]
        await buses[1].publish("pagebus.plan.ex", encode(hand.plan()))
        await lead.until(lambda: any(done.num_steps == 4 for done in lead.dones))
        later = lead.dones[-1:]
        await asyncio.sleep(0.3)
        assert {done.num_steps for done in [*later, *lead.dones[-2:]]} == {3, 4}


async def test_a_reconnect_brings_a_hello_at_once_and_nothing_dies_while_away(
    buses: tuple[MemoryBus, MemoryBus],
) -> None:
    hand = HandScheduler("ex", horizon=8)
    runner = FakeRunner(num_blocks=64, step_time_s=0.005)
    async with scheduler(buses[1], hand) as lead, executor(buses[0], runner):
        hand.add("r0", [1, 2, 3], max_tokens=200)
        await lead.until(lambda: len(lead.received["r0"]) > 3)
        buses[0].disconnect()
        lead.is_muted = True
        await asyncio.sleep(0.3)
        num_known = len(lead.received.pop("r0"))
        lead.scheduler = HandScheduler("ex", epoch=2)  # the requester saw a gap: it asks again
        received = fake_sequence([1, 2, 3], num_known)
        lead.received["r0"] = list(received)
        lead.scheduler.add("r0", [1, 2, 3], received=received, max_tokens=200, attempt=2)
        num_hellos = len(lead.hellos)
        lead.is_muted = False
        buses[0].reconnect()
        await lead.until(lambda: len(lead.hellos) > num_hellos, timeout_s=0.8)
        await lead.until_finished("r0")
    assert lead.received["r0"] == fake_sequence([1, 2, 3], 200)


@pytest.mark.parametrize("subject", [subjects.plan("ex"), subjects.heartbeat("fake")])
async def test_garbage_is_dropped(buses: tuple[MemoryBus, MemoryBus], subject: str) -> None:
    hand = HandScheduler("ex")
    async with scheduler(buses[1], hand) as lead, executor(buses[0], FakeRunner(num_blocks=64)):
        await lead.until_serving()
        other = encode(lead.hellos[0])
        for data in (b"", b"\x81", b"not msgpack", other, other[:-3]):
            await buses[1].publish(subject, data)
        hand.add("r0", [1, 2, 3], max_tokens=5)
        lead.poke()
        await lead.until_finished("r0")
    assert lead.received["r0"] == fake_sequence([1, 2, 3], 5)


async def test_what_building_the_model_raises_is_raised(buses: tuple[MemoryBus, MemoryBus]) -> None:
    def build(settings: ExecutorSettings, path: Path) -> FakeRunner:
        raise FileNotFoundError("no such model")

    with pytest.raises(FileNotFoundError, match="no such model"):
        await run(SETTINGS, buses[0], Path(), "ex", asyncio.Event(), build=build)


async def test_a_stop_while_the_model_loads_does_not_wait(buses: tuple[MemoryBus, MemoryBus]) -> None:
    may_end, stop = threading.Event(), asyncio.Event()

    def build(settings: ExecutorSettings, path: Path) -> FakeRunner:
        may_end.wait(10)
        return FakeRunner(num_blocks=4)

    task = asyncio.create_task(run(SETTINGS, buses[0], Path(), "ex", stop, build=build))
    await asyncio.sleep(0.05)
    assert not task.done()
    stop.set()
    await asyncio.wait_for(task, 1.0)
    may_end.set()


class DyingRunner(FakeRunner):
    """Not an `Exception`: nothing the worker may carry on after."""

    def step(self, rows: Sequence[RowInput]) -> list[RowOutput]:
        raise SystemExit("the device is gone")


async def test_a_worker_that_dies_ends_the_service_with_its_error(
    buses: tuple[MemoryBus, MemoryBus],
) -> None:
    hand = HandScheduler("ex")
    hand.add("r0", [1, 2, 3], max_tokens=5)
    async with scheduler(buses[1], hand):
        service = run(SETTINGS, buses[0], Path(), "ex", asyncio.Event(), build=lambda _s, _p: DyingRunner())
        with pytest.raises(RuntimeError, match="the device is gone"):
            await asyncio.wait_for(service, 5)


async def test_the_fake_model_is_built_from_settings(buses: tuple[MemoryBus, MemoryBus]) -> None:
    stop, hand = asyncio.Event(), HandScheduler("ex")
    settings = ExecutorSettings(model="fake", fake=True, max_model_len=512, max_num_seqs=7)
    async with scheduler(buses[1], hand) as lead:
        task = asyncio.create_task(run(settings, buses[0], Path(), "ex", stop))
        await lead.until(lambda: any(hello.pool for hello in lead.hellos))
        stop.set()
        await task
        assert lead.hellos[-1].state == "left"
        hello = next(hello for hello in lead.hellos if hello.pool)
        assert (hello.executor, hello.model) == ("ex", "fake")
        assert (hello.max_model_len, hello.max_num_seqs) == (512, 7)
        assert (hello.epoch, hello.plan, hello.handles) == (0, 0, b"")
        assert hello.pool[0].num_blocks * hello.pool[0].block_size >= 512
