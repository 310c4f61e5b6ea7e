"""Steps launched before the one before them is collected: what follows what, and what a failure means."""

from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from pagebus.bus.messages import (
    Chunk,
    Grant,
    Plan,
    PoolGroup,
    RowStart,
    Sampling,
    Step,
    pack_grants,
    pack_handles,
    pack_ids,
    unpack_handles,
    unpack_ids,
)
from pagebus.executor.batch import BlockCopy, RowInput, RowOutput, pipelined
from pagebus.executor.errors import BrokenModelError
from pagebus.executor.fake import GREEDY, FakeRunner, fake_sequence
from pagebus.executor.fake_device import ContractError, FakeDevice
from pagebus.executor.lease import PlanState
from pagebus.executor.reports import Report
from pagebus.executor.step_loop import (
    MAX_FAILED_STEPS,
    Acknowledge,
    Command,
    EndRequesters,
    Event,
    HandOver,
    StepLoop,
)

PROMPT = list(range(10, 30))  # 20 ids: 2 blocks
BAD_ID = 600


class Model(FakeRunner):
    """Raises at the steps (counted from 1) that it is told to, and for any row with a bad id."""

    def __init__(self) -> None:
        super().__init__(num_blocks=64, max_model_len=128)
        self.raises: dict[int, Exception] = {}
        self.nan_at: int | None = None  # at the step with this number the first row fails
        self.copy_error: Exception | None = None
        self.num_calls = 0

    def step(self, rows: Sequence[RowInput]) -> list[RowOutput]:
        self.num_calls += 1
        if self.num_calls in self.raises:
            raise self.raises[self.num_calls]
        if any(BAD_ID in row.ids for row in rows):
            raise IndexError("a row that no step survives")
        outputs = super().step(rows)
        if self.num_calls == self.nan_at:
            outputs[0] = RowOutput(error="not a number")
        return outputs

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        if self.copy_error is not None:
            raise self.copy_error
        super().copy_blocks(copies)


class Bench:
    """A step loop by hand; every event that came out of it, in order."""

    def __init__(self, *, raises_late: bool = True, step_time_s: float = 0.0) -> None:
        self.now_s = 0.0
        self.model = Model()
        self.device = FakeDevice(
            self.model,
            step_time_s=step_time_s,
            raises_late=raises_late,
            clock=lambda: self.now_s,
            sleep=self.sleep,
        )
        self.loop = StepLoop("ex", self.device, lambda: self.now_s)
        self.events: list[Event] = []
        self.sequence = 0
        self.loop.take_events()

    def sleep(self, duration_s: float) -> None:
        self.now_s += duration_s

    def turn(self, *commands: Command) -> int:
        """Begin, tell, run; how many rows were launched."""
        step = self.loop.begin(commands)
        self.events += self.loop.take_events()
        if self.loop.due is not None:
            self.loop.run()
        return 0 if step is None else len(step.rows)

    def work(self) -> None:
        """Until there is nothing to do."""
        for _ in range(1000):
            self.turn()
            if self.loop.is_idle:
                self.events += self.loop.take_events()
                return
        raise AssertionError("it never ends")

    def plan(self, *steps: Step, **fields: Any) -> Plan:
        self.sequence += 1
        fields["grants"], fields["granted"] = pack_grants(fields.pop("grants", ()))
        is_snapshot = fields.pop("is_snapshot", self.sequence == 1)
        return Plan(
            executor="ex",
            epoch=fields.pop("epoch", 1),
            sequence=self.sequence,
            is_snapshot=is_snapshot,
            steps=steps,
            **fields,
        )

    @property
    def reports(self) -> list[Report]:
        return [event for event in self.events if isinstance(event, Report)]

    def made(self, handle: int = 1) -> list[int]:
        found = []
        for report in self.reports:
            ids = iter(unpack_ids(report.done.ids))
            for each, num in zip(unpack_handles(report.done.handles), report.done.num_made, strict=True):
                found += [made for made in [next(ids) for _ in range(num)] if each == handle]
        return found


