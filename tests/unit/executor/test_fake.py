"""The fake model: pages and direct computation agree, and every fault in the pages shows."""

import time
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagebus.bus.messages import Sampling
from pagebus.executor.batch import RowInput
from pagebus.executor.fake import GREEDY, FakeModel, FakeRunner, fake_sequence


def generate(
    runner: FakeRunner,
    table: list[int],
    prompt: list[int],
    num_ids: int,
    *,
    chunk_size: int = 1000,
    sampling: Sampling = GREEDY,
    choice: int = 0,
) -> list[int]:
    tables = [array("i", table)] * len(runner.pool)
    made: list[int] = []
    for start in range(0, len(prompt), chunk_size):
        ids = prompt[start : start + chunk_size]
        is_last = start + len(ids) == len(prompt)
        row = RowInput(ids, start, tables, sampling, choice=choice, is_sampled=is_last)
        (output,) = runner.step([row])
        assert output.error is None
    while output.id is not None:
        made.append(output.id)
        if len(made) == num_ids:
            break
        start = len(prompt) + len(made) - 1
        (output,) = runner.step([RowInput((made[-1],), start, tables, sampling, choice, len(made))])
        assert output.error is None
    return made


@settings(max_examples=50, deadline=None)
@given(
    prompt=st.lists(st.integers(0, 511), min_size=1, max_size=70),
    num_ids=st.integers(1, 40),
    chunk_size=st.integers(1, 40),
    temperature=st.sampled_from([0.0, 0.7]),
    seed=st.integers(-(2**63), 2**64 - 1),
    choice=st.integers(0, 3),
    windows=st.lists(st.sampled_from([None, 1, 5, 16, 33]), min_size=1, max_size=3),
    end_probability=st.sampled_from([0.0, 0.3]),
)
def test_pages_agree_with_direct_computation(
    prompt: list[int],
    num_ids: int,
    chunk_size: int,
    temperature: float,
    seed: int,
    choice: int,
    windows: list[int | None],
    end_probability: float,
) -> None:
    model = FakeModel(windows=tuple(windows), end_probability=end_probability)
    runner = FakeRunner(model, num_blocks=16, max_model_len=160)
    sampling = Sampling(temperature=temperature, seed=seed)
    table = [3, 1, 4, 15, 9, 2, 6, 5, 8, 7]
    made = generate(runner, table, prompt, num_ids, chunk_size=chunk_size, sampling=sampling, choice=choice)
    assert made == fake_sequence(prompt, num_ids, model=model, sampling=sampling, choice=choice)


def test_a_sequence_continues_where_it_was_cut() -> None:
    prompt, sampling = [5, 6, 7], Sampling(temperature=1.0, seed=11)
    whole = fake_sequence(prompt, 20, sampling=sampling)
    assert fake_sequence(prompt, 13, sampling=sampling, received=whole[:7]) == whole[7:]


def test_stop_ids_end_a_sequence_after_min_tokens() -> None:
    whole = fake_sequence([1, 2, 3], 20)
    assert fake_sequence([1, 2, 3], 20, stop_token_ids=[whole[4]]) == whole[: whole.index(whole[4]) + 1]
    assert fake_sequence([1, 2, 3], 20, stop_token_ids=[whole[4]], min_tokens=6)[:6] == whole[:6]


def test_the_end_id_comes_as_often_as_asked_and_never_otherwise() -> None:
    assert 2 not in fake_sequence([1], 5000)
    ends = fake_sequence([1], 5000, model=FakeModel(end_probability=0.1)).count(2)
    assert 400 < ends < 600


def test_seed_choice_and_index_matter_only_when_sampled() -> None:
    def sampled(seed: int, choice: int) -> list[int]:
        return fake_sequence([1, 2], 8, sampling=Sampling(temperature=1.0, seed=seed), choice=choice)

    assert len({tuple(sampled(seed, choice)) for seed in range(3) for choice in range(3)}) == 9
    greedy = [fake_sequence([1, 2], 8, sampling=Sampling(temperature=0.0, seed=s)) for s in range(3)]
    assert greedy[0] == greedy[1] == greedy[2]


@pytest.mark.parametrize("position", [0, 17, 39])
def test_one_changed_slot_changes_what_follows(position: int) -> None:
    prompt = list(range(100, 140))
    runner = FakeRunner(num_blocks=8, max_model_len=128)
    tables = [array("i", [7, 0, 3, 5])]
    runner.step([RowInput(prompt, 0, tables, GREEDY)])
    before = [runner.step([RowInput((9,), 40, tables, GREEDY)])[0].id for _ in range(2)]
    runner.pages[0][tables[0][position // 16], position % 16] += 1
    after = generate_from(runner, tables, 40, 9, 8)
    assert before[0] == before[1] == fake_sequence([*prompt, 9], 1)[0]
    assert after != fake_sequence([*prompt, 9], 8)


def generate_from(runner: FakeRunner, tables: list[array], position: int, last: int, num: int) -> list[int]:
    made = []
    for offset in range(num):
        output = runner.step([RowInput((last,), position + offset, tables, GREEDY)])[0]
        assert output.id is not None
        last = output.id
        made.append(last)
    return made


def test_a_table_without_slots_fails_the_row_alone() -> None:
    runner = FakeRunner(num_blocks=8, max_model_len=64)
    good = RowInput([1, 2], 0, [array("i", [0])], GREEDY)
    short = RowInput([1] * 17, 0, [array("i", [1])], GREEDY)
    freed = RowInput([1], 16, [array("i", [-1, 2])], GREEDY)
    outputs = runner.step([short, good, freed])
    assert [output.id for output in outputs] == [None, fake_sequence([1, 2], 1)[0], None]
    assert outputs[0].error
    assert outputs[2].error


def test_speed_is_at_least_20000_tokens_a_second_at_64_rows() -> None:
    runner = FakeRunner(num_blocks=64 * 20)
    tables = [[array("i", range(row * 20, row * 20 + 20))] for row in range(64)]
    runner.step([RowInput(list(range(256)), 0, table, GREEDY) for table in tables])
    best_s = 1e9
    for position in range(256, 306):
        began_s = time.perf_counter()
        runner.step([RowInput((position,), position, table, GREEDY) for table in tables])
        best_s = min(best_s, time.perf_counter() - began_s)
    assert 64 / best_s > 20_000
