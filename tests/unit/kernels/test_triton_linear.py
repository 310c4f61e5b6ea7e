"""The linear of one cut: a row's bits do not depend on its batch, in whole models too (interpreted)."""

import random
from pathlib import Path

import pytest

pytest.importorskip("triton")

import torch

from pagebus.executor import loader, model_runner
from pagebus.executor.gpu_linears import FixedHeadLinears, FixedLinear, make_batch_invariant
from pagebus.executor.latent import HeadLinears
from pagebus.executor.loader import load_model
from pagebus.executor.model_runner import ModelRunner
from pagebus.kernels.jit import IS_INTERPRETED
from pagebus.kernels.triton_linear import reference_linear, triton_linear
from tests.support.kernel_checks import poison_empty
from tests.support.models import make_tiny
from tests.support.rows import Blocks, Row

pytestmark = pytest.mark.skipif(not IS_INTERPRETED, reason="needs TRITON_INTERPRET=1 before triton's import")
CLOSE = {torch.float32: 2e-5, torch.float16: 2e-2}


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize(
    ("rows", "num_in", "num_out"), [(1, 64, 33), (70, 100, 130), (33, 31, 1), (300, 17, 40), (0, 8, 8)]
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear(monkeypatch, dtype, rows, num_in, num_out, has_bias) -> None:
    poison_empty(monkeypatch)
    inputs = torch.randn(rows, num_in + 3).to(dtype)[:, :num_in]
    weight = torch.randn(num_out, num_in).to(dtype)
    bias = torch.randn(num_out).to(dtype) if has_bias else None
    out = triton_linear(inputs, weight, bias)
    assert out.dtype == dtype
    expected = reference_linear(inputs, weight, bias)
    torch.testing.assert_close(out.double(), expected, atol=CLOSE[dtype] * 4, rtol=CLOSE[dtype])


def test_linear_of_heads_and_of_a_turned_weight(monkeypatch) -> None:
    poison_empty(monkeypatch)
    weight = torch.randn(3, 20, 37)  # [heads, in, out]
    inputs = torch.randn(3, 5, 20)
    own, fixed = HeadLinears(weight.clone()), FixedHeadLinears(weight)
    torch.testing.assert_close(fixed(inputs), own(inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "weight"), [((3, 4), (5, 6)), ((2, 3, 4), (5, 4)), ((2, 3, 4), (3, 5, 4)), ((4,), (5, 4))]
)
def test_other_shapes_are_refused(inputs, weight) -> None:
    with pytest.raises(ValueError, match="of"):
        triton_linear(torch.zeros(inputs), torch.zeros(weight))


@pytest.mark.parametrize("dtype", list(CLOSE))
def test_a_row_has_the_same_bits_among_any_others(dtype) -> None:
    linear = FixedLinear(torch.randn(70, 90).to(dtype), torch.randn(70).to(dtype))
    inputs = torch.randn(150, 90).to(dtype)
    whole = linear(inputs)
    for first, count in ((0, 1), (149, 1), (31, 3), (60, 17), (3, 64), (20, 129)):
        assert torch.equal(linear(inputs[first : first + count]), whole[first : first + count])


@pytest.fixture
def invariant_runner(monkeypatch: pytest.MonkeyPatch):
    from pagebus.executor.triton_cache import TritonCache

    def make(path: Path) -> ModelRunner:
        def cache(loaded, num_blocks, _pulse) -> TritonCache:
            return TritonCache(
                loaded.specs, num_blocks, loaded.page_dtype, loaded.device, is_batch_invariant=True
            )

        monkeypatch.setattr(model_runner, "make_cache", cache)
        monkeypatch.setattr(loader, "make_row_invariant", lambda model: [])
        loaded = load_model(path, dtype="float32")
        loader._fuse(path, loaded.model, loaded.device)
        assert make_batch_invariant(loaded.model)["linear"] > 2 * 2
        assert not [name for name, module in loaded.model.named_modules() if type(module) is torch.nn.Linear]
        return ModelRunner(loaded, [80] * len({spec.window for spec in loaded.specs}))

    return make


def test_a_rows_logits_are_the_same_alone_and_in_batches(tmp_path, invariant_runner) -> None:
    """Decoding in batches of 1, 3 and 17, beside prompts, and as part of a prompt: all bits."""
    runner = invariant_runner(make_tiny("llama", tmp_path / "model"))
    rng = random.Random(4)
    blocks = Blocks(runner)

    def ids(count: int) -> list[int]:
        return [rng.randrange(60) for _ in range(count)]

    rows = [Row(ids(2), blocks.tables(16), 1) for _ in range(17)]
    given = [row.input(1) for row in rows]
    runner.step(given)
    for row, of_row in zip(rows, given, strict=True):
        row.take(of_row, None)
    decoding = [row.input(1) for row in rows]
    together = runner.logits(decoding)
    alone = runner.logits(decoding[5:6])[0]
    assert torch.equal(together[5], alone)
    assert torch.equal(runner.logits(decoding[4:7])[1], alone)
    others = [Row(prompt, blocks.tables(32), 1).input(len(prompt)) for prompt in (ids(19), ids(3))]
    assert torch.equal(runner.logits([others[0], decoding[5], others[1]])[1], alone)
    whole = Row(rows[5].prompt, blocks.tables(16), 1).input(2)
    assert torch.equal(runner.logits([whole, others[1]])[0], alone)
