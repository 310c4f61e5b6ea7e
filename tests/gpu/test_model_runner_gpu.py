"""The same greedy tokens as transformers', with pages, attention and sampling on a CUDA device."""

import os
import random
from pathlib import Path

import pytest

from pagebus.bus.messages import Sampling
from pagebus.executor.batch import RowInput
from pagebus.executor.loader import load_model
from pagebus.executor.model_runner import ModelRunner, build_runner, on_device
from pagebus.settings.structs import Dtype, ExecutorSettings
from tests.support import reference
from tests.support.models import FAMILIES, VOCAB_SIZE, make_model
from tests.support.rows import Blocks, Row, run_rows

pytestmark = pytest.mark.gpu
NUM_TOKENS = 64
NUM_BLOCKS = 400
LENGTHS = (1, 2, 15, 16, 17, 31, 70, 129, 200)


def build(path: Path, dtype: Dtype = "float32", max_model_len: int = 0) -> ModelRunner:
    """With pages of a fixed number, so that several of these tests may run on one device at a time."""
    loaded = load_model(path, dtype=dtype, device="cuda", max_model_len=max_model_len)
    return on_device(loaded, [NUM_BLOCKS] * len({spec.window for spec in loaded.specs}), max_rows=16)


def prompts(seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in LENGTHS]


@pytest.mark.parametrize("kind", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    path, family = make_model(kind, tmp_path / kind, has_tokenizer=False), FAMILIES[kind]
    model, runner = reference.load(path), build(path, max_model_len=family.max_model_len)
    blocks = Blocks(runner)
    chosen = [prompt for prompt in prompts(1) if len(prompt) >= family.min_prompt]
    rows = [Row(prompt, blocks.tables(len(prompt) + NUM_TOKENS), NUM_TOKENS) for prompt in chosen]
    run_rows(runner, rows, random.Random(2))
    for row in rows:
        reference.assert_greedy(model, row.prompt, row.made, NUM_TOKENS)


@pytest.mark.parametrize("kind", FAMILIES)
def test_agreement_in_bfloat16(tmp_path: Path, kind: str) -> None:
    """How many greedy tokens are transformers' in float32: told, also in the file PAGEBUS_GPU_REPORT.

    A row counts up to its first other token, which must have been nearly as good.
    """
    path, family = make_model(kind, tmp_path / kind, has_tokenizer=False), FAMILIES[kind]
    model, runner = reference.load(path), build(path, "bfloat16", family.max_model_len)
    blocks = Blocks(runner)
    chosen = [prompt for prompt in prompts(1) if len(prompt) >= family.min_prompt]
    rows = [Row(prompt, blocks.tables(len(prompt) + 16), 16) for prompt in chosen]
    run_rows(runner, rows, random.Random(2))
    worst = sorted(reference.worst_margin(model, row.prompt, row.made) for row in rows)
    same = sum(one <= 0 for one in worst)
    margin = worst[len(worst) // 2]
    told = f"{kind}: {same} of {len(rows)} rows of 16 tokens as in float32, median margin {margin:.3f}"
    print(told)
    if report := os.environ.get("PAGEBUS_GPU_REPORT"):
        with Path(report).open("a", encoding="utf-8") as file:
            file.write(told + "\n")
    assert margin < 0.5, worst


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_tokens_are_close(tmp_path: Path, dtype: Dtype) -> None:
    path = make_model("qwen3", tmp_path / "model", has_tokenizer=False)
    model, runner = reference.load(path), build(path, dtype)
    blocks = Blocks(runner)
    rows = [Row(prompt, blocks.tables(len(prompt) + 16), 16) for prompt in prompts(4)]
    run_rows(runner, rows, random.Random(5))
    worst = [reference.worst_margin(model, row.prompt, row.made) for row in rows]
    assert sorted(worst)[len(worst) // 2] < 0.5, worst


def test_drawn_ids_are_those_of_the_cpu(tmp_path: Path) -> None:
    path = make_model("llama", tmp_path / "model", has_tokenizer=False)
    on_cpu = build_runner(ExecutorSettings(dtype="float32", device="cpu", kv_cache_memory="16MiB"), path)
    on_gpu = build(path)
    sampling = Sampling(temperature=0.8, top_k=50, top_p=0.95, seed=11)
    made = []
    for runner in (on_cpu, on_gpu):
        tables = Blocks(runner).tables(64)
        rows = [
            RowInput(ids=prompt, start=0, tables=tables, sampling=sampling, choice=choice, index=7)
            for choice, prompt in enumerate(prompts(6)[2:5])
        ]
        made.append([runner.step([row])[0].id for row in rows])
    assert made[0] == made[1]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "gpt_oss", "phi3"])
def test_the_kernels_are_taken(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """In half precision stand-ins are compared with a tolerance: none may be refused, none taken wrongly."""
    path, family = make_model(kind, tmp_path / kind, has_tokenizer=False), FAMILIES[kind]
    with caplog.at_level("INFO", "pagebus.executor.loader"):
        runner = build(path, "bfloat16", family.max_model_len)
    assert "fused modules: 3 attention" in caplog.text
    model = reference.load(path)
    blocks = Blocks(runner)
    rows = [Row(prompt, blocks.tables(len(prompt) + 8), 8) for prompt in prompts(9)[5:]]
    run_rows(runner, rows, random.Random(3))
    worst = [reference.worst_margin(model, row.prompt, row.made) for row in rows]
    assert sorted(worst)[len(worst) // 2] < 0.5, worst
