"""Rows whose state lives on the device: the same ids as the runner that prepares each step on the host.

The device is the CPU: kernels are interpreted, what is fetched is garbage until it was waited for, and graphs
are their work over the same tensors. Attention runs as plain torch here (its kernels have tests of their
own), but for one test.
"""

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

pytest.importorskip("triton")

import torch

from pagebus.bus.messages import Sampling, pack_ids
from pagebus.executor import model_runner
from pagebus.executor.batch import RowInput, pipelined
from pagebus.executor.decode_graphs import ladder
from pagebus.executor.device import HostDevice
from pagebus.executor.loader import LoadedModel, load_model
from pagebus.executor.model_runner import ModelRunner
from pagebus.executor.pulse import Pulse
from pagebus.kernels.attention_reference import reference_attention
from pagebus.kernels.jit import IS_INTERPRETED
from tests.support.device_tests import DrivenRow, ahead, in_turn
from tests.support.draws import read
from tests.support.models import FAMILIES, VOCAB_SIZE, make_model
from tests.support.rows import Blocks, Row

pytestmark = pytest.mark.skipif(not IS_INTERPRETED, reason="needs TRITON_INTERPRET=1 before triton's import")

if IS_INTERPRETED:
    from pagebus.executor import triton_cache
    from pagebus.executor.device_runner import DeviceRunner

NUM_BLOCKS = 40
MAX_ROWS = 8


def plain_attention(query: torch.Tensor, *args: torch.Tensor, **kwargs: object) -> torch.Tensor:
    for name in ("segments", "config"):
        kwargs.pop(name)
    return reference_attention(query, *args, **kwargs).to(query.dtype)  # type: ignore[arg-type]


def poison(runner: "DeviceRunner") -> None:
    """What padding holds must not matter: a NaN in any row's result would show."""
    for pages in (pages for layer in runner._pages.of_layer.values() for pages in layer if pages is not None):
        pages[-1] = math.nan


class Pair:
    """A model behind both kinds of runner."""

    def __init__(self, path: Path, kind: str, *, is_eager: bool) -> None:
        def cache(loaded: LoadedModel, num_blocks: Sequence[int], _: Pulse) -> "triton_cache.TritonCache":
            return triton_cache.TritonCache(loaded.specs, num_blocks, loaded.page_dtype, loaded.device)

        model = make_model(kind, path / kind, has_tokenizer=False)
        length = FAMILIES[kind].max_model_len or 192
        num_blocks = [NUM_BLOCKS] * len({spec.window for spec in load_model(model).specs})
        self.plain = ModelRunner(load_model(model, dtype="float32", max_model_len=length), num_blocks)
        self.queue = HostDevice()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(model_runner, "make_cache", cache)
            self.runner = DeviceRunner(
                load_model(model, dtype="float32", max_model_len=length), num_blocks, self.queue,
                max_rows=MAX_ROWS, is_eager=is_eager,
            )  # fmt: skip
        poison(self.runner)

    def check(self, make: Callable[[Blocks], list[DrivenRow]], seed: int = 0) -> list[DrivenRow]:
        """Both make the same of the rows; the device's."""
        wanted, found = make(Blocks(self.plain)), make(Blocks(self.runner))
        in_turn(self.plain, wanted)
        ahead(self.runner, found, random.Random(seed))
        for one, other in zip(wanted, found, strict=True):
            num = one.row.num_tokens
            assert other.row.made[:num] == one.row.made, (one.key, one.row.sampling)
            for told, given in zip(one.logprobs, other.logprobs[:num], strict=True):
                assert (told is None) == (given is None)
                if told is not None and given is not None:
                    (ids, values, ranks), (got_ids, got_values, got_ranks) = read(told), read(given)
                    assert torch.equal(ids, got_ids)
                    assert torch.equal(ranks, got_ranks)
                    assert torch.allclose(values, got_values, atol=1e-4)
            told, given = one.prompt_logprobs, other.prompt_logprobs
            assert sum(len(part.ranks) for part in told) == sum(len(part.ranks) for part in given)
            joined = [b"".join(part.ids for part in parts) for parts in (told, given)]
            assert joined[0] == joined[1]
        return found


@pytest.fixture(autouse=True, scope="module")
def _plain_attention() -> object:
    with pytest.MonkeyPatch.context() as patched:
        if IS_INTERPRETED:
            patched.setattr(triton_cache, "triton_paged_attention", plain_attention)
        yield None


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("pair"), "llama", is_eager=False)


def rows_of(
    blocks: Blocks, samplings: Sequence[Sampling], num_tokens: int = 5, *, seed: int = 1, min_prompt: int = 1
) -> list[DrivenRow]:
    rng = random.Random(seed)
    rows = []
    for key, sampling in enumerate(samplings):
        prompt = [rng.randrange(VOCAB_SIZE) for _ in range(max(min_prompt, rng.randint(1, 30)))]
        row = Row(prompt, blocks.tables(len(prompt) + num_tokens + 2), num_tokens, sampling, choice=key)
        rows.append(DrivenRow(row, 100 + key, joins=rng.randint(0, 4)))
    return rows


