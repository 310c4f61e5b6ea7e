"""Sampling on real models: ids, log-probabilities and penalties are those of transformers, in any batch."""

import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from pagebus.bus.messages import Sampling, pack_ids
from pagebus.executor import model_runner
from pagebus.executor.batch import BlockCopy, RowInput, RowOutput
from pagebus.executor.linears import can_pack
from pagebus.executor.logprobs import joined
from pagebus.executor.model_runner import ModelRunner, build_runner
from pagebus.settings.structs import Dtype, ExecutorSettings
from tests.support import reference
from tests.support.draws import read, words
from tests.support.models import FAMILIES, VOCAB_SIZE, make_model
from tests.support.rows import BLOCK_SIZE, GREEDY, Blocks, Row

LENGTHS = (1, 2, 15, 16, 17, 31, 70, 129)
needs_packing = pytest.mark.skipif(not can_pack(torch.float32), reason="rows are not invariant here")


def build(path: Path, dtype: Dtype = "float32", max_model_len: int = 0) -> ModelRunner:
    settings = ExecutorSettings(
        dtype=dtype, device="cpu", kv_cache_memory="64MiB", num_threads=1, max_model_len=max_model_len
    )
    return build_runner(settings, path)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("qwen3", tmp_path_factory.mktemp("models") / "model", has_tokenizer=False)


@pytest.fixture(scope="module")
def runner(path: Path) -> ModelRunner:
    return build(path)


@pytest.fixture(scope="module")
def model(path: Path) -> PreTrainedModel:
    return reference.load(path)


def prompt_of(seed: int, length: int, vocab_size: int = VOCAB_SIZE) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(vocab_size) for _ in range(length)]


@dataclass
class SampledRow(Row):
    """A row as the executor's plan state would give it, with all that it was told."""

    stop_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    outputs: list[RowOutput] = field(default_factory=list)

    def input(self, chunk: int) -> RowInput:
        row = super().input(chunk)
        row.num_prompt = len(self.prompt)
        if self.sampling.needs_history:
            row.history = array("i", [*self.prompt, *self.made])
        if len(self.made) < self.min_tokens:
            row.banned_ids = self.stop_ids
        return row


def drive(runner: ModelRunner, rows: Sequence[SampledRow], rng: random.Random, max_chunk: int = 45) -> None:
    """Step until all rows are done: random chunks in random order."""
    while running := [row for row in rows if not row.is_done]:
        chosen = [row for row in running if rng.random() < 0.8] or running
        rng.shuffle(chosen)
        inputs = [row.input(rng.randint(1, max_chunk)) for row in chosen]
        for row, asked, output in zip(chosen, inputs, runner.step(inputs), strict=True):
            assert output.error is None, output.error
            row.outputs.append(output)
            row.take(asked, output.id)


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_log_probabilities_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    path = make_model(kind, tmp_path / kind, has_tokenizer=False)
    family = FAMILIES[kind]
    runner, model = build(path, max_model_len=family.max_model_len), reference.load(path)
    blocks = Blocks(runner)
    rows = [
        SampledRow(
            prompt_of(100 + n, length),  # of other prompts one is a tie between two experts
            blocks.tables(length + 12),
            12,
            Sampling(
                temperature=(0.0, 1.5)[n % 2],
                frequency_penalty=0.5,
                top_k=(0, 3)[n % 2],
                num_logprobs=(5, 0, 20, 1000)[n % 4],
                num_prompt_logprobs=(3, 0, None)[n % 3],
                seed=n,
            ),
        )
        for n, length in enumerate(LENGTHS)
        if length >= family.min_prompt
    ]
    drive(runner, rows, random.Random(1))
    for row in rows:
        with torch.inference_mode():
            logits = model(torch.tensor([[*row.prompt, *row.made]])).logits[0].float()
        exact = logits.log_softmax(-1)
        num_prompt = len(row.prompt)
        assert row.sampling.num_logprobs is not None
        made = joined([output.logprobs for output in row.outputs if output.logprobs is not None])
        check(read(made), exact[num_prompt - 1 : -1], row.made, row.sampling.num_logprobs)
        told = [output.prompt_logprobs for output in row.outputs if output.prompt_logprobs is not None]
        if row.sampling.num_prompt_logprobs is None or num_prompt == 1:
            assert not told
        else:
            expected = exact[: num_prompt - 1]
            check(read(joined(told)), expected, list(row.prompt[1:]), row.sampling.num_prompt_logprobs)


