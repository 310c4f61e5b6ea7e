"""Random plans, lost, doubled and reordered, against the state machine: what must hold whatever comes."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pagebus.bus.messages import Hello, Plan, Sampling, StepDone, unpack_grants, unpack_handles, unpack_ids
from pagebus.executor.batch import RowInput, RowOutput
from pagebus.executor.fake import FakeModel, FakeRunner, fake_sequence
from pagebus.executor.fake_device import FakeDevice
from pagebus.executor.launched import LaunchedStep
from pagebus.executor.launches import Ahead
from pagebus.executor.lease import Outcome, PlanState
from pagebus.executor.reports import Outbox, Report
from tests.support.hand_scheduler import HandScheduler

NUM_BLOCKS = 40
MAX_LEN = 112
MODEL = FakeModel(windows=(None, 20), end_probability=0.05)


@dataclass
class Request:
    """What the requester knows: it must get each id once and in order."""

    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    expected: list[int]
    attempt: int = 1
    received: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    is_cancelled: bool = False
    has_failed: bool = False

    @property
    def is_live(self) -> bool:
        return self.finish_reason is None and not self.is_cancelled


class TroubledRunner(FakeRunner):
    """Raises in its next steps where it is told to."""

    num_raises = 0

    def step(self, rows: Sequence[RowInput]) -> list[RowOutput]:
        if self.num_raises:
            self.num_raises -= 1
            raise MemoryError("no memory")
        return super().step(rows)


class PlanMachine(RuleBasedStateMachine):
    """A scheduler, an executor and a requester; every message between the first two may be lost or late."""

    max_in_flight = 1

    def __init__(self) -> None:
        super().__init__()
        self.runner = TroubledRunner(MODEL, num_blocks=NUM_BLOCKS, max_model_len=MAX_LEN)
        self.state = PlanState("ex", self.runner.pool, MAX_LEN, max_in_flight=self.max_in_flight)
        self.outbox = Outbox()
        self.plans: list[Plan] = []
        self.dones: list[StepDone] = []
        self.requests: dict[str, Request] = {}
        self.in_flight: LaunchedStep | None = None
        self.last_taken: tuple[int, int] = (0, 0)
        self.positions: dict[tuple[int, int], int] = {}
        self.granted: dict[tuple[int, int], list[dict[int, int]]] = {}
        self.now_s = 0.0
        self.epoch = 0
        self.lead()

    # -- the scheduler -----------------------------------------------------------------------------------

    def lead(self) -> None:
        self.epoch += 1
        self.scheduler = HandScheduler("ex", epoch=self.epoch, num_blocks=NUM_BLOCKS, num_groups=2)

    def admit(self, request_id: str) -> None:
        request = self.requests[request_id]
        self.scheduler.add(
            request_id,
            request.prompt,
            received=list(request.received),
            max_tokens=request.max_tokens,
            attempt=request.attempt,
            stop=(MODEL.end_id,),
            sampling=request.sampling,
        )

    def ask_again(self, request_id: str) -> None:
        request = self.requests[request_id]
        request.attempt += 1
        request.has_failed = False
        self.admit(request_id)

    @precondition(lambda self: sum(r.is_live for r in self.requests.values()) < 5)
    @rule(
        prompt=st.lists(st.integers(0, 511), min_size=1, max_size=60),
        max_tokens=st.integers(1, 40),
        temperature=st.sampled_from([0.0, 1.0]),
        seed=st.integers(0, 9),
    )
    def add(self, prompt: list[int], max_tokens: int, temperature: float, seed: int) -> None:
        request_id = f"r{len(self.requests)}"
        sampling = Sampling(temperature=temperature, seed=seed)
        expected = fake_sequence(
            prompt, max_tokens, model=MODEL, sampling=sampling, stop_token_ids=(MODEL.end_id,)
        )
        self.requests[request_id] = Request(prompt, max_tokens, sampling, expected)
        self.admit(request_id)

    @rule(
        chance=st.integers(0, 5),
        horizon=st.sampled_from([1, 2, 4, 16]),
        chunk_size=st.sampled_from([5, 16, 24, 60]),
    )
    def send_plan(self, chance: int, horizon: int, chunk_size: int) -> None:
        self.scheduler.chunk_size = chunk_size
        self.write_plan(chance == 0, horizon)

    @rule(num_steps=st.integers(0, 5), is_late=st.booleans())
    def go_round(self, num_steps: int, is_late: bool) -> None:
        """The healthy way: a plan arrives, steps run, their reports arrive (or are late)."""
        self.write_plan(False, 4)
        self.take_plan(self.plans.pop())
        for _ in range(num_steps):
            self.launch_and_complete()
        if not is_late:
            self.deliver_dones()

    def launch_and_complete(self) -> None:
        if self.can_launch:
            self.launch()
        if self.state.num_in_flight:
            self.complete()

    def write_plan(self, is_snapshot: bool, horizon: int) -> None:
        self.scheduler.horizon = horizon
        plan = self.scheduler.plan(is_snapshot=is_snapshot)
        for grant in unpack_grants(plan):
            tables = self.granted.setdefault((plan.epoch, grant.handle), [{}, {}])
            for entry, block in enumerate(grant.blocks, start=grant.offset):
                assert tables[grant.group].setdefault(entry, block) == block
        self.plans.append(plan)

    @precondition(lambda self: self.scheduler.rows)
    @rule(data=st.data(), is_cancel=st.booleans())
    def drop_row(self, data: st.DataObject, is_cancel: bool) -> None:
        handle = data.draw(st.sampled_from(sorted(self.scheduler.rows)))
        row = self.scheduler.rows[handle]
        if row.is_over:
            return
        if is_cancel:
            self.requests[row.start.request_id].is_cancelled = True
            self.scheduler.release(handle)
        else:
            self.scheduler.preempt(handle)

    @rule(chance=st.integers(0, 5))
    def new_epoch(self, chance: int) -> None:
        if chance:
            return
        self.lead()
        for request_id, request in self.requests.items():
            if request.is_live:
                self.ask_again(request_id)

    @precondition(lambda self: self.state.view.epoch < self.scheduler.epoch)
    @rule()
    def hear_heartbeat(self) -> None:
        self.state.hear(self.scheduler.epoch)

    # -- the bus -----------------------------------------------------------------------------------------

    @precondition(lambda self: self.plans)
    @rule(data=st.data(), is_kept=st.booleans(), is_lost=st.sampled_from([False, False, True]))
    def deliver_plan(self, data: st.DataObject, is_kept: bool, is_lost: bool) -> None:
        plan = data.draw(st.sampled_from(self.plans))
        if not is_kept:
            self.plans.remove(plan)
        if not is_lost:
            self.take_plan(plan)

    @precondition(lambda self: self.plans)
    @rule()
    def deliver_next_plan(self) -> None:
        self.take_plan(self.plans.pop(0))

    @precondition(lambda self: self.dones)
    @rule(data=st.data(), is_kept=st.booleans(), is_lost=st.booleans())
    def deliver_done(self, data: st.DataObject, is_kept: bool, is_lost: bool) -> None:
        done = data.draw(st.sampled_from(self.dones))
        if not is_kept:
            self.dones.remove(done)
        if not is_lost:
            self.scheduler.take_done(done)

    @rule()
    def deliver_dones(self) -> None:
        for done in self.dones:
            self.scheduler.take_done(done)
        self.dones.clear()

    @rule()
    def repeat(self) -> None:
        self.now_s += 0.25
        self.dones += self.outbox.due(self.now_s)

    # -- the executor ------------------------------------------------------------------------------------

    @property
    def can_launch(self) -> bool:
        return self.in_flight is None

    def take_plan(self, plan: Plan) -> None:
        self.outbox.acknowledge(plan.epoch, plan.num_steps_acknowledged)
        outcome = self.state.take_plan(plan)
        if outcome is Outcome.TAKEN:
            assert (plan.epoch, plan.sequence) > self.last_taken
            assert plan.is_snapshot or (plan.epoch, plan.sequence - 1) == self.last_taken
            self.last_taken = (plan.epoch, plan.sequence)
        assert outcome is not Outcome.INVALID
        assert self.state.report_failures() is None
        if self.in_flight is None and outcome in (Outcome.TAKEN, Outcome.DUPLICATE):
            self.dones.append(self.state.acknowledgement())

    @precondition(lambda self: self.can_launch)
    @rule()
    def launch(self) -> None:
        step = self.state.next_step()
        if step is None:
            return
        self.put_in_flight(step)
        assert step.epoch == self.last_taken[0]
        for row, row_input in zip(step.rows, step.inputs, strict=True):
            key = (step.epoch, row.start.handle)
            request = self.requests[row.start.request_id]
            # 1. Every position once, in order, with the sequence's own id.
            assert row_input.start == self.positions.get(key, 0)
            end = row_input.start + len(row_input.ids)
            self.positions[key] = end
            sequence = request.prompt + request.expected
            if row_input.follows is None:
                assert list(row_input.ids) == sequence[row_input.start : end]
            else:
                assert (len(row_input.ids), end - 1) == (1, len(request.prompt) + row_input.index - 1)
            # 2. Only blocks that some plan gave to this very row.
            for table, granted in zip(row_input.tables, self.granted[key], strict=True):
                for entry in range(row_input.start // 16, (end - 1) // 16 + 1):
                    assert table[entry] == granted[entry]

    def put_in_flight(self, step: LaunchedStep) -> None:
        self.in_flight = step

    @precondition(lambda self: self.state.num_in_flight > 0)
    @rule()
    def complete(self) -> None:
        assert self.in_flight is not None
        step, self.in_flight = self.in_flight, None
        self.take_report(self.state.complete(step, self.runner.step(step.inputs), 0.001))

    @precondition(lambda self: self.state.num_in_flight > 0)
    @rule(chance=st.integers(0, 3))
    def fail(self, chance: int) -> None:
        assert self.in_flight is not None
        if chance:
            return
        step, self.in_flight = self.in_flight, None
        self.take_report(self.state.fail_step(step, "out of memory", 0.001))

    def take_report(self, report: Report | None) -> None:
        if report is None:
            return
        self.dones.append(report.done)
        self.outbox.add(report.done, self.now_s)
        for tokens in report.tokens.values():
            for row in tokens.rows:
                request = self.requests[row.request_id]
                # 3. No id is reported twice, left out, or after the end.
                if row.attempt != request.attempt:
                    continue
                assert request.finish_reason is None
                assert row.index == len(request.received)
                request.received += unpack_ids(row.ids)
                request.finish_reason = row.finish_reason
                assert request.received == request.expected[: len(request.received)]
        for _, failed in report.failures:
            request = self.requests[failed.request_id]
            assert failed.is_retryable
            request.has_failed = request.has_failed or failed.attempt == request.attempt

    @invariant()
    def view_is_consistent(self) -> None:
        view = self.state.view
        assert (view.epoch, view.plan) >= self.last_taken
        assert list(unpack_handles(view.handles)) == sorted(set(unpack_handles(view.handles)))
        assert view.has_gap == self.state.has_gap

    # -- in the end everything heals ---------------------------------------------------------------------

    def teardown(self) -> None:
        self.plans.clear()
        self.dones.clear()
        for _ in range(400):
            if not any(request.is_live for request in self.requests.values()):
                break
            self.heal_once()
        for request in self.requests.values():
            if not request.is_cancelled:
                assert request.received == request.expected
                is_stopped = request.expected[-1] == MODEL.end_id
                assert request.finish_reason == ("stop" if is_stopped else "length")
        for _ in range(3):  # released, acknowledged, known to be
            self.heal_once()
        assert self.scheduler.num_free == NUM_BLOCKS
        assert not self.state.view.handles

    def heal_once(self) -> None:
        for request_id, request in self.requests.items():
            if request.has_failed and request.is_live:
                self.ask_again(request_id)
        view = self.state.view
        hello = Hello(executor="ex", model="m", epoch=view.epoch, plan=view.plan, pool=(), max_model_len=1,
                      has_gap=view.has_gap)  # fmt: skip
        self.write_plan(self.scheduler.needs_snapshot(hello) or view.plan != self.scheduler.sequence, 4)
        self.take_plan(self.plans.pop())
        while True:
            if self.state.num_in_flight:
                self.complete()
            if self.can_launch:
                self.launch()
            if not self.state.num_in_flight:
                break
        self.repeat()
        self.dones.append(self.state.acknowledgement())
        self.deliver_dones()


class AheadPlanMachine(PlanMachine):
    """The same with steps launched ahead of what was collected, on a device."""

    max_in_flight = 2

    def __init__(self) -> None:
        super().__init__()
        self.launches = Ahead(FakeDevice(self.runner), lambda: self.now_s)
        self.owes_acknowledgement = False

    @property
    def can_launch(self) -> bool:
        return self.launches.can_launch

    def put_in_flight(self, step: LaunchedStep) -> None:
        self.owes_acknowledgement = False
        self.launches.launch(step)

    def take_plan(self, plan: Plan) -> None:
        while self.state.needs_quiet(plan) and self.state.num_in_flight:
            self.complete()
        self.in_flight = self.state.oldest_in_flight  # for what follows: nothing is acknowledged then
        super().take_plan(plan)
        self.owes_acknowledgement = self.in_flight is not None

    @precondition(lambda self: self.state.num_in_flight > 0)
    @rule()
    def complete(self) -> None:
        step = self.state.oldest_in_flight
        assert step is not None
        assert step is self.launches.oldest
        try:
            report = self.state.complete(step, self.launches.collect(), 0.001)
        except MemoryError as error:
            self.runner.num_raises = 0
            report = self.state.fail_step(step, str(error), 0.001)
        self.take_report(report)
        if self.state.num_in_flight == 0 and self.owes_acknowledgement:
            self.owes_acknowledgement = False
            self.dones.append(self.state.acknowledgement())

    @precondition(lambda self: self.state.num_in_flight > 0)
    @rule(chance=st.integers(0, 3), is_for_good=st.booleans())
    def fail(self, chance: int, is_for_good: bool) -> None:
        """One that raises costs nothing; where all parts do it is nobody's fault, and fails the step."""
        if not chance:
            self.runner.num_raises = 1000 if is_for_good else 1

    def teardown(self) -> None:
        self.runner.num_raises = 0
        super().teardown()


TestPlans = PlanMachine.TestCase
TestPlansAhead = AheadPlanMachine.TestCase
TestPlans.settings = TestPlansAhead.settings = settings(
    max_examples=100,
    stateful_step_count=80,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
