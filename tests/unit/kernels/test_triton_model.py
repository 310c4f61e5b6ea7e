"""Whole models whose attention runs in Triton's kernels (interpreted): transformers' greedy tokens.

Prompts come in chunks and rows start at different times, so that batches mix prompts and decoding.
"""

import random
from pathlib import Path

import pytest

pytest.importorskip("triton")

import torch

from pagebus.executor import loader, model_runner
from pagebus.executor.loader import LoadedModel, load_model
from pagebus.executor.model_runner import ModelRunner
from pagebus.executor.pulse import Pulse
from pagebus.kernels.jit import IS_INTERPRETED
from tests.support import reference
from tests.support.models import FAMILIES, VOCAB_SIZE, make_model
from tests.support.rows import Blocks, Row, run_rows

pytestmark = pytest.mark.skipif(not IS_INTERPRETED, reason="needs TRITON_INTERPRET=1 before triton's import")
NUM_TOKENS = 4
KINDS = ("gemma2", "deepseek_v3")


@pytest.fixture
def runner_of(monkeypatch: pytest.MonkeyPatch):
    from pagebus.executor.triton_cache import TritonCache

    def make(
        path: Path, *, is_batch_invariant: bool = False, is_fused: bool = False, max_model_len: int = 0
    ) -> ModelRunner:
        def cache(loaded: LoadedModel, num_blocks: list[int], pulse: Pulse) -> TritonCache:
            return TritonCache(
                loaded.specs, num_blocks, loaded.dtype, loaded.device, is_batch_invariant=is_batch_invariant
            )

        monkeypatch.setattr(model_runner, "make_cache", cache)
        if is_fused:
            monkeypatch.setattr(loader, "make_row_invariant", lambda model: [])
        loaded = load_model(path, dtype="float32", max_model_len=max_model_len)
        if is_fused:
            loader._fuse(path, loaded.model, loaded.device)
        return ModelRunner(loaded, [60] * len({spec.window for spec in loaded.specs}))

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_transformers(tmp_path, runner_of, kind):
    family = FAMILIES[kind]
    path = make_model(kind, tmp_path / "model", has_tokenizer=False)
    runner = runner_of(path, max_model_len=family.max_model_len)
    rng = random.Random(1)
    blocks, rows = Blocks(runner), []
    for length in (1, 17, 40):
        prompt = [rng.randrange(VOCAB_SIZE) for _ in range(max(length, family.min_prompt))]
        rows.append(Row(prompt, blocks.tables(len(prompt) + NUM_TOKENS), NUM_TOKENS))
    run_rows(runner, rows, random.Random(2))
    model = reference.load(path)
    for row in rows:
        reference.assert_greedy(model, row.prompt, row.made, NUM_TOKENS)


def test_the_batch_does_not_matter(tmp_path, runner_of):
    """With one cut for all: the same logits alone, among others, by prefill and by decoding."""
    runner = runner_of(make_model("llama", tmp_path / "model", has_tokenizer=False), is_batch_invariant=True)
    rng = random.Random(3)
    blocks = Blocks(runner)
    prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in (33, 5, 20)]
    alone = [runner.logits([Row(prompt, blocks.tables(48), 1).input(len(prompt))])[0] for prompt in prompts]
    together = runner.logits([Row(prompt, blocks.tables(48), 1).input(len(prompt)) for prompt in prompts])
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)
    decoded = Row(prompts[0], blocks.tables(48), 1)
    for chunk in (20, 12):
        given = decoded.input(chunk)
        runner.step([given])
        decoded.take(given, None)
    assert torch.equal(runner.logits([decoded.input(1)])[0], alone[0])


def test_freed_and_foreign_blocks_are_not_read(tmp_path, runner_of):
    """Pages full of NaN beside the row's own."""
    runner = runner_of(make_model("gemma2", tmp_path / "model", has_tokenizer=False))
    blocks = Blocks(runner)
    row = Row(list(range(5, 75)), blocks.tables(80), 1)
    wanted = runner.logits([row.input(70)])
    for pages in (pages for layer in runner._cache.of_layer.values() for pages in layer if pages is not None):
        own = {block for table in row.tables for block in table}
        others = [block for block in range(pages.shape[0]) if block not in own]
        pages[others] = float("nan")
    again = runner.logits([row.input(70)])
    assert torch.equal(wanted, again)


FUSED = {  # attention, gated, norms that stand alone, layers whose residual is added and normed at once
    "llama": (3, 3, 1, 3),
    "gemma2": (3, 3, 7, 3),
    "phi3": (3, 3, 1, 3),
    "gpt_oss": (3, 0, 1, 3),
    "olmo2": (0, 3, 13, 0),
}


@pytest.mark.parametrize("kind", FUSED)
def test_fused_models_give_the_same_tokens(tmp_path, runner_of, caplog, kind):
    family = FAMILIES[kind]
    path = make_model(kind, tmp_path / "model", has_tokenizer=False)
    with caplog.at_level("INFO", "pagebus.executor.loader"):
        runner = runner_of(path, is_fused=True, max_model_len=family.max_model_len)
    attention, gated, norm, residual = FUSED[kind]
    told = f"fused modules: {attention} attention, {gated} gated, {norm} norm, {residual} residual"
    assert told in caplog.text
    rng = random.Random(1)
    blocks, rows = Blocks(runner), []
    for length in (3, 40):
        prompt = [rng.randrange(VOCAB_SIZE) for _ in range(max(length, family.min_prompt))]
        rows.append(Row(prompt, blocks.tables(len(prompt) + 3), 3))
    run_rows(runner, rows, random.Random(2))
    model = reference.load(path)
    for row in rows:
        reference.assert_greedy(model, row.prompt, row.made, 3)
