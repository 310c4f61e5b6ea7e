"""What rows share: equal prefixes, and the prompt of a request's choices. Hits are exact and private."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagebus.bus.messages import PoolGroup, Sampling, unpack_ids
from tests.unit.scheduler.model_executor import expected_ids
from tests.unit.scheduler.rig import Rig, executor

PROMPT = list(range(100, 150))


def ready(num_blocks=64, windows=(None,), **config):
    pool = tuple(PoolGroup(num_blocks=num_blocks, window=window) for window in windows)
    rig = Rig([executor(pool=pool)], **config)
    rig.turn()
    rig.turn()
    return rig


def hits(rig):
    """Cached positions of each row that an executor was told of, in order."""
    return [num for each in rig.executors.values() for _, _, num in each.cached]


def finish(rig):
    rig.run()
    window = None if rig.executors["e1"].window is None else rig.executors["e1"].window
    rig.check_results(lambda name: expected_ids(rig.specs[name][0], rig.specs[name][1], window=window))
    rig.check_all_free()


@pytest.mark.parametrize(
    ("length", "num_hit"), [(1, 0), (16, 0), (17, 16), (32, 16), (33, 32), (49, 48), (50, 48)]
)
def test_a_second_request_finds_the_full_blocks_but_computes_a_position(length, num_hit):
    rig = ready()
    for name in ("a", "b"):
        rig.ask(name, PROMPT[:length], 3)
        rig.run()
    assert hits(rig) == [0, num_hit]
    assert (rig.core.figures.num_prefix_queries, rig.core.figures.num_prefix_hits) == (2 * length, num_hit)
    finish(rig)


def test_generated_ids_are_found_too():
    rig = ready()
    rig.ask("a", PROMPT, 40)
    rig.run()
    talk = [*PROMPT, *rig.results["a"][0], 7, 8, 9]
    rig.ask("b", talk, 5)
    rig.run()
    assert hits(rig) == [0, (50 + 39) // 16 * 16]  # the last id's KV was never computed
    finish(rig)


def test_tenants_and_salts_share_nothing():
    rig = ready()
    for name, fields in {
        "a": {},
        "b": {"tenant": "t"},
        "c": {"cache_salt": "s"},
        "d": {"tenant": "t", "cache_salt": "s"},
        "e": {"tenant": "t"},
    }.items():
        rig.ask(name, PROMPT, 3, **fields)
        rig.run()
    assert hits(rig) == [0, 0, 0, 0, 48]
    finish(rig)


def test_it_can_be_switched_off():
    rig = ready(enable_prefix_caching=False)
    for name in ("a", "b"):
        rig.ask(name, PROMPT, 3)
        rig.run()
    assert hits(rig) == [0, 0]
    finish(rig)


def test_a_prompt_s_log_probabilities_need_all_of_it():
    rig = ready()
    rig.ask("a", PROMPT, 3)
    rig.run()
    rig.ask("b", PROMPT, 3, num_choices=2, sampling=Sampling(num_prompt_logprobs=1))
    rig.turn()
    (told,) = [row.start for row in rig.executors["e1"].rows.values()]
    assert (told.num_cached, list(unpack_ids(told.all_ids))) == (0, PROMPT)
    rig.run()
    assert hits(rig) == [0, 0, 49]  # only the first choice computes it all
    finish(rig)


def test_what_was_used_last_stays_longest():
    rig = ready(num_blocks=9)
    for name, first in {"a": 0, "b": 1000, "a2": 0, "c": 2000, "a3": 0, "b2": 1000}.items():
        rig.ask(name, list(range(first, first + 49)), 2)
        rig.run()
    assert hits(rig) == [0, 0, 48, 0, 48, 16]  # the end of b's chain went first
    finish(rig)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 33, 50])
@pytest.mark.parametrize("windows", [(None,), (None, 20), (5,)])
@pytest.mark.parametrize("horizon", [1, 4, 16])
def test_choices_share_the_prompt_and_copy_the_block_that_they_write(length, windows, horizon):
    rig = ready(windows=windows, horizon=horizon)
    kv = rig.core._executors["e1"].kv
    rig.ask("a", PROMPT[:length], 40, num_choices=4)
    for _ in range(8):
        rig.turn()
        rig.check_blocks()
    if windows == (None,):
        held = kv.main.num_blocks - kv.main.num_free
        rows = rig.core._executors["e1"].rows.values()
        slots = rig.core._executors["e1"].slots
        assert held == (length - 1) // 16 + sum(
            int(slots.num_entries[0, row.slot]) - (length - 1) // 16 for row in rows
        )
        assert hits(rig) == [0, *[length - 1] * 3]
    finish(rig)


def test_a_choice_goes_on_alone_where_its_sibling_is_gone():
    rig = ready()
    rig.ask("a", PROMPT, 1, num_choices=3)  # the first one ends with its prefill
    rig.run()
    assert hits(rig) == [0, 48, 48]
    finish(rig)


def test_choices_that_came_with_ids_share_the_prompt():
    rig = ready()
    rig.ask("a", PROMPT, 30, num_choices=2)
    for _ in range(6):
        rig.turn()
    assert all(len(ids) > 2 for ids in rig.results["a"].values())
    rig.ask_again("a")
    finish(rig)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 70), st.integers(0, 70)), min_size=2, max_size=12),
    num_blocks=st.integers(8, 40),
    window=st.sampled_from([None, 5, 20, 40]),
    horizon=st.sampled_from([1, 3, 8]),
)
def test_a_hit_is_what_was_reported_and_is_not_forgotten(lengths, num_blocks, window, horizon):
    """Requests one after the other: with room for everything, all that is common is found."""
    windows = (None,) if window is None else (None, window)
    rig = ready(num_blocks=max(num_blocks, 10), windows=windows, horizon=horizon)
    seen = set()
    for i, (length, num_common) in enumerate(lengths):
        prompt = [p if p < num_common else 1000 * (i + 1) + p for p in range(length)]
        rig.ask(f"r{i}", prompt, 3)
        rig.run()
        full = [tuple(prompt[: 16 * b]) for b in range(1, (length - 1) // 16 + 1)]
        known = sum(prefix in seen for prefix in full) * 16
        assert hits(rig)[-1] <= known
        if num_blocks == 40 and len(lengths) * 5 < 40:
            assert hits(rig)[-1] == known
        everything = prompt + rig.results[f"r{i}"][0]
        seen |= {tuple(everything[: 16 * b]) for b in range(1, (len(everything) - 1) // 16 + 1)}
    finish(rig)