GREEDY = Sampling(temperature=0.0)
MIXED = (
    GREEDY,
    Sampling(temperature=1.0, seed=3),
    Sampling(temperature=0.7, top_k=20, seed=4),
    Sampling(temperature=1.3, top_p=0.8, seed=5),
    Sampling(temperature=0.9, min_p=0.05, top_k=40, top_p=0.9, seed=6),
)


def test_it_is_pipelined(pair: Pair) -> None:
    assert pipelined(pair.runner) is pair.runner
    assert pair.runner.num_graphs == len(ladder(MAX_ROWS))


def test_mixed_parameters_and_rows_that_come_and_go(pair: Pair) -> None:
    pair.check(lambda blocks: rows_of(blocks, MIXED))


def test_rows_that_change_their_logits(pair: Pair) -> None:
    samplings = (
        GREEDY,
        Sampling(temperature=0.0, frequency_penalty=1.5, presence_penalty=0.5),
        Sampling(temperature=0.8, repetition_penalty=1.7, seed=9),
        Sampling(temperature=0.0, logit_bias={7: 100.0, 9: -5.0}),
        Sampling(temperature=1.0, seed=2, allowed_token_ids=pack_ids([3, 5, 8, 400, 10_000])),
        Sampling(temperature=0.0, bad_words=(pack_ids([7]), pack_ids([1, 2]))),
    )
    found = pair.check(lambda blocks: rows_of(blocks, samplings), seed=3)
    assert set(found[3].row.made) == {7}
    assert set(found[4].row.made) <= {3, 5, 8, 400}


def test_ids_banned_at_first(pair: Pair) -> None:
    """A row that follows itself, and whose forbidden ids change on the way."""

    def make(blocks: Blocks) -> list[DrivenRow]:
        rows = rows_of(blocks, (Sampling(temperature=0.0, logit_bias={11: 50.0}), GREEDY))
        rows[0].banned, rows[0].min_tokens = (11,), 3
        return rows

    made = pair.check(make, seed=4)[0].row.made
    assert 11 not in made[:3]
    assert made[3:5] == [11, 11]


def test_log_probabilities(pair: Pair) -> None:
    samplings = (
        Sampling(temperature=0.0, num_logprobs=0),
        Sampling(temperature=1.0, seed=1, num_logprobs=4),
        Sampling(temperature=0.0, num_logprobs=2, logit_bias={4: 60.0}),
        GREEDY,
    )
    found = pair.check(lambda blocks: rows_of(blocks, samplings), seed=5)
    assert all(told is not None for each in found[:3] for told in each.logprobs)


def test_log_probabilities_of_prompts(pair: Pair) -> None:
    samplings = (Sampling(temperature=0.0, num_prompt_logprobs=2), GREEDY)
    found = pair.check(lambda blocks: rows_of(blocks, samplings, 3), seed=6)
    assert found[0].prompt_logprobs


def test_a_step_that_follows_uploads_nothing(pair: Pair) -> None:
    blocks = Blocks(pair.runner)
    rows = rows_of(blocks, (GREEDY, Sampling(temperature=1.0, seed=1), GREEDY), 12)
    first = [each.input(30) for each in rows]
    waiting = [pair.runner.launch(first)]
    inputs, num_uploads = first, []
    for _ in range(5):
        inputs = [
            RowInput((0,), row.start + len(row.ids), row.tables, row.sampling, row.choice, row.index + 1,
                     key=row.key, follows=number)
            for number, row in enumerate(inputs)
        ]  # fmt: skip
        before = pair.queue.num_uploads
        waiting.append(pair.runner.launch(inputs))
        num_uploads.append(pair.queue.num_uploads - before)
        assert all(output.error is None for output in pair.runner.collect(waiting.pop(0)))
    pair.runner.collect(waiting.pop())
    assert num_uploads == [1, 0, 0, 0, 0]  # the order of the rows, once


