"""Who goes first: priorities, tenants, rows that were preempted; and nobody waits for ever."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagebus.bus.messages import PoolGroup
from pagebus.scheduler.fairness import INPUT_WEIGHT, OUTPUT_WEIGHT, VirtualCounters
from tests.unit.scheduler.model_executor import expected_ids
from tests.unit.scheduler.rig import Rig, executor


def ready(num_blocks=64, **config):
    rig = Rig([executor(pool=(PoolGroup(num_blocks=num_blocks),))], **config)
    rig.turn()
    rig.turn()
    return rig


def prompt_of(i, length):
    return [1000 * (i + 1) + p for p in range(length)]


def check(rig):
    rig.check_results(lambda name: expected_ids(*rig.specs[name][:2]))
    assert set(rig.ends.values()) == {"finished"}
    rig.check_all_free()


# -- tenants -------------------------------------------------------------------------------------------------


def serve_two_tenants(seed, weights, num_requests=(600, 60), max_num_seqs=8, turns=500):
    """A asks more than B; both always have requests waiting. Weighted tokens of service, by turn."""
    rng = random.Random(seed)
    rig = ready(num_blocks=400, max_num_seqs=max_num_seqs, tenant_weights=weights, horizon=4)
    for i in range(sum(num_requests)):
        tenant = "a" if i < num_requests[0] else "b"
        rig.ask(f"{tenant}{i}", prompt_of(i, rng.randint(1, 60)), rng.randint(1, 40), tenant=tenant)
    served, charged = {"a": 0.0, "b": 0.0}, set()
    history = []
    for _ in range(turns):
        rig.turn()
        for row in rig.executors["e1"].rows.values():
            if row.start.handle not in charged:
                charged.add(row.start.handle)
                served[row.start.request_id[0]] += INPUT_WEIGHT * row.start.num_ids
        for tenant in served:
            made = sum(len(ids[0]) for name, ids in rig.results.items() if name[0] == tenant)
            history.append((tenant, served[tenant] + OUTPUT_WEIGHT * made))
    waiting = {row.request.tenant for row in rig.core._book.lobby.queue}
    assert waiting == {"a", "b"}, "a tenant ran out of requests: the bound says nothing then"
    return [dict(history[at : at + 2]) for at in range(0, len(history), 2)]


@pytest.mark.parametrize("seed", range(3))
def test_two_tenants_at_ten_to_one_get_the_same_service(seed):
    """The bound of the paper: |W_a - W_b| <= 2 max(w_p L_input, w_q M) over any interval."""
    history = serve_two_tenants(seed, {}, num_requests=(1500, 150))
    bound = 2 * max(INPUT_WEIGHT * 60, OUTPUT_WEIGHT * 8 * (60 + 40))
    for begin in range(0, len(history), 50):
        for end in range(begin + 50, len(history), 50):
            got = {tenant: history[end][tenant] - history[begin][tenant] for tenant in "ab"}
            assert abs(got["a"] - got["b"]) <= bound
    assert history[-1]["b"] > 2 * bound, "too little was served for the bound to say anything"


def test_a_weight_is_a_share():
    history = serve_two_tenants(1, {"b": 3.0}, num_requests=(600, 450))
    assert 2.3 < history[-1]["b"] / history[-1]["a"] < 3.7


def test_first_come_first_served_would_not_be_fair(monkeypatch):
    """The test of the test: without counters the first tenant's requests go first."""
    monkeypatch.setattr(VirtualCounters, "value", lambda self, tenant: 0.0)
    history = serve_two_tenants(1, {}, num_requests=(600, 60), turns=200)
    assert history[-1]["b"] == 0.0


def test_who_pauses_saves_nothing_up():
    counters = VirtualCounters({})
    counters.pay_input("busy", 10_000)
    counters.lift("late", ["busy"])
    assert counters.value("late") == counters.value("busy")
    counters.pay_input("busy", 500)
    counters.lift("later", [])  # nobody waits: the level of who was served last
    assert counters.value("later") == counters.value("busy")
    counters.lift("busy", ["late"])
    assert counters.value("busy") == 10_500 * INPUT_WEIGHT


# -- priorities ----------------------------------------------------------------------------------------------


def test_a_better_priority_is_placed_first():
    rig = ready(max_num_seqs=1)
    rig.ask("runs", prompt_of(0, 5), 20)
    rig.turn()
    rig.ask("low", prompt_of(1, 5), 3, priority=5)
    rig.ask("high", prompt_of(2, 5), 3, priority=0)
    rig.run()
    started = {ended.request_id: ended.first_scheduled_s for ended in rig.ended}
    assert started["runs"] < started["high"] < started["low"]
    check(rig)


def test_a_better_priority_takes_a_running_row_s_place():
    rig = ready(max_num_seqs=1)
    rig.ask("low", prompt_of(1, 5), 500, priority=5)
    for _ in range(5):
        rig.turn()
    rig.ask("high", prompt_of(2, 5), 3, priority=0)
    for _ in range(12):
        rig.turn()
    assert rig.ends == {"high": "finished"}
    rig.run()
    check(rig)
    assert {ended.request_id: ended.num_preemptions for ended in rig.ended} == {"high": 0, "low": 1}


