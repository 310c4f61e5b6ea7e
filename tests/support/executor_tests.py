"""What an executor does on a bus, run on the memory bus (unit) and on a real nats-server (integration)."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from pagebus.bus.messages import Sampling, unpack_handles
from pagebus.bus.protocol import Bus, Msg
from pagebus.executor.batch import RowInput, RowOutput, Runner
from pagebus.executor.fake import FakeRunner, fake_sequence
from pagebus.executor.fake_device import FakeDevice
from pagebus.executor.service import run
from pagebus.settings.structs import ExecutorSettings
from tests.support.bus_scheduler import MODEL, BusScheduler
from tests.support.hand_scheduler import HandScheduler

SETTINGS = ExecutorSettings(model=MODEL, fake=True, drain_timeout_s=0.0)
LIFE = "pagebus.life.r"


class TroubledRunner(FakeRunner):
    """The fake model, with steps that raise or a row that fails when told to."""

    raises: BaseException | None = None
    num_raises = 1
    raises_id: int | None = None
    fails_id: int | None = None

    def step(self, rows: Sequence[RowInput]) -> list[RowOutput]:
        if self.raises is not None and self.num_raises > 0:
            self.num_raises -= 1
            raise self.raises
        if any(self.raises_id in row.ids for row in rows):
            raise IndexError("a row that no step survives")
        outputs = super().step(rows)
        for row, output in zip(rows, outputs, strict=True):
            if self.fails_id in row.ids:
                output.id, output.error = None, "a bad row"
        return outputs


def in_turn(runner: FakeRunner) -> Runner:
    """The model as it is: one step at a time."""
    return runner


def ahead(runner: FakeRunner) -> Runner:
    """The model behind a device, on which steps are launched ahead."""
    step_time_s, runner.step_time_s = runner.step_time_s, 0.0
    return FakeDevice(runner, step_time_s=step_time_s)


as_built = in_turn
"""What the executor gets for a model; tests replace it."""


@asynccontextmanager
async def executor(bus: Bus, runner: FakeRunner, name: str = "ex") -> AsyncIterator[asyncio.Task[None]]:
    """The service, running with this runner; it must end without an error."""
    stop = asyncio.Event()
    task = asyncio.create_task(run(SETTINGS, bus, Path(), name, stop, build=lambda _s, _p: as_built(runner)))
    try:
        yield task
    finally:
        stop.set()
        await asyncio.wait_for(task, 10)


@asynccontextmanager
async def scheduler(
    bus: Bus, hand: HandScheduler, requester_bus: Bus | None = None
) -> AsyncIterator[BusScheduler]:
    """The hand-made scheduler on the bus; the requester's part on a bus of its own where one is given."""
    started = BusScheduler(bus, hand, requester_bus)
    await started.start()
    try:
        yield started
    finally:
        await started.stop()


PROMPTS = [list(range(n, n + length)) for n, length in enumerate((1, 15, 16, 17, 40, 70))]


def expected_of(num_ids: int, sampling: Sampling) -> dict[str, list[int]]:
    return {f"r{n}": fake_sequence(prompt, num_ids, sampling=sampling) for n, prompt in enumerate(PROMPTS)}


async def check_horizon(executor_bus: Bus, scheduler_bus: Bus, horizon: int) -> None:
    """Any horizon gives the ids of `fake_sequence`, one `Tokens` a step, and all blocks back."""
    runner = FakeRunner(num_blocks=64, max_model_len=256)
    sampling = Sampling(temperature=1.0, seed=horizon)
    hand = HandScheduler("ex", horizon=horizon)
    for number, prompt in enumerate(PROMPTS):
        hand.add(f"r{number}", prompt, max_tokens=50, sampling=Sampling(temperature=1.0, seed=horizon))
    async with scheduler(scheduler_bus, hand) as lead, executor(executor_bus, runner):
        await lead.until_finished(*expected_of(1, sampling))
        assert lead.received == expected_of(50, sampling)
        assert lead.num_tokens_messages <= runner.num_steps
        await lead.until(lambda: hand.num_steps == runner.num_steps)
        lead.poke()
        await lead.until(lambda: hand.num_free == 64 and lead.dones[-1].plan == hand.sequence)
    assert not lead.failures


