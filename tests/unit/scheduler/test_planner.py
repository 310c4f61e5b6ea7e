"""Plans as tables: these requests, blocks and limits, these steps."""

from array import array
from itertools import count

import numpy as np
import pytest

from pagebus.bus.messages import PoolGroup, unpack_grants, unpack_handles, unpack_ids
from pagebus.scheduler.blocks import KvPool
from pagebus.scheduler.planner import Budget, choose_horizon, lay_out
from pagebus.scheduler.requests import Row, read_request
from pagebus.scheduler.slots import SlotTable
from tests.unit.scheduler.rig import Rig, executor, generate


class Rows:
    """A slot table with rows as a test wants them; handles count from 1."""

    def __init__(self, rows):
        self.slots = SlotTable(KvPool([PoolGroup(num_blocks=8)], 64), 16, 16_384)
        self.prefilling = []
        handles = count(1)
        request, _ = read_request(generate(), "m", 0, {}, 0.0)
        for fields in rows:
            made = Row(request, 0, array("i", range(fields["num_ids"])), 0)
            made.end_position = fields["end"]
            self.slots.take(made, handles)
            slot = made.slot
            self.slots.position[slot] = self.slots.target[slot] = fields["position"]
            self.slots.end[slot] = fields["end"]
            self.slots.capacity[slot] = fields["blocks"] * 16
            if fields["position"] < fields["num_ids"]:
                self.prefilling.append(made)

    def lay_out(self, *budget):
        return lay_out(self.slots, self.prefilling, Budget(*budget))


def row(_handle, num_ids, position=0, blocks=100, end=10_000):
    return {"num_ids": num_ids, "position": position, "blocks": blocks, "end": end}


