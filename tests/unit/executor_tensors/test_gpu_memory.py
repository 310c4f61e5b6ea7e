"""A GPU's memory is shared out after its largest step has run; what cannot fit is refused with what would."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pagebus.executor.errors import ModelError
from pagebus.executor.estimates import estimated_specs, num_weights
from pagebus.executor.gpu_memory import budget_for_kv, check_context, check_fits
from pagebus.executor.kv_cache import needs_of
from pagebus.executor.kv_sizing import num_blocks_on_gpu
from pagebus.executor.largest_step import blocks_for, largest_step, lengths_of
from pagebus.executor.loader import load_model
from pagebus.executor.memory import GroupNeed, bytes_of_longest, longest_that_fits
from pagebus.executor.model_runner import ModelRunner, build_runner
from pagebus.settings.structs import ExecutorSettings
from tests.support.models import CONFIGS, make_model

GIB = 1 << 30


@dataclass
class FakeMemory:
    """A device of `size` bytes; a step takes `a_token` bytes a token while it runs."""

    size: int = 80 * GIB
    in_use: int = 20 * GIB
    a_token: int = 1 << 20
    highest: int = 0
    steps: list[int] = field(default_factory=list)

    def total(self) -> int:
        return self.size

    def free(self) -> int:
        return self.size - self.in_use

    def start(self) -> None:
        self.highest = 0

    def peak(self) -> int:
        return self.highest

    def run_step(self, num_tokens: int) -> None:
        self.steps.append(num_tokens)
        if num_tokens * self.a_token > self.free():
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.highest = num_tokens * self.a_token


def budget(memory: FakeMemory, num_tokens: int = 2048, utilization: float = 0.9) -> int:
    return budget_for_kv(memory, memory.run_step, num_tokens=num_tokens, utilization=utilization)


def test_the_rest_after_weights_a_step_and_graphs_is_for_keys_and_values() -> None:
    memory = FakeMemory()
    assert budget(memory) == 72 * GIB - 20 * GIB - 2 * GIB - 2 * GIB // 20 - GIB // 2
    assert memory.steps == [2048]
    small = FakeMemory(size=GIB, in_use=0, a_token=0)
    assert budget(small, utilization=1.0) == GIB - GIB // 20


def test_a_step_that_does_not_fit_is_refused_with_one_that_does() -> None:
    memory = FakeMemory(a_token=50 << 20)  # 2,048 tokens take 100 GiB, 1,024 take 50 of the 60 that are free
    with pytest.raises(ModelError, match=r"step of 2048 tokens .*--max-num-batched-tokens 1024 would fit"):
        budget(memory)
    assert memory.steps == [2048, 1024]
    with pytest.raises(ModelError, match="smaller model"):
        budget(FakeMemory(a_token=100 * GIB), num_tokens=4)


def test_a_step_that_leaves_nothing_is_refused_with_numbers() -> None:
    with pytest.raises(ModelError) as refused:
        budget(FakeMemory(in_use=60 * GIB, a_token=8 << 20))
    assert str(refused.value) == (
        "60.0 GiB in use and 17.3 GiB for a step of 2048 tokens leave nothing of 72.0 GiB for keys and"
        " values; --max-num-batched-tokens 700 would fit"
    )
    memory = FakeMemory(in_use=60 * GIB, a_token=8 << 20)
    assert budget(memory, num_tokens=700) > 0, "what was advised must work"
    with pytest.raises(ModelError, match="smaller model"):
        budget(FakeMemory(in_use=75 * GIB, a_token=8 << 10))


def test_too_large_a_context_is_refused_with_the_one_that_fits() -> None:
    group = GroupNeed(2 << 20, None)  # 131,072 bytes a token, as Llama-3.1-8B in bf16
    with pytest.raises(ModelError) as refused:
        check_fits(
            "m", 15 * GIB, [group], max_model_len=32_768, is_asked=True, left=16 * GIB
        )  # fmt: skip
    assert str(refused.value) == (
        "m needs 19.0 GiB (15.0 GiB weights, 4.0 GiB for a context of 32768), 16.0 GiB are free;"
        " --max-model-len 8192 would fit"
    )
    check_fits("m", 15 * GIB, [group], max_model_len=8192, is_asked=True, left=16 * GIB)
    check_fits("m", 15 * GIB, [group], max_model_len=32_768, is_asked=False, left=16 * GIB)
    with pytest.raises(ModelError, match=r"16\.0 GiB weights.*no context would fit"):
        check_fits("m", 16 * GIB, [group], max_model_len=32_768, is_asked=False, left=16 * GIB)
    with pytest.raises(ModelError, match="no context would fit"):
        check_fits("m", 17 * GIB, [], max_model_len=32_768, is_asked=True, left=16 * GIB)


def test_after_the_step_a_context_that_was_asked_for_must_fit() -> None:
    group = GroupNeed(1 << 20, None)
    with pytest.raises(ModelError, match=r"4096 needs 256.0 MiB .* 100.0 MiB are free; --max-model"):
        check_context([group], 100 << 20, 4096, is_asked=True)
    with pytest.raises(ModelError, match="none would fit"):
        check_context([group], 100, 4096, is_asked=True)
    check_context([group], 100 << 20, 4096, is_asked=False)
    check_context([group], 100 << 20, 1600, is_asked=True)


@settings(max_examples=200, deadline=None)
@given(
    needs=st.lists(
        st.tuples(st.integers(1, 1 << 20), st.none() | st.integers(1, 1 << 14)), min_size=1, max_size=3
    ),
    budget=st.integers(0, 1 << 34),
    max_model_len=st.integers(1, 1 << 18),
)
def test_the_context_that_is_told_is_the_longest(
    needs: list[tuple[int, int | None]], budget: int, max_model_len: int
) -> None:
    groups = [GroupNeed(size, window) for size, window in needs]
    fits = longest_that_fits(groups, budget, max_model_len)
    assert 0 <= fits <= max_model_len
    assert not fits or bytes_of_longest(groups, fits) <= budget
    assert fits == max_model_len or bytes_of_longest(groups, fits + 16) > budget


@settings(max_examples=200, deadline=None)
@given(tokens=st.integers(1, 5000), rows=st.integers(1, 600), longest=st.integers(1, 5000))
def test_the_largest_step_has_as_many_tokens_and_rows_as_it_may(tokens: int, rows: int, longest: int) -> None:
    lengths = lengths_of(tokens, rows, longest)
    assert len(lengths) == min(rows, tokens)
    assert min(lengths) >= 1
    assert max(lengths) <= longest
    if max(lengths) < longest:
        assert sum(lengths) == tokens
    made = largest_step(lengths, 2, 7)
    assert [len(row.ids) for row in made] == lengths
    blocks = [block for row in made for block in row.tables[1]]
    assert blocks == list(range(blocks_for(lengths)))
    assert all(row.is_sampled and max(row.ids) < 7 for row in made)


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_estimates_are_what_the_model_is_found_to_take(tmp_path: Path, kind: str) -> None:
    CONFIGS[kind]().save_pretrained(tmp_path)
    loaded = load_model(tmp_path, dtype="float32", load_format="dummy")
    config = loaded.model.config
    assert needs_of(estimated_specs(config, loaded.max_model_len), torch.float32) == needs_of(
        loaded.specs, torch.float32
    )


def test_weights_are_counted_once(tmp_path: Path) -> None:
    config = CONFIGS["llama"]()
    counted = num_weights(config)
    config.tie_word_embeddings = True
    assert counted - num_weights(config) == config.vocab_size * config.hidden_size


def test_a_model_that_cannot_fit_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    path = make_model("qwen3", tmp_path / "model", has_tokenizer=False)
    size = (path / "model.safetensors").stat().st_size
    for options in ({"room": size // 2}, {"room": size + 3000, "max_model_len": 512}):
        with pytest.raises(ModelError, match=r"needs .* are free; "):
            load_model(path, dtype="float32", **options)
        with pytest.raises(ModelError, match=r"needs .* are free; "):
            load_model(path, dtype="float32", load_format="dummy", **options)
    with pytest.raises(ModelError, match="--max-model-len 64 would fit"):
        load_model(path, dtype="float32", max_model_len=512, room=size + 64 * 3 * 2 * 128 * 4)
    load_model(path, dtype="float32", max_model_len=512, room=2 * size)


def test_a_real_runner_runs_the_largest_step(tmp_path: Path) -> None:
    """With a windowed group, on the CPU, the device's memory being a stand-in."""
    loaded = load_model(make_model("gemma2", tmp_path / "model", has_tokenizer=False), dtype="float32")
    memory = FakeMemory(size=8 << 20, in_use=1 << 20)
    made: list[Sequence[int]] = []

    def make(sizes: Sequence[int]) -> ModelRunner:
        made.append(sizes)
        return ModelRunner(loaded, sizes)

    asked = ExecutorSettings(max_num_batched_tokens=50, max_num_seqs=20, gpu_memory_utilization=1.0)
    counted: Callable[[], int] = lambda: len(loaded.model.base_model._forward_hooks)  # noqa: E731
    before = counted()
    blocks = num_blocks_on_gpu(loaded, asked, make, memory)
    assert made == [[20, 20]]
    assert counted() == before, "the tried runner has let go of the model"
    needs = needs_of(loaded.specs, loaded.page_dtype)
    free = (8 << 20) - (1 << 20) - (8 << 20) // 20
    used = sum(n * need.bytes_a_block for n, need in zip(blocks, needs, strict=True))
    assert free - sum(need.bytes_a_block for need in needs) < used <= free
    with pytest.raises(ModelError, match="--max-model-len"):
        num_blocks_on_gpu(
            loaded, ExecutorSettings(max_model_len=1024, max_num_batched_tokens=9), make,
            FakeMemory(size=2 << 20, in_use=1 << 20),
        )  # fmt: skip


def test_a_cpu_refuses_what_only_a_gpu_can_do_before_it_loads(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="fp8 needs a CUDA device"):
        build_runner(ExecutorSettings(device="cpu", quantization="fp8"), tmp_path / "nowhere")
