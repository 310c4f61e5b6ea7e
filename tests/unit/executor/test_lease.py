"""The executor's plan rules, one by one: this state and this plan, that outcome."""

from array import array
from dataclasses import replace as copy_with
from typing import Any

import msgspec
import pytest

from pagebus.bus.messages import (
    Chunk,
    Grant,
    Logprobs,
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
from pagebus.executor.batch import BlockCopy, RowOutput
from pagebus.executor.fake import GREEDY, FakeRunner, fake_sequence
from pagebus.executor.lease import Outcome, PlanState
from pagebus.executor.reports import Report
from tests.support.hand_scheduler import HandScheduler

PROMPT = list(range(10, 50))  # 40 ids: 3 blocks


def new_state() -> PlanState:
    return PlanState("ex", (PoolGroup(num_blocks=64),), 128)


def row(handle: int = 1, **changes: Any) -> RowStart:
    fields: dict[str, Any] = {"request_id": f"r{handle}", "num_ids": 40, "max_tokens": 8, "sampling": GREEDY}
    fields |= {"handle": handle, "reply": "pagebus.out.g", "life": "pagebus.life.g"}
    return RowStart(**{**fields, **changes})


def chunk(start: int, end: int, handle: int = 1) -> Chunk:
    return Chunk(handle=handle, start=start, end=end, ids=pack_ids(PROMPT[start:end]))


def grant(blocks: list[int], handle: int = 1, offset: int = 0, group: int = 0) -> Grant:
    return Grant(handle, group, offset, array("i", blocks))


def plan(sequence: int, *steps: Step, epoch: int = 1, **fields: Any) -> Plan:
    fields.setdefault("is_snapshot", sequence == 1)
    fields["grants"], fields["granted"] = pack_grants(fields.pop("grants", ()))
    return Plan(executor="ex", epoch=epoch, sequence=sequence, steps=steps, **fields)


def decode(*handles: int) -> Step:
    return Step(decode=pack_handles(handles))


def run(state: PlanState, runner: FakeRunner) -> list[Report]:
    """All steps that can be launched."""
    reports = []
    while (step := state.next_step()) is not None:
        report = state.complete(step, runner.step(step.inputs), 0.001)
        assert report is not None
        reports.append(report)
    return reports


def made(reports: list[Report]) -> list[int]:
    return [token for report in reports for token in unpack_ids(report.done.ids)]


@pytest.fixture
def runner() -> FakeRunner:
    return FakeRunner(num_blocks=64, max_model_len=128)


def test_the_first_plan_of_an_epoch_must_be_a_snapshot() -> None:
    state = new_state()
    assert state.take_plan(plan(1, is_snapshot=False)) is Outcome.GAP
    assert state.view.has_gap
    assert state.take_plan(plan(2, is_snapshot=True)) is Outcome.TAKEN
    assert not state.view.has_gap
    assert state.take_plan(plan(1, epoch=2, is_snapshot=False)) is Outcome.GAP
    assert (state.view.epoch, state.view.plan) == (2, 0)


@pytest.mark.parametrize(
    ("sequence", "epoch", "is_snapshot", "outcome"),
    [
        (3, 5, False, Outcome.TAKEN),
        (2, 5, False, Outcome.DUPLICATE),
        (2, 5, True, Outcome.DUPLICATE),
        (1, 5, False, Outcome.DUPLICATE),
        (4, 5, False, Outcome.GAP),
        (9, 5, True, Outcome.TAKEN),
        (3, 4, False, Outcome.STALE),
        (9, 4, True, Outcome.STALE),
        (1, 6, True, Outcome.TAKEN),
    ],
)
def test_sequence_and_epoch(sequence: int, epoch: int, is_snapshot: bool, outcome: Outcome) -> None:
    state = new_state()
    state.take_plan(plan(1, epoch=5))
    state.take_plan(plan(2, epoch=5))
    assert state.take_plan(plan(sequence, epoch=epoch, is_snapshot=is_snapshot)) is outcome


def test_plans_for_another_executor_or_without_epoch_are_refused() -> None:
    state = new_state()
    assert state.take_plan(msgspec.structs.replace(plan(1), executor="other")) is Outcome.STALE
    assert state.take_plan(plan(1, epoch=0)) is Outcome.STALE


def test_a_heard_epoch_refuses_lower_plans_while_the_lease_goes_on(runner: FakeRunner) -> None:
    state = new_state()
    steps = Step(chunks=(chunk(0, 40),)), decode(1)
    state.take_plan(plan(1, *steps, rows=(row(),), grants=(grant([5, 6, 7]),)))
    assert state.hear(3)
    assert not state.hear(3)
    assert (state.view.epoch, state.view.plan, state.view.has_gap) == (3, 0, True)
    assert state.take_plan(plan(2)) is Outcome.STALE
    assert made(run(state, runner)) == fake_sequence(PROMPT, 2)


def test_prefill_in_chunks_then_decode_until_max_tokens(runner: FakeRunner) -> None:
    state = new_state()
    steps = [Step(chunks=(chunk(s, min(s + 16, 40)),)) for s in (0, 16, 32)] + [decode(1)] * 20
    state.take_plan(plan(1, *steps, rows=(row(),), grants=(grant([5, 6, 7]),)))
    reports = run(state, runner)
    assert made(reports) == fake_sequence(PROMPT, 8)
    assert [list(unpack_handles(r.done.num_computed)) for r in reports[:4]] == [[16], [32], [40], [41]]
    assert [r.done.num_steps for r in reports] == list(range(1, 11))
    assert reports[-1].done.finished == {1: "length"}
    assert [r.done.finished for r in reports[:-1]] == [{}] * 9
    assert state.num_steps_left == 0
    indices = [t.rows[0].index for r in reports for t in r.tokens.values()]
    assert indices == list(range(8))
    assert reports[-1].tokens["pagebus.out.g"].rows[0].finish_reason == "length"


def test_a_stop_id_ends_the_row_once_min_tokens_are_made(runner: FakeRunner) -> None:
    expected = fake_sequence(PROMPT, 8)
    for min_tokens, num_made in ((0, 3), (3, 3), (4, 8)):
        state = new_state()
        start = row(stop_token_ids=pack_ids([expected[2]]), min_tokens=min_tokens)
        first = Step(chunks=(chunk(0, 40),))
        state.take_plan(plan(1, first, *[decode(1)] * 9, rows=(start,), grants=(grant([5, 6, 7]),)))
        reports = run(state, runner)
        assert made(reports) == expected[:num_made]
        assert reports[-1].done.finished == {1: "stop" if num_made == 3 else "length"}


def test_a_new_plan_replaces_steps_not_launched_and_skips_what_is_computed(runner: FakeRunner) -> None:
    state = new_state()
    wide = Step(chunks=(chunk(0, 24),))
    state.take_plan(plan(1, wide, decode(1), rows=(row(),), grants=(grant([5, 6, 7]),)))
    step = state.next_step()
    assert step is not None
    # Written without knowledge of the first step: it starts at 0 again.
    again = [Step(chunks=(chunk(0, 24),)), Step(chunks=(chunk(8, 40),)), decode(1)]
    assert state.take_plan(plan(2, *again)) is Outcome.TAKEN
    assert state.num_steps_left == 3
    first = state.complete(step, runner.step(step.inputs), 0.0)
    assert first is not None
    assert first.done.plan == 1
    second = state.next_step()
    assert second is not None
    assert (second.inputs[0].start, len(second.inputs[0].ids)) == (24, 16)
    report = state.complete(second, runner.step(second.inputs), 0.0)
    assert report is not None
    assert report.done.plan == 2
    assert made([report, *run(state, runner)]) == fake_sequence(PROMPT, 2)


def test_a_chunk_beyond_the_position_is_a_gap_until_a_snapshot(runner: FakeRunner) -> None:
    state = new_state()
    rows, grants = (row(),), (grant([5, 6, 7]),)
    state.take_plan(plan(1, Step(chunks=(chunk(16, 40),)), decode(1), rows=rows, grants=grants))
    assert state.next_step() is None
    assert state.view.has_gap
    state.take_plan(plan(2))
    assert state.view.has_gap
    state.take_plan(plan(3, Step(chunks=(chunk(0, 40),)), is_snapshot=True, rows=rows, grants=grants))
    assert not state.view.has_gap
    assert made(run(state, runner)) == fake_sequence(PROMPT, 1)


def test_a_row_whose_table_is_full_sits_out_until_more_is_granted(runner: FakeRunner) -> None:
    state = new_state()
    first = Step(chunks=(chunk(0, 40),))
    start = row(max_tokens=20)
    state.take_plan(plan(1, first, *[decode(1)] * 30, rows=(start,), grants=(grant([5, 6, 7]),)))
    early = made(run(state, runner))
    assert early == fake_sequence(PROMPT, 9)  # positions 40 to 47, and one id more
    state.take_plan(plan(2, *[decode(1)] * 30, grants=(grant([9], offset=3),)))
    assert early + made(run(state, runner)) == fake_sequence(PROMPT, 20)


def test_rows_released_while_their_step_runs_are_still_reported_with_it(runner: FakeRunner) -> None:
    state = new_state()
    steps = [Step(chunks=(chunk(0, 40),)), *[decode(1)] * 3]
    state.take_plan(plan(1, *steps, rows=(row(),), grants=(grant([5, 6, 7]),)))
    step = state.next_step()
    assert step is not None
    state.take_plan(plan(2, decode(1), released=pack_handles([1])))
    report = state.complete(step, runner.step(step.inputs), 0.0)
    assert report is not None
    assert report.done.plan == 1
    assert made([report]) == fake_sequence(PROMPT, 1)
    assert state.next_step() is None
    assert state.acknowledgement().plan == 2


def test_a_snapshot_drops_rows_it_does_not_name_and_keeps_positions(runner: FakeRunner) -> None:
    state = new_state()
    first = Step(chunks=(chunk(0, 40, 1), chunk(0, 40, 2)))
    grants = (grant([5, 6, 7]), grant([8, 9, 10], handle=2))
    state.take_plan(plan(1, first, rows=(row(1), row(2)), grants=grants))
    early = run(state, runner)
    state.take_plan(plan(7, first, decode(1, 2), is_snapshot=True, rows=(row(1),), grants=grants[:1]))
    assert list(unpack_handles(state.view.handles)) == [1]
    late = run(state, runner)
    assert [list(unpack_handles(r.done.handles)) for r in late] == [[1]]
    assert [made(early)[0], *made(late)] == fake_sequence(PROMPT, 2)


def test_a_higher_epoch_starts_from_nothing_and_silences_the_step_in_flight(runner: FakeRunner) -> None:
    state = new_state()
    steps = (Step(chunks=(chunk(0, 40),)), decode(1))
    state.take_plan(plan(1, *steps, rows=(row(),), grants=(grant([5, 6, 7]),)))
    step = state.next_step()
    assert step is not None
    # The new leader's handle 1 is another row, in the same blocks.
    state.take_plan(plan(1, *steps, epoch=2, rows=(row(attempt=2),), grants=(grant([5, 6, 7]),)))
    assert state.complete(step, runner.step(step.inputs), 0.0) is None
    reports = run(state, runner)
    assert made(reports) == fake_sequence(PROMPT, 2)
    assert [(r.done.epoch, r.done.num_steps) for r in reports] == [(2, 1), (2, 2)]


def test_a_failed_step_fails_its_rows_for_a_retry_and_the_state_lives_on(runner: FakeRunner) -> None:
    state = new_state()
    first = Step(chunks=(chunk(0, 40, 1), chunk(0, 40, 2)))
    grants = (grant([5, 6, 7]), grant([8, 9, 10], handle=2), grant([11, 12, 13], handle=3))
    rows = (row(1), row(2, request_id="r1", choice=1), row(3))
    state.take_plan(plan(1, first, Step(chunks=(chunk(0, 40, 3),)), rows=rows, grants=grants))
    step = state.next_step()
    assert step is not None
    report = state.fail_step(step, "out of memory", 0.5)
    assert report is not None
    assert report.done.failed == {1: "out of memory", 2: "out of memory"}
    assert list(unpack_handles(report.done.num_computed)) == [0, 0]
    ((reply, failed),) = report.failures  # once a request, not once a row
    assert (reply, failed.request_id, failed.is_retryable) == ("pagebus.out.g", "r1", True)
    assert made(run(state, runner)) == fake_sequence(PROMPT, 1)


@pytest.mark.parametrize(
    "output", [RowOutput(error="broken"), RowOutput(), RowOutput(id=-1), RowOutput(id=1 << 31)]
)
def test_a_row_error_fails_the_row_alone(output: RowOutput) -> None:
    state = new_state()
    grants = (grant([5, 6, 7]), grant([8, 9, 10], handle=2))
    first = Step(chunks=(chunk(0, 40, 1), chunk(0, 40, 2)))
    state.take_plan(plan(1, first, decode(1, 2), rows=(row(1), row(2)), grants=grants))
    step = state.next_step()
    assert step is not None
    report = state.complete(step, [output, RowOutput(id=7)], 0.0)
    assert report is not None
    assert list(report.done.failed) == [1]
    assert (report.failures[0][1].code, report.failures[0][1].is_retryable) == ("row_failed", False)
    assert [r.request_id for r in report.tokens["pagebus.out.g"].rows] == ["r2"]
    later = state.next_step()
    assert later is not None
    assert [r.start.handle for r in later.rows] == [2]


@pytest.mark.parametrize(
    "bad",
    [
        {"rows": (row(num_ids=0),)},
        {"rows": (row(num_ids=129),)},
        {"rows": (row(num_generated=8),)},
        {"rows": (row(),), "grants": (grant([64]),)},
        {"rows": (row(),), "grants": (grant([-2]),)},
        {"rows": (row(),), "grants": (grant([1], offset=1 << 31),)},
        {"rows": (row(),), "grants": (grant([1], offset=8),)},
        {"rows": (row(),), "grants": (grant([1], group=1),)},
    ],
)
def test_a_bad_row_fails_alone_and_is_reported(bad: dict[str, Any], runner: FakeRunner) -> None:
    state = new_state()
    rows = (*bad["rows"], row(2))
    grants = (*bad.get("grants", ()), grant([8, 9, 10], handle=2))
    good = Step(chunks=(chunk(0, 40, 2),))
    assert state.take_plan(plan(1, good, rows=rows, grants=grants)) is Outcome.TAKEN
    report = state.report_failures()
    assert report is not None
    assert list(report.done.failed) == [1]
    assert report.done.num_steps == 1
    assert not report.failures[0][1].is_retryable
    assert state.report_failures() is None
    assert made(run(state, runner)) == fake_sequence(PROMPT, 1)


@pytest.mark.parametrize(
    ("start", "end", "num_ids"), [(0, 41, 41), (8, 8, 0), (-1, 4, 5), (0, 16, 15), (0, 16, 17)]
)
def test_a_bad_chunk_fails_its_row(start: int, end: int, num_ids: int) -> None:
    state = new_state()
    bad = Chunk(handle=1, start=start, end=end, ids=pack_ids([3] * num_ids))
    state.take_plan(plan(1, Step(chunks=(bad,)), rows=(row(),), grants=(grant([5, 6, 7]),)))
    report = state.report_failures()
    assert report is not None
    assert list(report.done.failed) == [1]
    assert state.next_step() is None


@pytest.mark.parametrize(
    "broken",
    [
        {"released": b"123"},
        {"rows": (row(stop_token_ids=b"1"),)},
        {"rows": (row(handle=1 << 32),)},
        {"grants": b"12345"},
        {"grants": pack_handles([1, 0, 0, 2]), "granted": pack_ids([1])},
        {"granted": pack_ids([1])},
        {"rows": (row(2, copies=pack_ids([0, 1])),)},
        {"steps": (Step(decode=b"1"),)},
    ],
)
def test_a_malformed_plan_changes_nothing(broken: dict[str, Any], runner: FakeRunner) -> None:
    state = new_state()
    state.take_plan(plan(1, Step(chunks=(chunk(0, 40),)), rows=(row(),), grants=(grant([5, 6, 7]),)))
    fields = {"executor": "ex", "epoch": 1, "sequence": 2, "is_snapshot": True, **broken}
    assert state.take_plan(Plan(**fields)) is Outcome.INVALID
    assert state.view.has_gap
    assert (state.view.plan, list(unpack_handles(state.view.handles))) == (1, [1])
    assert made(run(state, runner)) == fake_sequence(PROMPT, 1)


def test_blocks_under_computed_positions_may_be_given_up_but_not_replaced(runner: FakeRunner) -> None:
    for blocks, is_flaw in (([5, 6, 7, 8], False), ([-1, 6, 7], False), ([5, 9, 7], True)):
        state = new_state()
        state.take_plan(plan(1, Step(chunks=(chunk(0, 40),)), rows=(row(),), grants=(grant([5, 6, 7]),)))
        run(state, runner)
        state.take_plan(plan(2, grants=(grant(blocks),)))
        assert (state.report_failures() is not None) is is_flaw


def test_rows_of_a_requester_that_is_gone_end_once(runner: FakeRunner) -> None:
    state = new_state()
    grants = (grant([5, 6, 7]), grant([8, 9, 10], handle=2))
    first = Step(chunks=(chunk(0, 40, 1), chunk(0, 40, 2)))
    rows = (row(1), row(2, life="pagebus.life.h"))
    state.take_plan(plan(1, first, decode(1, 2), rows=rows, grants=grants))
    assert state.view.lives == {"pagebus.life.g", "pagebus.life.h"}
    state.end_requesters(frozenset({"pagebus.life.h"}))
    state.end_requesters(frozenset({"pagebus.life.h"}))
    report = state.report_failures()
    assert report is not None
    assert list(report.done.failed) == [2]
    assert {h for r in run(state, runner) for h in unpack_handles(r.done.handles)} == {1}


def test_only_the_step_in_flight_lands() -> None:
    state = new_state()
    state.take_plan(plan(1, Step(chunks=(chunk(0, 40),)), rows=(row(),), grants=(grant([5, 6, 7]),)))
    step = state.next_step()
    assert step is not None
    with pytest.raises(RuntimeError):
        state.next_step()
    with pytest.raises(RuntimeError):
        state.fail_step(copy_with(step), "x", 0.0)
    with pytest.raises(ValueError, match="0 outputs for 1 rows"):
        state.complete(step, [], 0.0)
    assert state.fail_step(step, "x", 0.0) is not None


@pytest.mark.parametrize("horizon", [1, 2, 4, 16])
def test_results_are_the_same_for_every_horizon(horizon: int) -> None:
    runner = FakeRunner(num_blocks=64, max_model_len=128)
    state = new_state()
    scheduler = HandScheduler("ex", horizon=horizon)
    prompts = [list(range(n, n + length)) for n, length in enumerate((1, 15, 16, 17, 40, 70))]
    for number, prompt in enumerate(prompts):
        scheduler.add(f"r{number}", prompt, max_tokens=30 + number)
    received: dict[str, list[int]] = {f"r{number}": [] for number in range(6)}
    for _ in range(300):
        assert state.take_plan(scheduler.plan()) is Outcome.TAKEN
        for report in run(state, runner):
            scheduler.take_done(report.done)
            for token_row in report.tokens["pagebus.out.r"].rows if report.tokens else ():
                received[token_row.request_id] += unpack_ids(token_row.ids)
        if not state.view.handles:
            break
    expected = {f"r{n}": fake_sequence(prompt, 30 + n) for n, prompt in enumerate(prompts)}
    assert received == expected
    assert scheduler.num_free == 64


def test_a_row_starts_after_its_cached_positions(runner: FakeRunner) -> None:
    """Its first blocks are another row's, the last of them a copy."""
    state = new_state()
    state.take_plan(plan(1, Step(chunks=(chunk(0, 40),)), rows=(row(),), grants=(grant([5, 6, 7]),)))
    first = made(run(state, runner))
    start = row(2, num_cached=39, copies=pack_ids([0, 7, 9]))
    steps = (Step(chunks=(chunk(39, 40, 2),)), decode(2))
    state.take_plan(plan(2, *steps, rows=(start,), grants=(grant([5, 6, 9], handle=2),)))
    launched = state.next_step()
    assert launched is not None
    assert launched.copies == [BlockCopy(0, 7, 9)]
    runner.copy_blocks(launched.copies)
    report = state.complete(launched, runner.step(launched.inputs), 0.001)
    assert report is not None
    assert list(unpack_ids(report.done.ids)) == first
    (told,) = report.tokens["pagebus.out.g"].rows
    assert told.num_cached == 39
    (second,) = run(state, runner)
    assert made([report, second]) == fake_sequence(PROMPT, 2)
    assert second.tokens["pagebus.out.g"].rows[0].num_cached is None


@pytest.mark.parametrize(
    "changes",
    [
        {"num_cached": 40},
        {"num_cached": 8, "copies": pack_ids([1, 5, 8])},  # no such group
        {"num_cached": 8, "copies": pack_ids([0, 64, 8])},  # a source outside the pool
        {"num_cached": 8, "copies": pack_ids([0, 5, 5])},  # a target that is not the row's
        {"num_generated": 40, "max_tokens": 50},  # without a prompt
        {"sampling": Sampling(presence_penalty=1.0)},  # without its ids
        {"sampling": Sampling(presence_penalty=1.0), "all_ids": pack_ids(range(39))},
    ],
)
def test_a_cached_start_that_cannot_be_right_fails_alone(changes: dict[str, Any], runner: FakeRunner) -> None:
    state = new_state()
    rows = (row(1, **changes), row(2))
    grants = (grant([8, 9, 10]), grant([11, 12, 13], handle=2))
    steps = (Step(chunks=(chunk(0, 40, 2),)),)
    assert state.take_plan(plan(1, *steps, rows=rows, grants=grants)) is Outcome.TAKEN
    failed, done = state.report_failures(), run(state, runner)
    assert failed is not None
    assert list(failed.done.failed) == [1]
    assert made(done) == fake_sequence(PROMPT, 1)


def test_a_row_knows_its_history_where_it_matters_and_what_is_banned(runner: FakeRunner) -> None:
    state = new_state()
    start = row(
        sampling=Sampling(presence_penalty=1.0),
        all_ids=pack_ids(PROMPT),
        num_generated=2,
        min_tokens=4,
        stop_token_ids=pack_ids([7, 3]),
    )
    steps = (Step(chunks=(chunk(0, 40),)), *[decode(1)] * 3)
    state.take_plan(plan(1, *steps, rows=(start, row(2)), grants=(grant([5, 6, 7]),)))
    seen = []
    while (step := state.next_step()) is not None:
        (given,) = step.inputs
        seen.append((list(given.history), given.num_prompt, list(given.banned_ids)))
        state.complete(step, runner.step(step.inputs), 0.001)
    sequence = PROMPT + fake_sequence(PROMPT[:38], 4, sampling=start.sampling, received=PROMPT[38:])
    assert seen == [(sequence[: 40 + i], 38, [3, 7] if i < 2 else []) for i in range(4)]


def test_log_probabilities_reach_the_requester(runner: FakeRunner) -> None:
    state = new_state()
    sampling = Sampling(temperature=0.0, num_logprobs=0, num_prompt_logprobs=0)
    rows = (row(sampling=sampling, all_ids=pack_ids(PROMPT)),)
    state.take_plan(plan(1, Step(chunks=(chunk(0, 40),)), rows=rows, grants=(grant([5, 6, 7]),)))
    step = state.next_step()
    assert step is not None
    of_id, of_prompt = (Logprobs(ids=b"i", values=b"v", ranks=b"r"), Logprobs(ids=b"", values=b"", ranks=b""))
    report = state.complete(step, [RowOutput(5, logprobs=of_id, prompt_logprobs=of_prompt)], 0.001)
    assert report is not None
    tokens = report.tokens["pagebus.out.g"]
    assert tokens.rows[0].logprobs == of_id
    assert [(told.start, told.logprobs) for told in tokens.prompts] == [(1, of_prompt)]


def test_a_chunk_computed_already_is_made_up_for_by_the_next(runner: FakeRunner) -> None:
    """A plan written without knowledge of a step wastes none: each computes as many positions as planned."""
    state = new_state()
    chunks = [Step(chunks=(chunk(at, at + 8),)) for at in range(0, 40, 8)]
    state.take_plan(plan(1, *chunks, rows=(row(),), grants=(grant([5, 6, 7]),)))
    for _ in range(2):
        step = state.next_step()
        assert step is not None
        state.complete(step, runner.step(step.inputs), 0.001)
    assert state.take_plan(plan(2, *chunks, decode(1))) is Outcome.TAKEN
    spans = []
    reports = []
    while (step := state.next_step()) is not None:
        spans.append((step.inputs[0].start, step.inputs[0].start + len(step.inputs[0].ids)))
        report = state.complete(step, runner.step(step.inputs), 0.001)
        assert report is not None
        reports.append(report)
    assert spans == [(16, 24), (24, 32), (32, 40), (40, 41)]
    assert made(reports) == fake_sequence(PROMPT, 2)
