"""Whole runs of the core against model executors: every request ends as it must, and all blocks come back."""

import random

import pytest

from pagebus.bus.messages import PoolGroup
from tests.unit.scheduler.model_executor import expected_ids
from tests.unit.scheduler.rig import Rig, executor


def prompt_of(seed, length):
    return random.Random(seed).choices(range(50_000), k=length)


@pytest.mark.parametrize("horizon", range(1, 17))
def test_the_same_ids_for_every_horizon(horizon):
    rig = Rig([executor(pool=(PoolGroup(num_blocks=40),))], horizon=horizon, max_num_batched_tokens=32)
    for i in range(12):
        rig.ask(f"r{i}", prompt_of(i, 1 + 7 * i), 3 + 5 * i)
    rig.run()
    for i in range(12):
        assert rig.results[f"r{i}"][0] == expected_ids(prompt_of(i, 1 + 7 * i), 3 + 5 * i)
        assert rig.finishes[f"r{i}"] == {0: "length"}
    assert rig.executors["e1"].num_step_tokens_seen <= 32
    rig.check_all_free()
    assert sorted(ended.request_id for ended in rig.ended) == sorted(f"r{i}" for i in range(12))


@pytest.mark.parametrize("horizon", [1, 3, 8, 16])
def test_a_tiny_pool_preempts_and_everything_finishes(horizon):
    rig = Rig([executor(pool=(PoolGroup(num_blocks=8),))], horizon=horizon, max_num_batched_tokens=64)
    for i in range(9):
        rig.ask(f"r{i}", prompt_of(i, 10), 80)
    for _ in range(4000):
        rig.turn()
        rig.check_blocks()
        if len(rig.ends) == 9:
            break
    rig.run()
    rig.check_results(lambda request_id: expected_ids(prompt_of(int(request_id[1:]), 10), 80))
    assert set(rig.ends.values()) == {"finished"}
    assert sum(ended.num_preemptions for ended in rig.ended) > 0
    rig.check_all_free()


@pytest.mark.parametrize("horizon", [1, 8])
def test_one_request_that_fills_the_pool_alone_finishes(horizon):
    rig = Rig([executor(pool=(PoolGroup(num_blocks=4),))], horizon=horizon)
    rig.ask("a", prompt_of(1, 5), 59)
    rig.ask("b", prompt_of(2, 63), 1)
    rig.run()
    assert rig.results["a"][0] == expected_ids(prompt_of(1, 5), 59)
    assert rig.results["b"][0] == expected_ids(prompt_of(2, 63), 1)
    rig.check_all_free()


@pytest.mark.parametrize("window", [1, 16, 20, 33])
@pytest.mark.parametrize("num_window_blocks", [6, 9, 40])
def test_windowed_groups_free_what_they_cannot_see(window, num_window_blocks):
    pool = (PoolGroup(num_blocks=40), PoolGroup(num_blocks=num_window_blocks, window=window))
    rig = Rig([executor(pool=pool)], horizon=4, max_num_batched_tokens=48)
    for i in range(4):
        rig.ask(f"r{i}", prompt_of(i, 90), 100)
    most = 0
    for _ in range(200):
        rig.turn()
        rig.check_blocks()
        slots = next(iter(rig.core._executors.values())).slots
        most = max([most, *(len(slots.held(slot)[1]) for slot in range(slots.top))])
    assert most <= (window + 48) // 16 + 3
    rig.run()
    rig.check_results(lambda request_id: expected_ids(prompt_of(int(request_id[1:]), 90), 100))
    assert set(rig.ends.values()) == {"finished"}
    rig.check_all_free()


def test_only_windows_bound_no_context():
    rig = Rig(
        [executor(pool=(PoolGroup(num_blocks=6, window=32),), max_model_len=5000)], max_num_batched_tokens=16
    )
    rig.ask("a", prompt_of(1, 300), 200)
    rig.run()
    assert rig.results["a"][0] == expected_ids(prompt_of(1, 300), 200, window=32)
    assert rig.core.figures.max_model_len == 5000
    rig.check_all_free()


def test_stop_ids_and_several_choices():
    prompt = prompt_of(3, 20)
    stop = expected_ids(prompt, 9)[-1]
    from pagebus.bus.messages import pack_ids

    rig = Rig([executor(pool=(PoolGroup(num_blocks=20),))])
    rig.ask("a", prompt, 50, num_choices=3, stop_token_ids=pack_ids([stop]))
    rig.run()
    assert rig.finishes["a"] == {0: "stop", 1: "stop", 2: "stop"}
    rig.check_results(lambda _: expected_ids(prompt, 50, [stop]))
    (ended,) = rig.ended
    assert ended.num_generated_tokens == 27
    assert ended.finish_reasons == ("stop",) * 3
    assert ended.arrival_s <= ended.first_scheduled_s <= ended.first_token_s <= ended.end_s


def test_two_executors_share_the_load():
    rig = Rig([executor("e1"), executor("e2")], horizon=4)
    rig.turn()
    rig.turn()
    for i in range(4):
        rig.ask(f"r{i}", prompt_of(i, 10), 20)
    rig.turn()
    assert [len(rig.executors[name].rows) for name in ("e1", "e2")] == [2, 2]
    rig.run()
    rig.check_results(lambda request_id: expected_ids(prompt_of(int(request_id[1:]), 10), 20))
    rig.check_all_free()


def test_a_plan_is_sent_for_half_a_lease_not_for_every_step():
    rig = Rig([executor(pool=(PoolGroup(num_blocks=64),))], horizon=8)
    rig.ask("a", prompt_of(1, 16), 400)
    rig.run()
    assert rig.num_plans["e1"] <= 400 / 4 + 10
