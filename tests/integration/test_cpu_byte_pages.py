"""A whole model on the CPU with keys and values in int8 and fp8: logits, bits, memory, refusals."""

import random
from pathlib import Path

import pytest
import torch

from pagebus.executor.batch import BlockCopy, RowInput
from pagebus.executor.cpu_cache import CpuCache
from pagebus.executor.errors import ModelError
from pagebus.executor.kv_cache import needs_of
from pagebus.executor.linears import can_pack
from pagebus.executor.model_runner import ModelRunner, build_runner
from pagebus.kernels import cpu_compile, cpu_library
from pagebus.settings.structs import Dtype, ExecutorSettings, KvCacheDtype
from tests.support.models import VOCAB_SIZE, make_model
from tests.support.rows import GREEDY, Blocks, Row, prefill, run_rows

pytestmark = pytest.mark.skipif(
    cpu_compile.find_compiler() is None or not cpu_compile.is_supported(), reason="needs a C++ compiler"
)

KINDS = ("qwen3", "gemma2", "gpt_oss")  # one call a step; windows and soft caps; modules with sinks
FARTHEST = {"int8": 0.05, "fp8": 0.25}
"""Root mean square of what logits move, in their standard deviations. Random weights are the hard case."""


def build(tmp_path: Path, kind: str, pages: KvCacheDtype, dtype: Dtype = "float32") -> ModelRunner:
    if not can_pack(getattr(torch, dtype)):
        pytest.skip(f"no packed linears for {dtype} on this machine")
    settings = ExecutorSettings(
        dtype=dtype, device="cpu", kv_cache_memory="16MiB", num_threads=2, kv_cache_dtype=pages
    )
    path = tmp_path / kind
    return build_runner(settings, path if path.exists() else make_model(kind, path, has_tokenizer=False))


def prompt_of(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCAB_SIZE) for _ in range(length)]


def by_chunks(runner: ModelRunner, tables: list[list[int]], ids: list[int], cuts: list[int]) -> torch.Tensor:
    start = 0
    for end in [*cuts, len(ids)]:
        logits = runner.logits([RowInput(ids[start:end], start, tables, GREEDY)])[0]
        start = end
    return logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pages", ["int8", "fp8"])
def test_logits_stay_close_to_those_of_plain_pages(tmp_path: Path, kind: str, pages: KvCacheDtype) -> None:
    found = {}
    for way in ("auto", pages):
        runner = build(tmp_path, kind, way)
        blocks = Blocks(runner)
        rows = [RowInput(prompt_of(n, 90 + n), 0, blocks.tables(90 + n), GREEDY) for n in range(6)]
        found[way] = runner.logits(rows)
    apart = (found[pages] - found["auto"]).square().mean().sqrt() / found["auto"].std()
    assert 0 < float(apart) <= FARTHEST[pages]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_batches_and_hits_do_not_matter(tmp_path: Path, kind: str, dtype: Dtype) -> None:
    runner = build(tmp_path, kind, "int8", dtype)
    blocks = Blocks(runner)
    ids = prompt_of(1, 151)
    whole = by_chunks(runner, blocks.tables(151), ids, [])
    for cuts in ([150], [1], [64, 65], [3, 20, 149, 150]):
        assert torch.equal(by_chunks(runner, blocks.tables(151), ids, cuts), whole), cuts
    donor = Row(ids, blocks.tables(160), 1)
    prefill(runner, donor, 45)
    hit = RowInput(ids[128:], 128, blocks.after_hit(donor, 8, 160), GREEDY)  # a prefix of another row
    company = [RowInput(prompt_of(n, 30 * n), 0, blocks.tables(30 * n), GREEDY) for n in (1, 2, 4)]
    together = runner.logits([company[0], hit, *company[1:]])
    assert torch.equal(together[1], whole)
    for place, row in ((0, company[0]), (2, company[1]), (3, company[2])):
        assert torch.equal(runner.logits([row])[0], together[place])


@pytest.mark.parametrize("pages", ["int8", "fp8"])
def test_copied_blocks_have_their_peaks(tmp_path: Path, pages: KvCacheDtype) -> None:
    runner = build(tmp_path, "qwen3", pages)
    blocks = Blocks(runner)
    parent = Row(prompt_of(3, 40), blocks.tables(60), 1)
    given = RowInput(parent.prompt, 0, parent.tables, GREEDY)
    runner.step([given])
    parent.position = 40
    tables, copies = blocks.after_fork(parent, 60)
    runner.copy_blocks(copies)
    assert isinstance(copies[0], BlockCopy)
    own, forked = (runner.logits([RowInput([7], 40, t, GREEDY)])[0] for t in (parent.tables, tables))
    assert torch.equal(own, forked)


