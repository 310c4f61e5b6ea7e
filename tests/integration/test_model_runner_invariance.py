"""On the CPU a row's logits have the same bits alone, in any batch, by prefill and by decode."""

import random
from pathlib import Path

import pytest
import torch

from pagebus.executor.batch import RowInput
from pagebus.executor.linears import can_pack
from pagebus.executor.model_runner import ModelRunner, build_runner
from pagebus.settings.structs import Dtype, ExecutorSettings
from tests.support.models import FAMILIES, VOCAB_SIZE, make_model
from tests.support.rows import GREEDY, Blocks

KINDS = sorted({*FAMILIES} - {"phi3_long", "deepseek_v2_lite"})  # those have no operators of their own
TWO_THREADS = ("qwen3", "deepseek_v3", "gpt_oss")  # one is enough to see most, and faster on a busy machine
LENGTH = 203  # two tiles of keys, the second half full
DTYPES: list[Dtype] = ["float32", "bfloat16"]


def build(tmp_path: Path, kind: str, dtype: Dtype) -> ModelRunner:
    if not can_pack(getattr(torch, dtype)):
        pytest.skip(f"no packed linears for {dtype} on this machine")
    num_threads = 2 if kind in TWO_THREADS else 1
    settings = ExecutorSettings(dtype=dtype, device="cpu", kv_cache_memory="128MiB", num_threads=num_threads)
    return build_runner(settings, make_model(kind, tmp_path / kind, has_tokenizer=False))


def prompt_of(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCAB_SIZE) for _ in range(length)]


def chunked(runner: ModelRunner, blocks: Blocks, ids: list[int], cuts: list[int]) -> torch.Tensor:
    """Logits after the last id, which came in chunks that end at `cuts`."""
    tables = blocks.tables(len(ids))
    start = 0
    for end in [*cuts, len(ids)]:
        logits = runner.logits([RowInput(ids[start:end], start, tables, GREEDY)])[0]
        start = end
    return logits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_do_not_matter(tmp_path: Path, kind: str, dtype: Dtype) -> None:
    runner = build(tmp_path, kind, dtype)
    blocks = Blocks(runner)
    ids = prompt_of(1, LENGTH)
    whole = chunked(runner, blocks, ids, [])
    rng = random.Random(2)
    last = LENGTH - 1
    ways = [
        [last],
        [1],
        [128],
        [129],
        [100, 101, 102, last - 1, last],
        sorted(rng.sample(range(1, last), 12)),
    ]
    if kind == "qwen3":
        ways.append(list(range(1, LENGTH)))  # by decode alone
    for cuts in ways:
        assert torch.equal(chunked(runner, blocks, ids, cuts), whole), cuts


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_batch_does_not_matter(tmp_path: Path, kind: str, dtype: Dtype) -> None:
    runner = build(tmp_path, kind, dtype)
    blocks = Blocks(runner)
    rng = random.Random(3)
    rows, alone = [], []
    for seed in range(33):
        ids = prompt_of(seed, rng.choice([1, 2, 5, 16, 17, 40, 127, 128, 129, 145]))
        tables = blocks.tables(len(ids))
        if seed % 3 and len(ids) > 1:  # a decoding row: all but the last id lie in the pages
            runner.step([RowInput(ids[:-1], 0, tables, GREEDY, is_sampled=False)])
            rows.append(RowInput(ids[-1:], len(ids) - 1, tables, GREEDY))
        else:
            rows.append(RowInput(ids, 0, tables, GREEDY))
        alone.append(runner.logits(rows[-1:])[0])
    for size in (2, 7, 32, 33):
        for _ in range(2):
            order = rng.sample(range(33), size)
            together = runner.logits([rows[i] for i in order])
            for place, i in enumerate(order):
                assert torch.equal(together[place], alone[i]), (size, place, i)
