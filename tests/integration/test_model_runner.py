"""What a runner does with rows, good and bad. (That its tokens are right: see test_model_families.py.)"""

import random
from pathlib import Path

import torch

from pagebus.bus.messages import Sampling
from pagebus.executor.batch import RowInput
from pagebus.executor.model_runner import ModelRunner, build_runner
from pagebus.settings.structs import ExecutorSettings
from tests.support import reference
from tests.support.models import VOCAB_SIZE, make_model
from tests.support.rows import BLOCK_SIZE, GREEDY, Blocks, Row, run_rows

NUM_TOKENS = 64
LENGTHS = (1, 2, 15, 16, 17, 31, 70, 129, 200)


def build(path: Path) -> ModelRunner:
    settings = ExecutorSettings(dtype="float32", device="cpu", kv_cache_memory="64MiB", num_threads=1)
    return build_runner(settings, path)


def prompts(seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in LENGTHS]


def test_windowed_families_have_windowed_groups(tmp_path: Path) -> None:
    runner = build(make_model("gemma3", tmp_path / "model", has_tokenizer=False))
    assert [group.window for group in runner.pool] == [None, 21]
    assert runner.max_model_len == 1024
    full, windowed = (group.num_blocks for group in runner.pool)
    assert windowed < full
    assert full * BLOCK_SIZE >= runner.max_model_len
    held = sum(pages.nbytes for layer in range(3) for pages in runner._cache._layer_pages(layer))
    assert held <= (64 << 20) * 1.01


def test_bfloat16_tokens_are_close(tmp_path: Path) -> None:
    path = make_model("qwen3", tmp_path / "model", has_tokenizer=False)
    settings = ExecutorSettings(dtype="bfloat16", device="cpu", kv_cache_memory="16MiB", num_threads=1)
    runner, model = build_runner(settings, path), reference.load(path)
    blocks = Blocks(runner)
    rows = [Row(prompt, blocks.tables(len(prompt) + 16), 16) for prompt in prompts(4)]
    run_rows(runner, rows, random.Random(5))
    margins = [reference.worst_margin(model, row.prompt, row.made) for row in rows]
    assert max(margins) < 0.5, margins  # eight bits of mantissa in a random model


def test_a_bad_row_fails_alone(tmp_path: Path) -> None:
    runner = build(make_model("llama", tmp_path / "model", has_tokenizer=False))
    blocks = Blocks(runner)
    good = Row(prompts(1)[4], blocks.tables(100), 1)
    alone = runner.step([good.input(99)])[0]
    tables = blocks.tables(100)
    bad = [
        RowInput([1, VOCAB_SIZE], 0, tables, GREEDY),
        RowInput([-1], 0, tables, GREEDY),
        RowInput([], 0, tables, GREEDY),
        RowInput([1], 2000, tables, GREEDY),
        RowInput([1], 100 + 16, tables, GREEDY),
        RowInput([1, 2], 0, [[-1]], GREEDY),
        RowInput([1, 2], 0, [[10**6]], GREEDY),
        RowInput([1, 2], 0, [], GREEDY),
    ]
    outputs = runner.step([*bad[:4], good.input(99), *bad[4:]])
    assert outputs[4] == alone
    assert all(output.error and output.id is None for i, output in enumerate(outputs) if i != 4)
    assert all(output.error for output in runner.step(bad))
    assert runner.step([]) == []


def test_a_row_of_nans_fails_alone_and_leaves_clean_blocks(tmp_path: Path) -> None:
    runner = build(make_model("llama", tmp_path / "model", has_tokenizer=False))
    embeddings = runner._loaded.model.get_input_embeddings()
    with torch.no_grad():
        embeddings.weight[7] = float("nan")
    blocks = Blocks(runner)
    good = Row([3] * 20, blocks.tables(64), 30)
    expected = Row([3] * 20, blocks.tables(64), 30)
    run_rows(runner, [expected], random.Random(0))
    poison = Row([5, 6, 7, 8] * 5, blocks.tables(64), 1)
    outputs = runner.step([good.input(20), poison.input(99)])
    assert outputs[1].error is not None
    assert outputs[1].id is None
    good.take(good.input(20), outputs[0].id)
    # A chunk that samples nothing is found out too, before its blocks go to somebody else.
    quiet = Row([7] * 20, poison.tables, 1)
    assert runner.step([quiet.input(10)])[0].error is not None
    good.position, good.made, good.tables = 0, [], poison.tables
    run_rows(runner, [good], random.Random(1), max_chunk=7)
    assert good.made == expected.made


def test_drawn_tokens_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    runner = build(make_model("qwen3", tmp_path / "model", has_tokenizer=False))
    blocks = Blocks(runner)
    choices = [Sampling(seed=i, top_k=(0, 20)[i % 2], top_p=(1.0, 0.9, 0.5)[i % 3]) for i in range(9)]

    def rows() -> list[Row]:
        return [
            Row(prompt, blocks.tables(len(prompt) + 20), 20, sampling, choice=i)
            for i, (prompt, sampling) in enumerate(zip(prompts(6), choices, strict=True))
        ]

    together, alone = rows(), rows()
    run_rows(runner, together, random.Random(7))
    for row in alone:
        run_rows(runner, [row], random.Random(8))
    assert [row.made for row in together] == [row.made for row in alone]
    assert together[0].made != Row([], [], 0).made