def check(
    told: tuple[torch.Tensor, torch.Tensor, torch.Tensor], exact: torch.Tensor, ids: list[int], num_top: int
) -> None:
    told_ids, values, ranks = told
    num_top = min(num_top, exact.shape[1])
    assert told_ids[:, 0].tolist() == ids
    assert told_ids.shape[1] == 1 + num_top
    assert (values - exact.gather(1, told_ids)).abs().max() < 1e-4
    best = exact.topk(num_top, dim=-1).values
    assert num_top == 0 or (values[:, 1:] - best).abs().max() < 1e-4
    own = exact.gather(1, told_ids[:, :1])
    assert ((exact >= own + 1e-4).sum(-1) < ranks).all()
    assert (ranks <= (exact >= own - 1e-4).sum(-1)).all()


@needs_packing
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prompt_log_probabilities_do_not_depend_on_chunks(
    path: Path, dtype: Dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = build(path, dtype)
    prompt = prompt_of(5, 150)
    sampling = Sampling(temperature=0, num_prompt_logprobs=4, num_logprobs=2)
    blocks = Blocks(runner)

    def told(max_chunk: int, others: int, seed: int) -> tuple[object, object]:
        rows = [SampledRow(prompt, blocks.tables(151), 1, sampling)]
        rows += [SampledRow(prompt_of(n, 20), blocks.tables(30), 8, GREEDY) for n in range(others)]
        drive(runner, rows, random.Random(seed), max_chunk)
        for row in rows:
            for table, free in zip(row.tables, blocks.free, strict=True):
                free.extend(table)
        parts = [output.prompt_logprobs for output in rows[0].outputs if output.prompt_logprobs is not None]
        return joined(parts), rows[0].outputs[-1].logprobs

    whole = told(1000, 0, 0)
    assert len(whole[0].ranks) == 4 * 149  # type: ignore[attr-defined]
    for max_chunk, others in ((1, 0), (7, 3), (64, 6)):
        assert told(max_chunk, others, max_chunk) == whole
    for positions in (1, 10, 64):  # as many positions' logits at once
        monkeypatch.setattr(model_runner, "_HEAD_BYTES", positions * 4 * VOCAB_SIZE)
        assert told(1000, 2, 3) == whole


def test_rows_with_and_without_prompt_log_probabilities_share_a_step(runner: ModelRunner) -> None:
    """Nothing is told after the prompt's end, and a prompt shorter than its history says is refused."""
    tables = Blocks(runner).tables(64)
    sampling = Sampling(temperature=0, num_prompt_logprobs=0)
    history = prompt_of(1, 30)
    inputs = [
        RowInput(history, 0, tables, sampling, num_prompt=20, history=history),
        RowInput(history[:5], 0, Blocks(runner, 1).tables(5), GREEDY),
        RowInput(history, 0, tables, sampling, num_prompt=40, history=history),
        RowInput(history, 0, tables, sampling, num_prompt=31, history=[*history, 10**6]),
        RowInput(history[:1], 0, Blocks(runner, 2).tables(5), sampling, num_prompt=1, history=history[:1]),
    ]
    first, plain, short, outside, single = runner.step(inputs)
    assert first.prompt_logprobs is not None
    assert len(first.prompt_logprobs.ranks) == 4 * 19
    assert first.error is None
    assert plain == runner.step(inputs[1:2])[0]
    assert plain.prompt_logprobs is plain.logprobs is None
    assert short.error is not None
    assert outside.error is not None
    assert outside.id is None
    assert single.error is None
    assert single.prompt_logprobs is None


kinds = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 1e-5, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, 0, 1, 40, 200]),
    top_p=st.sampled_from([1.0, 0.95, 0.5]),
    min_p=st.sampled_from([0.0, 0.05]),
    seed=st.integers(0, 2**64 - 1),
    presence_penalty=st.sampled_from([0.0, 1.0, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.4, 2.0]),
    repetition_penalty=st.sampled_from([1.0, 1.2, 0.5]),
    logit_bias=st.sampled_from([{}, {}, {3: 100.0}, {9: -100.0, 10: 2.0}]),
    allowed_token_ids=st.sampled_from([b"", b"", pack_ids(range(0, VOCAB_SIZE, 3))]),
    bad_words=st.sampled_from([(), words([6], [0, 9], [30] * 40)]),
    num_logprobs=st.sampled_from([None, 0, 3]),
)
specs = st.tuples(kinds, st.integers(1, 60), st.integers(0, 3), st.sampled_from([0, 3]))


