"""Whole models with keys and values in fp8 (interpreted): near the exact ones, and copied whole."""

import random
from pathlib import Path

import pytest

pytest.importorskip("triton")

import torch

from pagebus.executor import loader, model_runner
from pagebus.executor.batch import BlockCopy
from pagebus.executor.errors import ModelError
from pagebus.executor.kv_cache import needs_of
from pagebus.executor.kv_sizing import num_blocks_on_gpu
from pagebus.executor.loader import load_model
from pagebus.executor.model_runner import ModelRunner
from pagebus.kernels.jit import IS_INTERPRETED
from pagebus.settings.structs import ExecutorSettings
from tests.support.models import make_tiny
from tests.support.rows import Blocks, Row

pytestmark = pytest.mark.skipif(not IS_INTERPRETED, reason="needs TRITON_INTERPRET=1 before triton's import")
KINDS = {"llama": True, "gemma2": True, "deepseek_v3": False}  # whether attention is fused


@pytest.fixture
def runner_of(monkeypatch: pytest.MonkeyPatch):
    from pagebus.executor.triton_cache import TritonCache

    def make(path: Path, kind: str, kv_cache_dtype: str, *, is_fused: bool | None = None) -> ModelRunner:
        is_fused = KINDS[kind] if is_fused is None else is_fused

        def cache(loaded, num_blocks, _pulse) -> TritonCache:
            return TritonCache(
                loaded.specs, num_blocks, loaded.page_dtype, loaded.device, is_batch_invariant=True
            )

        monkeypatch.setattr(model_runner, "make_cache", cache)
        if is_fused:
            monkeypatch.setattr(loader, "make_row_invariant", lambda model: [])
        loaded = load_model(path, dtype="float32", kv_cache_dtype=kv_cache_dtype)
        if is_fused:
            loader._fuse(path, loaded.model, loaded.device)
        return ModelRunner(loaded, [30] * len({spec.window for spec in loaded.specs}))

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_near_the_exact_ones(tmp_path, runner_of, kind):
    path = make_tiny(kind, tmp_path / "model")
    rng = random.Random(1)
    prompts = [[rng.randrange(60) for _ in range(length)] for length in (1, 18)]
    found = {}
    for kv_cache_dtype in ("auto", "fp8"):
        runner = runner_of(path, kind, kv_cache_dtype)
        blocks = Blocks(runner)
        rows = [Row(prompt, blocks.tables(48), 1).input(len(prompt)) for prompt in prompts]
        found[kv_cache_dtype] = runner.logits(rows)
        assert all(
            (pages.dtype == torch.float8_e4m3fn) == (kv_cache_dtype == "fp8")
            for pages, _ in runner._cache.of_layer.values()
        )
    exact, near = found["auto"], found["fp8"]
    assert not torch.equal(exact, near)
    alike = torch.nn.functional.cosine_similarity(exact, near, dim=-1)
    assert (alike > 0.98).all(), alike


@pytest.mark.parametrize("kind", ["llama", "deepseek_v3"])
def test_copied_blocks_are_whole(tmp_path, runner_of, kind):
    """A row that goes on in copies of another's blocks has its logits, bit for bit: numbers and peaks."""
    runner = runner_of(make_tiny(kind, tmp_path / "model"), kind, "fp8")
    blocks = Blocks(runner)
    prompt = list(range(3, 22))
    first = Row(prompt, blocks.tables(48), 1)
    given = first.input(18)
    runner.step([given])
    first.take(given, None)
    second = Row(prompt, blocks.tables(48), 1)
    second.take(second.input(18), None)
    copies = [
        BlockCopy(group, source, target)
        for group, (sources, targets) in enumerate(zip(first.tables, second.tables, strict=True))
        for source, target in zip(sources, targets, strict=True)
    ]
    wanted = runner.logits([first.input(1)])
    runner.copy_blocks(copies)
    assert torch.equal(runner.logits([second.input(1)]), wanted)
    runner._cache.clear(second.tables)
    for layer, (keys, values) in runner._cache.peaks_of_layer.items():
        for block in second.tables[runner._cache.group_of[layer]]:
            assert not keys[block].any()
            assert not values[block].any()
    assert not torch.equal(runner.logits([second.input(1)]), wanted)


def test_chunks_and_decoding_write_the_same(tmp_path, runner_of):
    """What is read is what was stored, also of a step's own keys: how they came does not matter."""
    path = make_tiny("llama", tmp_path / "model")
    runner = runner_of(path, "llama", "fp8", is_fused=False)
    blocks = Blocks(runner)
    prompt = list(range(5, 26))
    whole = Row(prompt, blocks.tables(32), 1)
    given = whole.input(21)
    runner.step([given])
    chunked = Row(prompt, blocks.tables(32), 1)
    for chunk in (18, 1, 2):
        given = chunked.input(chunk)
        runner.step([given])
        chunked.take(given, None)
    pages, peaks = runner._cache.of_layer[0], runner._cache.peaks_of_layer[0]
    for stored in (pages[0].view(torch.uint8), pages[1].view(torch.uint8), *peaks):
        assert torch.equal(stored[whole.tables[0]][0], stored[chunked.tables[0]][0])


@pytest.mark.parametrize("kind", ["llama", "deepseek_v3"])
def test_pools_count_the_peaks(tmp_path, kind):
    loaded = load_model(make_tiny(kind, tmp_path / "model"), dtype="float32", kv_cache_dtype="fp8_e4m3")
    from pagebus.executor.triton_cache import TritonCache

    cache = TritonCache(loaded.specs, [9], loaded.page_dtype, loaded.device)
    held = sum(part.nbytes for layer in range(2) for part in cache._layer_pages(layer))
    assert held == 10 * sum(need.bytes_a_block for need in needs_of(loaded.specs, loaded.page_dtype))


def test_a_cpu_without_kernels_of_its_own_says_that_it_has_no_fp8_pages(tmp_path, monkeypatch):
    monkeypatch.setattr(model_runner, "library_for", lambda _: None)
    loaded = load_model(make_tiny("llama", tmp_path / "model"), dtype="float32", kv_cache_dtype="fp8")
    with pytest.raises(ModelError, match="--kv-cache-dtype fp8 needs the CPU's compiled kernels"):
        ModelRunner(loaded, [9])


def test_the_largest_step_runs_on_the_runner_of_a_gpu(tmp_path, monkeypatch):
    """All filters and log-probabilities, on pages in fp8; the device and its memory are stand-ins."""
    from pagebus.executor.device import HostDevice
    from pagebus.executor.device_runner import DeviceRunner
    from pagebus.executor.triton_cache import TritonCache

    def cache(loaded, num_blocks, _pulse) -> TritonCache:
        return TritonCache(loaded.specs, num_blocks, loaded.page_dtype, loaded.device)

    monkeypatch.setattr(model_runner, "make_cache", cache)
    path = make_tiny("llama", tmp_path / "model")
    loaded = load_model(path, dtype="float32", kv_cache_dtype="fp8", max_model_len=64)

    def make(sizes) -> DeviceRunner:
        return DeviceRunner(loaded, sizes, HostDevice(), max_rows=3, is_eager=True)

    asked = ExecutorSettings(max_num_batched_tokens=6, max_num_seqs=3, gpu_memory_utilization=1.0)
    assert num_blocks_on_gpu(loaded, asked, make, Idle()) == [256 * 64 // 16]


class Idle:
    """4 MiB that nobody uses."""

    def total(self) -> int:
        return 4 << 20

    def free(self) -> int:
        return 4 << 20

    def start(self) -> None:
        pass

    def peak(self) -> int:
        return 0
