"""The imaginary executor does what plans say, as their contract has it."""

from array import array

import pytest

from pagebus.bench.paper_executor import ImaginaryExecutor, PlanError
from pagebus.bus.messages import (
    Chunk,
    Grant,
    Plan,
    RowStart,
    Step,
    StepDone,
    pack_grants,
    pack_handles,
    pack_ids,
    unpack_handles,
)


def executor(num_positions: int = 6) -> ImaginaryExecutor:
    """Every row ends when it has written `num_positions`."""
    return ImaginaryExecutor("e", 16, 4, lambda request_id, choice: num_positions)


def start(handle: int, num_ids: int = 3, num_generated: int = 0, num_cached: int = 0) -> RowStart:
    return RowStart(
        handle=handle,
        request_id="0",
        reply="",
        num_ids=num_ids,
        num_generated=num_generated,
        num_cached=num_cached,
        max_tokens=100,
    )


def chunk(handle: int, first: int, end: int) -> Chunk:
    return Chunk(handle=handle, start=first, end=end, ids=pack_ids(range(end - first)))


def plan(sequence: int, grants: dict[int, tuple[int, list[int]]] | None = None, **fields: object) -> Plan:
    heads, granted = pack_grants(
        Grant(handle, 0, offset, array("i", blocks)) for handle, (offset, blocks) in (grants or {}).items()
    )
    return Plan(executor="e", epoch=1, sequence=sequence, grants=heads, granted=granted, **fields)  # type: ignore[arg-type]


def drive(e: ImaginaryExecutor) -> list[StepDone]:
    """All steps of the lease."""
    done = []
    while (step := e.next_step()) is not None:
        done.append(e.complete(step, 0.01))
    return done


def test_a_row_prefills_decodes_and_ends() -> None:
    e = executor()
    decode = Step(decode=pack_handles([1]), num_times=5)
    first = Step(chunks=(chunk(1, 0, 3),))
    e.take(plan(1, {1: (0, [5, 6])}, rows=(start(1),), steps=(first, decode)))
    done = drive(e)
    assert [list(unpack_handles(d.num_computed)) for d in done] == [[3], [4], [5], [6]]
    assert [list(d.num_made) for d in done] == [[1], [1], [1], [1]]
    assert [d.finished for d in done] == [{}, {}, {}, {1: "stop"}]
    assert len(e.running) == 0
    assert e.uses.sum() == 2  # held until the scheduler knows
    e.forget(1)
    assert e.uses.sum() == 0
    assert e.num_row_blocks == 0


def test_a_full_table_and_an_unfinished_prefill_sit_out() -> None:
    e = executor()
    decode = Step(decode=pack_handles([1]))
    e.take(plan(1, {1: (0, [5])}, rows=(start(1),), steps=(Step(chunks=(chunk(1, 0, 2),)), decode)))
    (only,) = drive(e)
    assert list(only.num_made) == [0]
    e.take(plan(2, steps=(Step(chunks=(chunk(1, 2, 3),)), decode, decode)))
    assert [list(unpack_handles(d.num_computed)) for d in drive(e)] == [[3], [4]]
    e.take(plan(3, {1: (1, [6])}, steps=(decode,)))
    assert [list(unpack_handles(d.num_computed)) for d in drive(e)] == [[5]]


def test_chunks_below_its_own_position_are_skipped_and_gaps_are_faults() -> None:
    e = executor()
    e.take(plan(1, {1: (0, [5])}, rows=(start(1, num_cached=2),), steps=(Step(chunks=(chunk(1, 0, 3),)),)))
    step = e.next_step()
    assert step is not None
    assert step.num_tokens == 1
    e.complete(step, 0.01)
    e.take(plan(2, {2: (0, [7])}, rows=(start(2),), steps=(Step(chunks=(chunk(2, 1, 3),)),)))
    with pytest.raises(PlanError, match="row 2 is at 0"):
        e.next_step()


def test_a_released_row_is_cut_short_and_counted_when_it_comes_back() -> None:
    e = executor()
    e.take(plan(1, {1: (0, [5])}, rows=(start(1),), steps=(Step(chunks=(chunk(1, 0, 3),)),)))
    step = e.next_step()
    assert step is not None
    e.take(plan(2, released=pack_handles([1])))
    assert list(e.leaving) == [(2, 1)]
    assert list(unpack_handles(e.complete(step, 0.01).handles)) == [1]
    assert e.handles == []
    e.take(plan(3, {2: (0, [6, 7])}, rows=(start(2, num_ids=4, num_generated=1),)))
    assert e.num_restarts == 1


def test_plans_come_once_and_in_order() -> None:
    e = executor()
    assert e.take(plan(1, is_snapshot=True))
    assert not e.take(plan(1, is_snapshot=True))
    with pytest.raises(PlanError, match="plan 3 came after plan 1"):
        e.take(plan(3))


def test_grants_that_change_or_leave_out_entries_are_faults() -> None:
    e = executor()
    e.take(plan(1, {1: (0, [5])}, rows=(start(1),)))
    e.take(plan(2, {1: (0, [5, 6])}))  # absolute: the same again, and one more
    assert e.num_row_blocks == 2
    with pytest.raises(PlanError, match="other blocks"):
        e.take(plan(3, {1: (1, [7])}))
    with pytest.raises(PlanError, match="from entry 3"):
        e.take(plan(4, {1: (3, [8])}))