def rows_of(blocks: Blocks, wanted: Sequence[tuple[Sampling, int, int, int]]) -> Iterator[SampledRow]:
    for n, (sampling, length, choice, min_tokens) in enumerate(wanted):
        tables = blocks.tables(length + 6)
        stop_ids = tuple(range(0, VOCAB_SIZE, 6))
        yield SampledRow(
            prompt_of(n, length), tables, 6, sampling, choice, stop_ids=stop_ids, min_tokens=min_tokens
        )


@needs_packing
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.data_too_large])
@given(wanted=st.lists(specs, min_size=32, max_size=32), seed=st.integers(0, 1000))
def test_ids_are_the_same_alone_and_in_every_batch(
    runner: ModelRunner, wanted: list[tuple[Sampling, int, int, int]], seed: int
) -> None:
    rng = random.Random(seed)
    alone = list(rows_of(Blocks(runner), wanted))
    for row in alone:
        drive(runner, [row], rng, max_chunk=1000)
        if row.min_tokens:
            assert not any(id % 6 == 0 for id in row.made[: row.min_tokens])
    for size in (2, 7, 32):
        together = list(rows_of(Blocks(runner, seed), wanted))[:size]
        drive(runner, together, rng, max_chunk=rng.choice([3, 20, 100]))
        for one, other in zip(alone, together, strict=False):
            assert one.made == other.made, one.sampling
            assert [o.logprobs for o in one.outputs if o.id is not None] == [
                o.logprobs for o in other.outputs if o.id is not None
            ]


def test_greedy_with_penalties_is_generate(runner: ModelRunner, model: PreTrainedModel) -> None:
    """transformers.generate with the same processors."""
    bad = [[7], [11, 12], [400, 3]]
    sampling = Sampling(
        temperature=0, repetition_penalty=1.3, bad_words=words(*bad), logit_bias={20: 2.5, 21: -4.0}
    )
    blocks = Blocks(runner)
    rows = [
        SampledRow(
            prompt_of(n, length), blocks.tables(length + 40), 40, sampling, stop_ids=(5, 6), min_tokens=40
        )
        for n, length in enumerate((3, 17, 40))
    ]
    drive(runner, rows, random.Random(3))
    plain = SampledRow(rows[2].prompt, blocks.tables(80), 40)
    drive(runner, [plain], random.Random(4))
    assert plain.made != rows[2].made, "nothing was penalized"
    for row in rows:
        out = model.generate(
            torch.tensor([row.prompt]),
            attention_mask=torch.ones(1, len(row.prompt), dtype=torch.long),
            max_new_tokens=40, min_new_tokens=40, do_sample=False, eos_token_id=[5, 6], pad_token_id=0,
            repetition_penalty=1.3, bad_words_ids=bad, sequence_bias=[[[20], 2.5], [[21], -4.0]],
        )  # fmt: skip
        assert row.made == out[0, len(row.prompt) :].tolist()


def test_copied_blocks_are_as_good_as_computed_ones(runner: ModelRunner) -> None:
    blocks = Blocks(runner)
    prompt = prompt_of(3, 40)
    first = SampledRow(prompt, blocks.tables(60), 10, Sampling(seed=1))
    drive(runner, [first], random.Random(1))
    copied = SampledRow(prompt, blocks.tables(60), 10, Sampling(seed=1), position=39)
    copies = [
        BlockCopy(group, source, target)
        for group, (sources, targets) in enumerate(zip(first.tables, copied.tables, strict=True))
        for source, target in zip(sources[: 40 // BLOCK_SIZE + 1], targets, strict=False)
    ]
    runner.copy_blocks(copies)
    drive(runner, [copied], random.Random(2))
    assert copied.made == first.made


def test_a_row_that_cannot_be_sampled_fails_alone(runner: ModelRunner) -> None:
    blocks = Blocks(runner)
    prompt = prompt_of(1, 9)
    good = RowInput(prompt, 0, blocks.tables(9), GREEDY)
    bad = [
        Sampling(allowed_token_ids=pack_ids([VOCAB_SIZE + 9])),
        Sampling(allowed_token_ids=b"xyz"),
        Sampling(bad_words=(b"xyz",)),
        Sampling(logit_bias={1: float("nan")}),
        Sampling(repetition_penalty=0.0),
    ]
    rows = [RowInput(prompt, 0, blocks.tables(9), sampling, num_prompt=9, history=prompt) for sampling in bad]
    outputs = runner.step([*rows[:2], good, *rows[2:]])
    assert outputs[2] == runner.step([good])[0]
    assert [output.error is None for output in outputs] == [False, False, True, False, False, False]
    assert all(output.id is None for i, output in enumerate(outputs) if i != 2)