def test_tokens_are_the_same_in_any_order(tmp_path: Path) -> None:
    runner = build(tmp_path, "qwen3", "int8", "bfloat16")

    def run(seed: int) -> list[list[int]]:
        blocks = Blocks(runner, seed)
        rows = [Row(prompt_of(n, 10 + 17 * n), blocks.tables(120), 12) for n in range(5)]
        run_rows(runner, rows, random.Random(seed))
        return [row.made for row in rows]

    assert run(1) == run(2)


def test_the_same_memory_holds_nearly_four_times_the_tokens_of_float32(tmp_path: Path) -> None:
    plain, small = (build(tmp_path, "qwen3", pages) for pages in ("auto", "int8"))
    for runner in (plain, small):
        cache = runner._cache
        assert isinstance(cache, CpuCache)
        held = sum(part.nbytes for layer in cache.of_layer for part in cache._layer_pages(layer))
        needs = needs_of(runner._loaded.specs, runner._loaded.page_dtype)
        assert held == sum(
            (num + 1) * n.bytes_a_block for num, n in zip(cache.num_blocks, needs, strict=True)
        )
        assert held <= (16 << 20) + sum(need.bytes_a_block for need in needs)
    ratio = 64 * 4 / (64 + 4)  # a head of 64 numbers, and its peak
    specs = plain._loaded.specs
    sizes = [needs_of(specs, dtype)[0].bytes_a_block for dtype in (torch.float32, torch.int8)]
    assert sizes[0] / sizes[1] == pytest.approx(ratio)


@pytest.mark.parametrize("pages", ["auto", "int8"])
@pytest.mark.parametrize("is_sampled", [True, False])
def test_a_broken_row_fails_alone_and_leaves_nothing(
    tmp_path: Path, pages: KvCacheDtype, is_sampled: bool
) -> None:
    """Also where nothing of it is wanted, so that the last layer is not computed to its end."""
    runner = build(tmp_path, "qwen3", pages)
    blocks = Blocks(runner)
    tables, ids = blocks.tables(30), prompt_of(9, 30)
    good = runner.logits([RowInput(ids, 0, tables, GREEDY)])[0]
    embedding = runner._loaded.model.get_input_embeddings().weight
    assert 11 not in ids
    kept = embedding[11].clone()
    embedding[11] = float("nan")
    broken = RowInput([*ids[:5], 11, *ids[6:]], 0, tables, GREEDY, is_sampled=is_sampled)
    other = RowInput([n % 7 for n in range(20)], 0, blocks.tables(20), GREEDY, is_sampled=is_sampled)
    outputs = runner.step([other, broken])
    assert outputs[0].error is None
    assert outputs[1].error is not None
    for layer in runner._cache.of_layer:  # type: ignore[attr-defined]
        for part in runner._cache._layer_pages(layer):  # type: ignore[attr-defined]
            assert bool(torch.isfinite(part.float()).all())
    embedding[11] = kept
    assert torch.equal(runner.logits([RowInput(ids, 0, tables, GREEDY)])[0], good)


def test_a_model_whose_attention_is_latent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="--kv-cache-dtype int8: the CPU's kernels do not hold"):
        build(tmp_path, "deepseek_v3", "int8")


@pytest.fixture
def first_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cpu_library, "_libraries", {})
    monkeypatch.setattr(cpu_compile, "_loaded", {})
    monkeypatch.setattr(cpu_compile, "_running", {})


@pytest.mark.usefixtures("first_start")
def test_a_first_start_waits_for_the_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain pages would be served by torch meanwhile; these cannot be."""
    monkeypatch.setenv("PAGEBUS_COMPILE_WAIT_S", "0")
    assert isinstance(build(tmp_path, "qwen3", "int8")._cache, CpuCache)


@pytest.mark.usefixtures("first_start")
def test_without_a_compiler_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "")
    with pytest.raises(ModelError, match=r"--kv-cache-dtype fp8 needs .*g\+\+"):
        build(tmp_path, "qwen3", "fp8")
