"""Launched ahead or one after the other: the same plans make the same reports, message by message."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given, settings

from pagebus.bus.messages import Plan, Sampling, StepDone, Tokens
from pagebus.executor.batch import RowInput, RowOutput, Runner
from pagebus.executor.fake import FakeModel, FakeRunner
from pagebus.executor.fake_device import FakeDevice
from pagebus.executor.reports import Report
from pagebus.executor.step_loop import Acknowledge, StepLoop
from tests.support.hand_scheduler import HandScheduler

MODEL = FakeModel(windows=(None, 20), end_probability=0.08)
NUM_BLOCKS = 40
MAX_LEN = 112
BAD_ID = 600  # no step survives it


@dataclass
class Asked:
    """A request of a script."""

    prompt: list[int]
    max_tokens: int
    min_tokens: int
    sampling: Sampling


@dataclass
class Did:
    """Anything else: turns of the executor, a plan (horizon, chunk size), a row taken away and put back."""

    what: str
    number: int = 1
    chunk_size: int = 16


Script = list[Asked | Did]


class Model(FakeRunner):
    """Raises for rows with a bad id, and once for nobody's fault."""

    def __init__(self, raises_at: int) -> None:
        super().__init__(MODEL, num_blocks=NUM_BLOCKS, max_model_len=MAX_LEN)
        self._raises_at = raises_at
        self._num_calls = 0

    def step(self, rows: Sequence[RowInput]) -> list[RowOutput]:
        self._num_calls += 1
        if self._num_calls == self._raises_at:
            raise RuntimeError("once")
        if any(BAD_ID in row.ids for row in rows):
            raise IndexError("a row that no step survives")
        return super().step(rows)


@dataclass
class Said:
    """One report, without how long the step took."""

    done: StepDone
    tokens: dict[str, Tokens]
    failed: list[str]


@dataclass
class Run:
    """What was said; and each plan with how many steps before it made a report."""

    said: list[Said] = field(default_factory=list)
    plans: list[tuple[int, Plan]] = field(default_factory=list)


class Executor:
    """A step loop by hand. Of each step: whether it made a report."""

    def __init__(self, runner: Runner) -> None:
        self.loop = StepLoop("ex", runner, lambda: 0.0)
        self.loop.take_events()
        self.said: list[Said] = []
        self.launched: list[int] = []  # steps, by their place in `made_report`
        self.made_report: list[bool] = []
        self._held: list[StepDone] = []

    def turn(self, *plans: Plan) -> list[StepDone]:
        """As the worker does: begin, tell, run."""
        if self.loop.begin(plans) is not None:
            self.made_report.append(False)
            self.launched.append(len(self.made_report) - 1)
        self._note(is_of_step=False)
        told, self._held = self._held, []
        if self.loop.due is not None:
            self.loop.run()
            self._note(is_of_step=True)
        return told

    def _note(self, *, is_of_step: bool) -> None:
        collected = self.launched.pop(0) if is_of_step else None
        for event in self.loop.take_events():
            if isinstance(event, Report):
                assert collected is not None
                self.made_report[collected] = True
                failed = dict.fromkeys(event.done.failed, "")  # words differ by what raised first
                done = msgspec.structs.replace(event.done, duration_us=0, failed=failed)
                self.said.append(Said(done, event.tokens, [failed.code for _, failed in event.failures]))
                self._held.append(event.done)
            elif isinstance(event, Acknowledge):
                self._held.append(event.done)


def play(script: Script, runner: Runner) -> Run:
    """The script, with a scheduler that learns what it is told."""
    executor = Executor(runner)
    hand = HandScheduler("ex", num_blocks=NUM_BLOCKS, num_groups=2)
    plans: list[tuple[int, Plan]] = []  # with how many steps were launched before

    def turn(*made: Plan) -> None:
        plans.extend((len(executor.made_report), plan) for plan in made)
        for done in executor.turn(*made):
            hand.take_done(done)

    for count, action in enumerate([*script, *_to_the_end()]):
        if isinstance(action, Asked):
            hand.add(
                f"r{count}",
                action.prompt,
                max_tokens=action.max_tokens,
                min_tokens=action.min_tokens,
                stop=(MODEL.end_id,),
                sampling=action.sampling,
            )
        elif action.what == "turns":
            for _ in range(action.number):
                turn()
        elif action.what == "plan":
            hand.horizon, hand.chunk_size = action.number, action.chunk_size
            turn(hand.plan())
        else:
            live = [handle for handle, row in hand.rows.items() if not row.is_over]
            if live:
                hand.preempt(live[action.number % len(live)])
    return Run(executor.said, [(sum(executor.made_report[:num]), plan) for num, plan in plans])


def _to_the_end() -> Iterator[Did]:
    for _ in range(60):
        yield Did("plan", 8, 40)
        yield Did("turns", 12)


def play_again(plans: list[tuple[int, Plan]], runner: Runner) -> list[Said]:
    """Each plan after as many reports as before."""
    executor = Executor(runner)
    left = list(plans)
    while left or not executor.loop.is_idle:
        now = [plan for num, plan in left if num <= len(executor.said)]
        if not now and executor.loop.is_idle:
            break
        left = left[len(now) :]
        executor.turn(*now)
    return executor.said


_IDS = st.one_of(st.integers(0, 511), st.integers(0, 511), st.integers(595, BAD_ID))
_ASKED = st.builds(
    Asked,
    st.lists(_IDS, min_size=1, max_size=60),
    st.integers(1, 40),
    st.integers(0, 6),
    st.builds(
        Sampling,
        temperature=st.sampled_from([0.0, 1.0]),
        seed=st.integers(0, 3),
        presence_penalty=st.sampled_from([0.0, 0.0, 0.0, 1.0]),
    ),
)
_DID = st.builds(
    Did, st.sampled_from(["turns", "turns", "plan", "plan", "preempt"]), st.integers(1, 8), st.integers(3, 60)
)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@given(
    script=st.lists(st.one_of(_ASKED, _DID, _DID), min_size=5, max_size=50),
    raises_at=st.integers(0, 60),
    raises_late=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_the_same_plans_make_the_same_reports(script: Script, raises_at: int, raises_late: bool) -> None:
    ahead = play(script, FakeDevice(Model(raises_at), raises_late=raises_late))
    in_turn = play_again(ahead.plans, Model(0))
    assert ahead.said == in_turn