async def check_lost_plans(executor_bus: Bus, scheduler_bus: Bus) -> None:
    """A gap makes the executor say Hello at once; the snapshot heals it."""
    runner = FakeRunner(num_blocks=64, max_model_len=256, step_time_s=0.001)
    hand = HandScheduler("ex", horizon=2)
    async with scheduler(scheduler_bus, hand) as lead, executor(executor_bus, runner):
        hand.add("r0", PROMPTS[4], max_tokens=60)
        await lead.until(lambda: len(lead.received["r0"]) > 5)
        lead.num_to_lose = 1
        hand.add("r1", PROMPTS[5], max_tokens=30)
        lead.poke()
        await lead.until_finished("r0", "r1")
        assert any(hello.has_gap for hello in lead.hellos)
    assert lead.received["r0"] == fake_sequence(PROMPTS[4], 60)
    assert lead.received["r1"] == fake_sequence(PROMPTS[5], 30)


async def check_preemption(executor_bus: Bus, scheduler_bus: Bus) -> None:
    """A row that is released while it runs and admitted again goes on with the next id."""
    runner = FakeRunner(num_blocks=64, max_model_len=256, step_time_s=0.002)
    hand = HandScheduler("ex", horizon=4)
    async with scheduler(scheduler_bus, hand) as lead, executor(executor_bus, runner):
        hand.add("r0", PROMPTS[4], max_tokens=60)
        hand.add("r1", PROMPTS[3], max_tokens=60)
        for count in (5, 20, 40):
            await lead.until(lambda count=count: len(lead.received["r0"]) > count)  # type: ignore[misc]
            hand.preempt(hand.handle_of["r0", 0])
            lead.poke()
        await lead.until_finished("r0", "r1")
    assert lead.received["r0"] == fake_sequence(PROMPTS[4], 60)
    assert lead.received["r1"] == fake_sequence(PROMPTS[3], 60)


async def check_epoch_change(executor_bus: Bus, scheduler_bus: Bus) -> None:
    """A higher epoch heard brings a Hello at once; the new leader's rows go on with the ids delivered."""
    runner = FakeRunner(num_blocks=64, max_model_len=256, step_time_s=0.002)
    old = HandScheduler("ex", epoch=5)
    async with scheduler(scheduler_bus, old) as lead, executor(executor_bus, runner):
        old.add("r0", PROMPTS[4], max_tokens=80)
        await lead.until(lambda: len(lead.received["r0"]) > 10)
        lead.is_muted = True
        await asyncio.sleep(0.1)  # the lease of the dead leader runs out
        num_hellos, began_s = len(lead.hellos), time.monotonic()
        await lead.heartbeat(9)
        await lead.until(lambda: any(h.epoch == 9 for h in lead.hellos[num_hellos:]))
        assert time.monotonic() - began_s < 0.8
        new = HandScheduler("ex", epoch=9)
        new.add("r0", PROMPTS[4], received=lead.received["r0"], max_tokens=80, attempt=2)
        lead.is_muted = False
        lead.replace(new)
        await lead.until_finished("r0")
        assert {done.epoch for done in lead.dones} == {5, 9}
    assert lead.received["r0"] == fake_sequence(PROMPTS[4], 80)


async def check_step_failure(executor_bus: Bus, scheduler_bus: Bus) -> None:
    """A step that raises is tried again; what raises for one row's sake, or fails it, ends that row alone."""
    runner = TroubledRunner(num_blocks=64, max_model_len=256)
    hand = HandScheduler("ex")
    async with scheduler(scheduler_bus, hand) as lead, executor(executor_bus, runner):
        runner.raises = RuntimeError("once")
        hand.add("r0", PROMPTS[4], max_tokens=10)
        lead.poke()
        await lead.until_finished("r0")
        assert not lead.failures
        runner.fails_id, runner.raises_id = 777, 888
        hand.add("r2", PROMPTS[5], max_tokens=10)
        hand.add("r3", [888, 1], max_tokens=10)
        hand.add("r1", [777, 1], max_tokens=10)
        lead.poke()
        await lead.until_finished("r2")
        await lead.until(lambda: len(lead.failures) == 2)
        failures = {failed.request_id: failed for failed in lead.failures}
        assert set(failures) == {"r1", "r3"}
        assert "no step survives" in failures["r3"].message
        for failed in lead.failures:
            assert (failed.code, failed.is_retryable) == ("row_failed", False)
    assert lead.received == {"r0": fake_sequence(PROMPTS[4], 10), "r2": fake_sequence(PROMPTS[5], 10)}


