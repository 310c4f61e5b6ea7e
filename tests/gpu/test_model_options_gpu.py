"""fp8, batch invariance and the sizing of pages on a CUDA device, on whole small models."""

import random
from pathlib import Path

import pytest
import torch

from pagebus.executor.errors import ModelError
from pagebus.executor.model_runner import ModelRunner, build_runner
from pagebus.settings.structs import ExecutorSettings
from tests.support.models import VOCAB_SIZE, make_model
from tests.support.rows import Blocks, Row

pytestmark = pytest.mark.gpu
BOTH = {"kv_cache_dtype": "fp8", "quantization": "fp8"}


def build(path: Path, **options: object) -> ModelRunner:
    settings = ExecutorSettings(
        **{
            "dtype": "bfloat16",
            "device": "cuda",
            "gpu_memory_utilization": share(),
            "max_num_seqs": 16,
            **options,
        }
    )
    return build_runner(settings, path)


def share() -> float:
    """A twentieth of the device more than is in use."""
    free, total = torch.cuda.mem_get_info()
    return min(0.95, (total - free) / total + 0.05)


def logits(runner: ModelRunner, prompts: list[list[int]]) -> torch.Tensor:
    blocks = Blocks(runner)
    rows = [Row(prompt, blocks.tables(len(prompt) + 1), 1).input(len(prompt)) for prompt in prompts]
    return runner.logits(rows).float()


def prompts(seed: int, lengths: tuple[int, ...]) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "deepseek_v3"])
@pytest.mark.parametrize(
    "options",
    [{"kv_cache_dtype": "fp8"}, {"kv_cache_dtype": "fp8", "quantization": "fp8"}],
    ids=["kv", "both"],
)
def test_fp8_is_near(tmp_path: Path, kind: str, options: dict[str, str]) -> None:
    path = make_model(kind, tmp_path / kind, has_tokenizer=False)
    given = prompts(1, (1, 17, 200))
    exact, near = logits(build(path), given), logits(build(path, **options), given)
    assert (torch.nn.functional.cosine_similarity(exact, near, dim=-1) > 0.95).all()


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "deepseek_v3"])
@pytest.mark.parametrize(
    "options", [{}, {"kv_cache_dtype": "fp8", "quantization": "fp8"}], ids=["bf16", "fp8"]
)
def test_a_rows_logits_do_not_see_the_batch(tmp_path: Path, kind: str, options: dict[str, str]) -> None:
    path = make_model(kind, tmp_path / kind, has_tokenizer=False)
    runner = build(path, batch_invariant=True, **options)
    given = prompts(2, (33, 1, 200, 5, 64, 17))
    together = logits(runner, given)
    for place, prompt in enumerate(given):
        assert torch.equal(logits(runner, [prompt])[0], together[place])
    blocks = Blocks(runner)
    row = Row(given[2], blocks.tables(201), 1)
    for chunk in (100, 99):
        one = row.input(chunk)
        runner.step([one])
        row.take(one, None)
    assert torch.equal(runner.logits([row.input(1)]).float()[0], together[2])


def test_pages_fill_what_is_allowed_and_too_long_a_context_is_refused(tmp_path: Path) -> None:
    path = make_model("llama", tmp_path / "model", has_tokenizer=False)
    free, total = torch.cuda.mem_get_info()
    share = (total - free) / total + 0.02
    runner = build(path, gpu_memory_utilization=share, max_num_batched_tokens=512, max_num_seqs=32)
    assert runner.pool[0].num_blocks >= 1024 // 16
    del runner
    with pytest.raises(ModelError, match=r"needs .* are free"):
        build(path, gpu_memory_utilization=(total - free) / total, max_model_len=1024)