def test_slots_run_out_and_moved_rows_come_back(pair: Pair) -> None:
    """Far more rows than slots: each lives for a while, in whatever slot."""
    num_slots = pair.runner._layout.num_slots
    for turn in range(num_slots // 3):
        blocks = Blocks(pair.runner, seed=turn)
        rows = [
            DrivenRow(Row([5 + turn, 6, 7], blocks.tables(8), 3), 1000 + 4 * turn + at) for at in range(4)
        ]
        ahead(pair.runner, rows, random.Random(turn))
        assert rows[0].row.made[:3] == rows[1].row.made[:3]
    wanted = DrivenRow(Row([5, 6, 7], Blocks(pair.plain).tables(8), 3), 0)
    in_turn(pair.plain, [wanted])
    again = DrivenRow(Row([5, 6, 7], Blocks(pair.runner, seed=9).tables(8), 3), 1000)  # a key of before
    ahead(pair.runner, [again], random.Random(0))
    assert again.row.made[:3] == wanted.row.made


def test_a_row_with_numbers_that_are_none_fails_alone(pair: Pair) -> None:
    """Its pages hold NaN; what it wrote is cleared, and what follows it is garbage that nobody looks at."""
    runner = pair.runner
    blocks = Blocks(runner)
    bad, good = (DrivenRow(Row(list(range(20, 40)), blocks.tables(30), 4), key) for key in (1, 2))
    for each in (bad, good):
        given = each.input(19)
        given.is_sampled = False
        each.take(given, runner.step([given])[0])
    block = bad.row.tables[0][0]
    for keys, values in runner._pages.of_layer.values():
        keys[block] = math.nan
        if values is not None:
            values[block] = math.nan
    inputs = [bad.input(1), good.input(1)]
    first = runner.launch(inputs)
    following = [
        RowInput((0,), row.start + 1, row.tables, row.sampling, row.choice, row.index + 1,
                 key=row.key, follows=number)
        for number, row in enumerate(inputs)
    ]  # fmt: skip
    second = runner.launch(following)
    outputs = runner.collect(first)
    assert outputs[0].error == "the model made values that are not finite"
    assert outputs[0].id is None
    assert outputs[1].error is None
    later = runner.collect(second)
    assert later[1].error is None
    wanted = DrivenRow(Row(list(range(20, 40)), Blocks(pair.plain).tables(30), 2), 0)
    in_turn(pair.plain, [wanted])
    assert [outputs[1].id, later[1].id] == wanted.row.made
    for keys, _ in runner._pages.of_layer.values():
        assert not keys[bad.row.tables[0][1]].isnan().any()
        keys[block] = 0
    for _, values in runner._pages.of_layer.values():
        if values is not None:
            values[block] = 0


def test_rows_at_fault(pair: Pair) -> None:
    runner = pair.runner
    blocks = Blocks(runner)
    tables = blocks.tables(20)
    rows = [
        RowInput([VOCAB_SIZE], 0, tables, GREEDY, key=1),
        RowInput([4], 0, tables, GREEDY, key=2),
        RowInput([4], 500, tables, GREEDY, key=3),
    ]
    first = runner.launch(rows)
    following = [
        RowInput((0,), row.start + 1, row.tables, GREEDY, index=1, key=row.key, follows=number)
        for number, row in enumerate(rows)
    ]
    second = runner.launch(following)
    errors = [output.error is None for output in runner.collect(first)]
    assert errors == [False, True, False]
    assert runner.collect(second)[1].error is None
    only_bad = runner.launch(rows[:1])
    assert runner.collect(only_bad)[0].error is not None
    with pytest.raises(ValueError, match="stands twice"):
        runner.launch([rows[1], rows[1]])
    again = DrivenRow(Row([5, 6, 7], blocks.tables(8), 3), 2)
    ahead(runner, [again], random.Random(0))  # as if nothing had been
    wanted = DrivenRow(Row([5, 6, 7], Blocks(pair.plain).tables(8), 3), 0)
    in_turn(pair.plain, [wanted])
    assert again.row.made[:3] == wanted.row.made


def test_no_id_is_left(pair: Pair) -> None:
    sampling = Sampling(temperature=0.0, allowed_token_ids=pack_ids([10_000]))
    row = RowInput([4], 0, Blocks(pair.runner).tables(4), sampling, key=1)
    output = pair.runner.step([row])[0]
    assert output.error == "no id of the vocabulary is left to choose from"


@pytest.mark.parametrize("kind", ["gemma2", "deepseek_v3", "gpt_oss"])
def test_families_with_windows_latents_and_sinks(tmp_path: Path, kind: str) -> None:
    pair = Pair(tmp_path, kind, is_eager=True)
    assert pair.runner.num_graphs == 0
    pair.check(lambda blocks: rows_of(blocks, MIXED[:3], 4, min_prompt=FAMILIES[kind].min_prompt), seed=7)


def test_with_the_attention_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pagebus.kernels.triton_attention import triton_paged_attention

    monkeypatch.setattr(triton_cache, "triton_paged_attention", triton_paged_attention)
    pair = Pair(tmp_path, "qwen2", is_eager=True)
    pair.check(lambda blocks: rows_of(blocks, MIXED[:2], 3), seed=8)


@pytest.mark.parametrize("most", [1, 3, 8, 9, 100, 256, 257, 1000])
def test_ladder(most: int) -> None:
    sizes = ladder(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] >= most
    assert len(sizes) == 1 or sizes[-2] < most
    for num_rows in range(1, most + 1):
        size = next(size for size in sizes if size >= num_rows)
        assert size - num_rows < max(num_rows, 8 if num_rows <= 256 else 32)