async def check_out_of_memory(executor_bus: Bus, scheduler_bus: Bus) -> None:
    """A step that finds no memory, not even in parts, fails its rows for another try; nothing else ends."""
    runner = TroubledRunner(num_blocks=64, max_model_len=256)
    hand = HandScheduler("ex")
    async with scheduler(scheduler_bus, hand) as lead, executor(executor_bus, runner):
        # Launched ahead, the step behind it finds none either, before the first is tried again.
        runner.raises, runner.num_raises = MemoryError("no memory"), 3 if as_built is ahead else 2
        hand.add("r0", PROMPTS[4], max_tokens=10)
        lead.poke()
        await lead.until(lambda: bool(lead.failures))
        assert [(failed.code, failed.is_retryable) for failed in lead.failures] == [("step_failed", True)]
        hand.add("r0", PROMPTS[4], max_tokens=10, attempt=2)
        lead.poke()
        await lead.until_finished("r0")
    assert lead.received == {"r0": fake_sequence(PROMPTS[4], 10)}


async def check_nobody_listens(executor_bus: Bus, scheduler_bus: Bus) -> None:
    """No responders on a life subject, twice in a row, end that requester's rows and no others."""
    runner = FakeRunner(num_blocks=128, max_model_len=1024, step_time_s=0.005)
    hand = HandScheduler("ex", num_blocks=128)

    def answer(msg: Msg) -> None:
        task = asyncio.ensure_future(scheduler_bus.publish(msg.reply, b""))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    tasks: set[asyncio.Task[None]] = set()
    subscription = await scheduler_bus.subscribe(LIFE, answer)
    async with scheduler(scheduler_bus, hand) as lead, executor(executor_bus, runner):
        hand.add("r0", PROMPTS[4], max_tokens=900, life="pagebus.life.gone")
        handle = hand.handle_of["r0", 0]
        hand.add("r1", PROMPTS[3], max_tokens=300, life=LIFE)
        lead.poke()
        await lead.until(lambda: any(handle in done.failed for done in lead.dones), timeout_s=3.0)
        await lead.until_finished("r1")
    assert lead.received["r1"] == fake_sequence(PROMPTS[3], 300)
    assert 0 < len(lead.received["r0"]) < 900
    await subscription.unsubscribe()


async def check_stop(executor_bus: Bus, scheduler_bus: Bus) -> None:
    """On stop, without any grace, the running step is finished and sent, and the row handed over."""
    runner = FakeRunner(num_blocks=64, max_model_len=256, step_time_s=0.05)
    hand = HandScheduler("ex", horizon=16)
    async with scheduler(scheduler_bus, hand) as lead:
        async with executor(executor_bus, runner):
            hand.add("r0", PROMPTS[4], max_tokens=60)
            await lead.until(lambda: len(lead.received["r0"]) > 2)
        lead.is_muted = True
        num_made = runner.num_steps - 1  # two chunks, the second makes the first id
        await lead.until(lambda: len(lead.received["r0"]) == num_made)
        done = next(done for done in reversed(lead.dones) if done.handles)
        assert (list(unpack_handles(done.handles)), list(done.failed)) == ([1], [1])
        assert [(failed.code, failed.is_retryable) for failed in lead.failures] == [
            ("executor_draining", True)
        ]
        assert [hello.state for hello in lead.hellos][-2:] == ["draining", "left"]
        await asyncio.sleep(0.12)
        assert runner.num_steps == num_made + 1
    assert lead.received["r0"] == fake_sequence(PROMPTS[4], num_made)


async def check_drain(executor_bus: Bus, scheduler_bus: Bus) -> None:
    """On stop a row goes on within the grace period; what needs longer is handed over at its end."""
    for grace_s, is_over in ((10.0, True), (0.15, False)):
        runner = FakeRunner(num_blocks=64, max_model_len=256, step_time_s=0.02)
        settings = ExecutorSettings(model=MODEL, fake=True, drain_timeout_s=grace_s)
        hand, stop = HandScheduler("ex", horizon=4), asyncio.Event()
        build = lambda _s, _p, runner=runner: as_built(runner)  # noqa: E731
        async with scheduler(scheduler_bus, hand) as lead:
            task = asyncio.create_task(run(settings, executor_bus, Path(), "ex", stop, build=build))
            hand.add("r0", PROMPTS[4], max_tokens=40)
            await lead.until(lambda lead=lead: len(lead.received["r0"]) > 2)  # type: ignore[misc]
            began_s = time.monotonic()
            stop.set()
            await lead.until(lambda lead=lead: lead.hellos[-1].state == "draining")  # type: ignore[misc]
            assert time.monotonic() - began_s < 0.2
            await asyncio.wait_for(task, 5)
            await lead.until(lambda lead=lead: lead.hellos[-1].state == "left")  # type: ignore[misc]
            assert ("r0" in lead.finished) is is_over
            assert [failed.code for failed in lead.failures] == ([] if is_over else ["executor_draining"])
            made = lead.received["r0"]
            assert made == fake_sequence(PROMPTS[4], len(made))


Check = Callable[[Bus, Bus], Awaitable[None]]