def test_the_victim_has_the_worst_priority_then_the_least_to_lose():
    rig = ready(num_blocks=12, horizon=2)
    rig.ask("worse", prompt_of(0, 40), 60, priority=1)
    rig.ask("much", prompt_of(1, 50), 60)
    rig.ask("little", prompt_of(2, 2), 90)
    rig.run()
    lost = {ended.request_id: ended.num_preemptions for ended in rig.ended}
    assert lost["worse"] >= 1
    assert lost["much"] == 0  # the best rank of its priority
    check(rig)


# -- starvation ----------------------------------------------------------------------------------------------


def longest_waits(rig, max_turns=30_000):
    """Run to the end; by choice, the longest time between two ids, in seconds of the rig's clock."""
    last, longest = {}, {}
    counts = {}
    for _ in range(max_turns):
        rig.turn()
        for name, choices in rig.results.items():
            for choice, ids in choices.items():
                key = (name, choice)
                if len(ids) > counts.get(key, 0):
                    if key in last:
                        longest[key] = max(longest.get(key, 0.0), rig.now - last[key])
                    last[key], counts[key] = rig.now, len(ids)
        if len(rig.ends) == len(rig.attempts):
            return longest
    raise AssertionError("not over")


@settings(max_examples=15, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.integers(1, 60), st.integers(1, 80), st.sampled_from([0, 0, 1, 2])),
        min_size=3,
        max_size=12,
    ),
    num_blocks=st.integers(9, 14),
    horizon=st.sampled_from([1, 4, 8]),
)
def test_no_row_starves_on_a_tiny_pool(requests, num_blocks, horizon):
    """The wait between two ids is bounded, nothing locks up, and tokens are those of an idle machine.

    Whoever was preempted goes first after `patience_s`, and stays until it had its turn: so its wait is at
    most its patience, and for each other request its turn, its prefill and the blocks' way back.
    """
    patience_s, turn_s = 0.2, 0.01
    rig = ready(num_blocks=num_blocks, horizon=horizon, patience_s=patience_s, max_num_batched_tokens=32)
    for i, (length, max_tokens, priority) in enumerate(requests):
        rig.ask(f"r{i}", prompt_of(i, length), max_tokens, priority=priority)
    longest = longest_waits(rig)
    one_turn_s = max(patience_s, 16 * turn_s) + (140 // 32 + 2 * horizon + 8) * turn_s
    assert max(longest.values(), default=0.0) <= patience_s + len(requests) * one_turn_s
    rig.run()
    check(rig)


def test_a_low_priority_gets_on_under_a_stream_of_high_ones():
    """It was running; then better ones come without end."""
    rig = ready(num_blocks=10, horizon=2, patience_s=0.3)
    rig.ask("low", prompt_of(0, 20), 100, priority=9)
    for i in range(1, 2000):
        rig.turn()
        if "low" in rig.ends:
            break
        if i % 3 == 0 and len(rig.attempts) - len(rig.ends) < 8:
            rig.ask(f"r{i}", prompt_of(i, 30), 60, priority=0)
    assert rig.ends["low"] == "finished"
    assert rig.now < 115.0
    rig.run()
    check(rig)


# -- long prompts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("horizon", [1, 4, 0])
def test_a_long_prompt_never_stalls_running_streams(horizon):
    """Every step has the running rows, and never more tokens than the budget."""
    rig = ready(num_blocks=600, horizon=horizon, max_num_batched_tokens=256)
    for i in range(6):
        rig.ask(f"r{i}", prompt_of(i, 10), 120)
    for _ in range(12):
        rig.turn()
    before = {name: len(ids[0]) for name, ids in rig.results.items()}
    rig.ask("long", prompt_of(99, 4000), 4)
    first_step = rig.executors["e1"].num_steps
    while not rig.results["long"][0]:
        rig.turn()
    num_steps = rig.executors["e1"].num_steps - first_step
    assert 4000 // 250 <= num_steps < 30
    for name, num_before in before.items():
        assert len(rig.results[name][0]) - num_before >= num_steps
    assert rig.executors["e1"].num_step_tokens_seen <= 256
    rig.run()
    check(rig)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), num_blocks=st.integers(10, 30))
def test_results_do_not_depend_on_the_horizon(seed, num_blocks):
    for horizon in (*random.Random(seed).sample(range(1, 33), 4), 0):
        rng = random.Random(seed)
        rig = ready(num_blocks=num_blocks, horizon=horizon, max_num_batched_tokens=48)
        for i in range(8):
            rig.ask(
                f"r{i}", prompt_of(i, rng.randint(1, 70)), rng.randint(1, 70), num_choices=rng.choice((1, 2))
            )
            rig.turn()
        rig.run()
        check(rig)