CASES = {
    # name: (rows, horizon, tokens a step, [(decode handles, {handle: (start, end)}), ...])
    "decode rows go on for the horizon": (
        [row(1, 5, 7), row(2, 3, 3)], 3, 64,
        [([1, 2], {}), ([1, 2], {}), ([1, 2], {})],
    ),
    "a prompt that fits is one chunk, then decodes": (
        [row(1, 20)], 3, 64,
        [([], {1: (0, 20)}), ([1], {}), ([1], {})],
    ),
    "decode first, the rest of the budget is prefill": (
        [row(1, 5, 6), row(2, 10)], 3, 5,
        [([1], {2: (0, 4)}), ([1], {2: (4, 8)}), ([1], {2: (8, 10)})],
    ),
    "two prompts share a step, first come first served": (
        [row(1, 6), row(2, 6)], 3, 8,
        [([], {1: (0, 6), 2: (0, 2)}), ([1], {2: (2, 6)}), ([1, 2], {})],
    ),
    "chunks start at the confirmed position": (
        [row(1, 40, 16)], 2, 16,
        [([], {1: (16, 32)}), ([], {1: (32, 40)})],
    ),
    "a row at its last position leaves, its lease ends": (
        [row(1, 5, 8, end=10), row(2, 5, 6)], 4, 64,
        [([1, 2], {}), ([1, 2], {}), ([2], {}), ([2], {})],
    ),
    "a row sits out where its table ends": (
        [row(1, 5, 15, blocks=1), row(2, 3, 16, blocks=1)], 4, 64,
        [([1], {})],
    ),
    "a prompt is prefilled as far as its blocks go": (
        [row(1, 40, blocks=2)], 4, 20,
        [([], {1: (0, 20)}), ([], {1: (20, 32)})],
    ),
    "nothing to do is no step": ([row(1, 5, 9, end=9)], 4, 64, []),
    "horizon 1 is lock-step": ([row(1, 5, 6), row(2, 3)], 1, 64, [([1], {2: (0, 3)})]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_layout(name):
    rows, horizon, tokens, expected = CASES[name]
    steps = [step for step in Rows(rows).lay_out(horizon, tokens, 1 << 19) for _ in range(step.num_times)]
    got = [
        (
            sorted(unpack_handles(step.decode)),
            {chunk.handle: (chunk.start, chunk.end) for chunk in step.chunks},
        )
        for step in steps
    ]
    assert got == expected
    for step in steps:
        for chunk in step.chunks:
            assert list(unpack_ids(chunk.ids)) == list(range(chunk.start, chunk.end))


def test_targets_are_where_the_plan_brings_each_row():
    rows = Rows([row(1, 20), row(2, 5, 7), row(3, 300)])
    rows.lay_out(4, 64, 1 << 19)
    assert rows.slots.target[:3].tolist() == [23, 11, 43 + 62 + 62 + 62]


def test_a_plan_carries_a_bounded_number_of_ids():
    steps = Rows([row(1, 1000), row(2, 5, 7)]).lay_out(8, 100, 250)
    assert sum(chunk.end - chunk.start for step in steps for chunk in step.chunks) == 250
    assert sum(step.num_times for step in steps) == 8


def test_steps_that_are_alike_are_told_once():
    steps = Rows([row(1, 5, 7), row(2, 3, 3, end=8)]).lay_out(32, 64, 1 << 19)
    assert [(list(unpack_handles(step.decode)), step.num_times) for step in steps] == [([1, 2], 5), ([1], 27)]


@pytest.mark.parametrize(
    ("step_s", "horizon"),
    [(0.0, 8), (0.1, 2), (0.045, 2), (0.025, 3), (0.008, 8), (0.005, 13), (0.004, 16), (0.0001, 16)],
)
def test_a_lease_covers_the_way_of_a_plan(step_s, horizon):
    assert choose_horizon(step_s) == horizon


def plan_of(rig):
    (plan,) = rig.plan()
    return plan


def ready(num_blocks=8, **config):
    rig = Rig([executor(pool=(PoolGroup(num_blocks=num_blocks),))], **config)
    rig.turn()
    rig.turn()
    return rig


def test_the_first_plan_is_an_empty_snapshot():
    rig = Rig([executor()])
    rig.deliver_to_core()
    plan = plan_of(rig)
    assert (plan.is_snapshot, plan.sequence, plan.rows, plan.steps) == (True, 1, (), ())
    assert rig.plan() == []


@pytest.mark.parametrize(
    ("horizon", "length", "max_tokens", "num_blocks"),
    [(1, 16, 100, 2), (8, 10, 100, 2), (8, 16, 100, 2), (8, 16, 1, 1), (16, 15, 100, 2), (4, 32, 3, 3)],
)
def test_blocks_of_a_new_row(horizon, length, max_tokens, num_blocks):
    rig = ready(num_blocks=20, horizon=horizon)
    rig.ask("a", list(range(length)), max_tokens)
    plan = plan_of(rig)
    (start,) = plan.rows
    assert (start.num_ids, start.num_generated, start.max_tokens) == (length, 0, max_tokens)
    assert sum(len(grant.blocks) for grant in unpack_grants(plan)) == num_blocks
    assert not plan.is_snapshot


def test_at_most_one_spare_block_a_row_for_sixteen_steps():
    rig = ready(num_blocks=64, horizon=8)
    rig.ask("a", list(range(30)), 300)
    for _ in range(200):
        rig.turn()
        slots = rig.core._executors["e1"].slots
        reached = np.maximum(slots.position, slots.num_ids)
        assert (slots.capacity <= reached + 16 + 16)[: slots.top].all()


def test_an_admission_makes_a_plan_at_once_and_repeats_what_is_not_confirmed():
    rig = ready(num_blocks=40, horizon=8)
    rig.ask("a", list(range(10)), 50)
    first = plan_of(rig)
    assert first.steps[0].chunks[0].end == 10
    assert rig.plan() == []
    rig.ask("b", list(range(5)), 50)
    second = plan_of(rig)
    assert second.sequence == first.sequence + 1
    assert [(chunk.start, chunk.end) for chunk in second.steps[0].chunks] == [(0, 10), (0, 5)]
    assert [start.request_id for start in second.rows] == ["b"]
    assert {grant.handle for grant in unpack_grants(second)} == {2}


def test_a_plan_that_is_not_acknowledged_is_sent_again_unchanged():
    rig = ready()
    rig.ask("a", [1, 2], 5)
    plan = plan_of(rig)
    rig.now += 0.19
    assert rig.plan() == []
    rig.now += 0.02
    assert rig.plan() == [plan]
    assert rig.plan() == []


def test_head_of_the_queue_is_not_overtaken():
    rig = ready(num_blocks=8)
    rig.ask("long", list(range(80)), 40)
    rig.turn()
    rig.ask("waits", list(range(100, 160)), 20)
    rig.ask("small", [1], 2)
    for _ in range(3):
        rig.turn()
    names = {each.start.request_id for each in rig.executors["e1"].rows.values()}
    assert names == {"long"}
    rig.run()
    started = {ended.request_id: ended.first_scheduled_s for ended in rig.ended}
    assert started["long"] < started["waits"] <= started["small"]


def test_a_cancelled_rows_blocks_wait_for_the_acknowledgement():
    rig = ready(num_blocks=8)
    rig.ask("a", list(range(40)), 40)
    rig.turn()
    kv = rig.core._executors["e1"].kv
    assert kv.main.num_free < 8
    free = kv.main.num_free
    rig.cancel("a")
    plan = plan_of(rig)
    assert list(unpack_handles(plan.released)) == [1]
    assert kv.main.num_free == free
    rig.turn()
    rig.turn()
    assert kv.main.num_free == 8


def test_a_row_that_was_never_sent_frees_its_blocks_at_once():
    rig = ready(num_blocks=8)
    rig.ask("a", list(range(40)), 40)
    rig.core._place_waiting(rig.now)
    rig.cancel("a")
    assert rig.core._executors["e1"].kv.main.num_free == 8
    assert rig.plan() == []