def row(handle: int = 1, **changes: Any) -> RowStart:
    fields: dict[str, Any] = {"request_id": f"r{handle}", "num_ids": 20, "max_tokens": 6, "sampling": GREEDY}
    fields |= {"handle": handle, "reply": "pagebus.out.g", "life": f"pagebus.life.{handle}"}
    return RowStart(**{**fields, **changes})


def chunk(handle: int = 1, ids: Iterable[int] = PROMPT, start: int = 0) -> Chunk:
    packed = pack_ids(ids)
    return Chunk(handle=handle, start=start, end=start + len(packed) // 4, ids=packed)


def grants(*handles: int) -> list[Grant]:
    return [Grant(handle, 0, 0, array("i", range(4 * handle, 4 * handle + 4))) for handle in handles]


def decode(*handles: int, num_times: int = 1) -> Step:
    return Step(decode=pack_handles(handles), num_times=num_times)


def first_plan(bench: Bench, *handles: int, num_times: int = 20, **changes: Any) -> Plan:
    return bench.plan(
        Step(chunks=tuple(chunk(handle) for handle in handles)),
        decode(*handles, num_times=num_times),
        rows=tuple(row(handle, **changes) for handle in handles),
        grants=grants(*handles),
    )


def test_a_runner_is_pipelined_where_it_says_so() -> None:
    model = FakeRunner()
    assert pipelined(model) is None
    assert pipelined(FakeDevice(model)) is not None
    assert pipelined(FakeDevice(model, is_pipelined=False)) is None


def test_two_steps_are_in_flight_and_the_second_follows_the_first() -> None:
    bench = Bench(step_time_s=0.01)
    step = bench.loop.begin([first_plan(bench, 1, 2)])
    assert step is not None
    assert bench.loop.due is None
    behind = bench.loop.begin([])
    assert behind is not None
    assert bench.loop.due is step
    assert [(each.ids, each.follows, each.start, each.index) for each in behind.inputs] == [
        ((0,), 0, 20, 1),
        ((0,), 1, 20, 1),
    ]
    assert bench.now_s == 0.0, "nothing was waited for"
    bench.work()
    assert bench.made(1) == fake_sequence(PROMPT, 6)
    assert bench.made(2) == fake_sequence(PROMPT, 6)


def test_a_row_that_ends_by_its_limit_is_not_launched_again() -> None:
    bench = Bench()
    bench.turn(first_plan(bench, 1, max_tokens=3))
    bench.work()
    assert bench.model.num_calls == 3


def test_what_was_launched_of_a_row_that_ended_is_dropped_and_its_plan_acknowledged() -> None:
    bench = Bench()
    stop = fake_sequence(PROMPT, 3)[2]
    bench.turn(first_plan(bench, 1, stop_token_ids=pack_ids([stop])))
    assert bench.turn() == 1
    assert bench.turn() == 1  # collects the second
    # This one is launched before it is known that the row ended with the third id; its plan is taken there.
    assert bench.turn(bench.plan(decode(1, num_times=9))) == 1
    bench.work()
    assert bench.made() == fake_sequence(PROMPT, 3)
    assert [report.done.finished for report in bench.reports] == [{}, {}, {1: "stop"}]
    assert bench.model.num_calls == 4
    last = bench.events[-1]
    assert isinstance(last, Acknowledge)
    assert last.done.plan == 2


def test_min_tokens_bans_by_the_index_of_the_launch() -> None:
    state = PlanState("ex", (PoolGroup(num_blocks=64),), 128, max_in_flight=2)
    bench = Bench()
    state.take_plan(first_plan(bench, 1, stop_token_ids=pack_ids([7]), min_tokens=2))
    steps = []
    for _ in range(3):
        step = state.next_step()
        assert step is not None
        steps.append(step)
        if len(steps) > 1:
            state.complete(steps[-2], [RowOutput(id=5)], 0.0)
    assert [(step.inputs[0].index, list(step.inputs[0].banned_ids)) for step in steps] == [
        (0, [7]),
        (1, [7]),
        (2, []),
    ]


def test_a_row_that_needs_its_history_is_waited_for_but_not_its_prompt() -> None:
    penalized = Sampling(temperature=0.0, presence_penalty=1.0)
    bench = Bench()
    plan = bench.plan(
        Step(chunks=(chunk(1, PROMPT[:10]),)),
        Step(chunks=(chunk(1, PROMPT[10:], 10), chunk(2))),
        decode(1, 2, num_times=10),
        rows=(row(1, sampling=penalized, all_ids=pack_ids(PROMPT)), row(2)),
        grants=grants(1, 2),
    )
    assert bench.turn(plan) == 1
    assert bench.turn() == 2, "a prompt's chunk depends on no id made"
    assert bench.turn() == 0, "the first id of row 1 must be known"
    bench.work()
    assert bench.made(1) == fake_sequence(PROMPT, 6, sampling=penalized)
    assert bench.made(2) == fake_sequence(PROMPT, 6)


def test_a_released_row_is_reported_before_its_release_is_acknowledged() -> None:
    bench = Bench()
    bench.turn(first_plan(bench, 1, 2))
    bench.turn()
    released = bench.plan(released=pack_handles([1, 2]))
    assert bench.turn(released) == 0
    bench.work()
    assert [event.done.plan for event in bench.events if isinstance(event, Report)] == [1, 1]
    assert isinstance(bench.events[-1], Acknowledge)
    assert bench.events[-1].done.plan == 2
    assert bench.made(1) == fake_sequence(PROMPT, 2)


def test_a_failure_acknowledges_no_plan_before_the_steps_in_flight_are_reported() -> None:
    bench = Bench()
    bench.turn(first_plan(bench, 1, 2, 3))
    bench.turn()
    bench.turn(bench.plan(released=pack_handles([1])), EndRequesters(frozenset({"pagebus.life.2"})))
    plans = [report.done.plan for report in bench.reports]
    bench.work()
    assert plans == [1, 1]
    assert [sorted(report.done.failed) for report in bench.reports] == [[], [2], []]
    assert [list(unpack_handles(report.done.handles)) for report in bench.reports][2] == [1, 3]
    assert bench.made(2) == fake_sequence(PROMPT, 1), "what it had in flight is not told"
    last = bench.events[-1]
    assert isinstance(last, Acknowledge)
    assert last.done.plan == 2


@pytest.mark.parametrize("kind", ["hand over", "snapshot", "new epoch"])
def test_nothing_is_in_flight_when_all_ends_or_begins_anew(kind: str) -> None:
    bench = Bench()
    bench.turn(first_plan(bench, 1))
    bench.turn()
    command: Command = HandOver()
    if kind != "hand over":
        command = bench.plan(is_snapshot=True, epoch=2 if kind == "new epoch" else 1)
    assert bench.turn(command) == 0
    bench.work()
    assert bench.made() == fake_sequence(PROMPT, 2)
    plans = [(event.done.epoch, event.done.plan) for event in bench.events if hasattr(event, "done")]
    assert plans[:2] == [(1, 1), (1, 1)]
    if kind == "hand over":
        assert [failed.code for _, failed in bench.reports[-1].failures] == ["executor_draining"]
    else:
        assert plans[2:] == [(2 if kind == "new epoch" else 1, 2)]


@pytest.mark.parametrize("raises_late", [True, False])
@pytest.mark.parametrize("number", range(1, 6))
def test_a_step_that_raises_once_costs_no_id(raises_late: bool, number: int) -> None:
    bench = Bench(raises_late=raises_late)
    bench.model.raises = {number: RuntimeError("once")}
    bench.turn(first_plan(bench, 1, 2))
    bench.work()
    assert bench.made(1) == bench.made(2) == fake_sequence(PROMPT, 6)
    assert [report.done.num_steps for report in bench.reports] == [1, 2, 3, 4, 5, 6]
    assert not any(report.failures for report in bench.reports)


@pytest.mark.parametrize("raises_late", [True, False])
@pytest.mark.parametrize("behind", [0, 1, 3])
def test_the_row_at_fault_alone_fails(raises_late: bool, behind: int) -> None:
    """It comes in a chunk of a later step, while the others decode."""
    bench = Bench(raises_late=raises_late)
    bad = [*PROMPT[:-1], BAD_ID]
    plan = bench.plan(
        Step(chunks=(chunk(1), chunk(2))),
        *[decode(1, 2)] * behind,
        Step(chunks=(chunk(3, bad), chunk(4)), decode=pack_handles((1, 2))),
        decode(1, 2, 3, 4, num_times=9),
        rows=tuple(row(handle) for handle in (1, 2, 3, 4)),
        grants=grants(1, 2, 3, 4),
    )
    bench.turn(plan)
    bench.work()
    for handle in (1, 2, 4):
        assert bench.made(handle) == fake_sequence(PROMPT, 6)
    failures = [failed for report in bench.reports for _, failed in report.failures]
    assert [(failed.request_id, failed.code) for failed in failures] == [("r3", "row_failed")]


def test_a_row_that_a_flaw_stopped_fails_once_and_what_followed_is_dropped() -> None:
    bench = Bench()
    bench.model.nan_at = 3
    bench.turn(first_plan(bench, 1, 2))
    bench.work()
    assert bench.made(1) == fake_sequence(PROMPT, 2)
    assert bench.made(2) == fake_sequence(PROMPT, 6)
    failures = [failed for report in bench.reports for _, failed in report.failures]
    assert [(failed.request_id, failed.message) for failed in failures] == [("r1", "not a number")]


@pytest.mark.parametrize("raises_late", [True, False])
def test_no_memory_at_all_fails_the_step_and_ends_the_process_in_the_end(raises_late: bool) -> None:
    bench = Bench(raises_late=raises_late)
    bench.model.raises = {number: MemoryError() for number in range(1, 1000)}
    for handle in range(1, MAX_FAILED_STEPS):
        bench.turn(first_plan(bench, handle) if handle == 1 else later_plan(bench, handle))
        bench.work()

    def one_more() -> None:
        bench.turn(later_plan(bench, MAX_FAILED_STEPS))
        bench.work()

    with pytest.raises(BrokenModelError, match=f"{MAX_FAILED_STEPS} steps in a row"):
        one_more()
    bench.events += bench.loop.take_events()
    failures = [failed for report in bench.reports for _, failed in report.failures]
    assert [failed.code for failed in failures] == ["step_failed"] * MAX_FAILED_STEPS


def later_plan(bench: Bench, handle: int) -> Plan:
    steps = Step(chunks=(chunk(handle),)), decode(handle, num_times=5)
    return bench.plan(*steps, rows=(row(handle),), grants=grants(handle))


def test_a_broken_model_fails_what_is_in_flight_and_ends_the_process() -> None:
    bench = Bench()
    plan = bench.plan(
        Step(chunks=(chunk(1),)),
        Step(chunks=(chunk(2),), decode=pack_handles([1])),
        rows=(row(1), row(2)),
        grants=grants(1, 2),
    )
    bench.model.raises = {1: BrokenModelError("lost")}
    bench.turn(plan)
    with pytest.raises(BrokenModelError, match="lost"):
        bench.turn()
    bench.events += bench.loop.take_events()
    failed = [(told.request_id, told.code) for report in bench.reports for _, told in report.failures]
    assert failed == [("r1", "step_failed"), ("r2", "step_failed")]


def test_copies_that_raise_fail_their_step_alone() -> None:
    bench = Bench(raises_late=False)
    bench.turn(first_plan(bench, 1, max_tokens=9))
    bench.turn()
    fork = row(2, num_cached=19, copies=pack_ids([0, 5, 9]))
    plan = bench.plan(
        Step(chunks=(chunk(2, PROMPT[19:], 19),)),
        decode(1, num_times=9),
        rows=(fork,),
        grants=[Grant(2, 0, 0, array("i", [4, 9, 10, 11]))],
    )

    def no_copies(copies: Sequence[BlockCopy]) -> None:
        raise RuntimeError("no copies")

    bench.device.copy_blocks = no_copies  # type: ignore[method-assign]
    bench.turn(plan)
    bench.work()
    assert bench.made(1) == fake_sequence(PROMPT, 9)
    failures = [failed for report in bench.reports for _, failed in report.failures]
    assert [(failed.request_id, failed.code) for failed in failures] == [("r2", "step_failed")]


def test_a_fork_reads_what_was_launched_before_it() -> None:
    bench = Bench()
    bench.turn(first_plan(bench, 1, max_tokens=9))
    bench.turn()
    bench.turn()
    fork = row(2, num_cached=19, copies=pack_ids([0, 5, 9]))
    plan = bench.plan(
        Step(chunks=(chunk(2, PROMPT[19:], 19),), decode=pack_handles([1])),
        decode(1, 2, num_times=9),
        rows=(fork,),
        grants=[Grant(2, 0, 0, array("i", [4, 9, 10, 11]))],
    )
    bench.turn(plan)
    bench.work()
    assert bench.made(1) == fake_sequence(PROMPT, 9)
    assert bench.made(2) == fake_sequence(PROMPT, 6)


def test_durations_are_those_of_the_device_in_steady_state() -> None:
    """From the end of one step to the end of the next, not from launch to collect."""
    bench = Bench(step_time_s=0.01)
    bench.turn(first_plan(bench, 1))
    bench.work()
    assert [report.done.duration_us for report in bench.reports] == [10_000] * 6
    bench.now_s += 5.0
    bench.turn(later_plan(bench, 2))
    bench.work()
    assert [report.done.duration_us for report in bench.reports] == [10_000] * 12
    assert bench.device.figures.idle_s == 0.0


def test_the_pulse_beats_with_each_step_and_rests_when_all_is_collected() -> None:
    bench = Bench()
    bench.turn(first_plan(bench, 1))
    assert bench.loop.pulse.is_busy
    count = bench.loop.pulse.count
    bench.turn()
    assert bench.loop.pulse.is_busy
    assert bench.loop.pulse.count == count + 1
    bench.work()
    assert not bench.loop.pulse.is_busy


def test_finish_collects_what_is_in_flight() -> None:
    bench = Bench()
    bench.turn(first_plan(bench, 1))
    bench.loop.begin([])
    bench.loop.finish()
    bench.events += bench.loop.take_events()
    assert bench.made() == fake_sequence(PROMPT, 2)


def test_the_device_checks_who_uses_it() -> None:
    device = FakeDevice(FakeRunner(num_blocks=8, max_model_len=64))
    table = [array("i", [1, 2])]
    prompt = RowInput(PROMPT, 0, table, GREEDY, key=1)
    following = RowInput((0,), 20, table, GREEDY, index=1, key=1, follows=0)
    with pytest.raises(ContractError):
        device.launch([following])
    work = device.launch([prompt])
    for wrong in (
        RowInput((0,), 20, table, GREEDY, index=1, key=2, follows=0),
        RowInput((0,), 21, table, GREEDY, index=1, key=1, follows=0),
        RowInput((0,), 20, table, GREEDY, index=2, key=1, follows=0),
        RowInput((0,), 20, table, GREEDY, index=1, key=1, follows=1),
        RowInput((0,), 20, table, Sampling(presence_penalty=1.0), index=1, key=1, follows=0),
    ):
        with pytest.raises(ContractError):
            device.launch([wrong])
    behind = device.launch([following])
    with pytest.raises(ContractError):
        device.launch([following])
    with pytest.raises(ContractError):
        device.collect(behind)
    with pytest.raises(ContractError):
        device.step([prompt])
    made = [output.id for output in [*device.collect(work), *device.collect(behind)]]
    assert made == fake_sequence(PROMPT, 2)
    with pytest.raises(ContractError):
        device.collect(behind)


def test_the_device_counts_its_waiting_where_a_row_had_to_wait() -> None:
    now_s = [0.0]

    def sleep(duration_s: float) -> None:
        now_s[0] += duration_s

    device = FakeDevice(
        FakeRunner(num_blocks=8, max_model_len=64), step_time_s=0.25, clock=lambda: now_s[0], sleep=sleep
    )
    table = [array("i", [1, 2])]
    for key, pause_s in ((1, 0.0), (1, 0.5), (2, 4.0), (2, 0.125)):
        now_s[0] += pause_s
        device.collect(device.launch([RowInput((5,), 0, table, GREEDY, key=key)]))
    assert device.figures.num_steps == 4
    assert device.figures.busy_s == 1.0
    assert (device.figures.idle_s, device.figures.num_gaps) == (0.625, 2)
