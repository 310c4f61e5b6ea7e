"""Rows and linears in fp8: what is stored, the product of it, and models near their own (interpreted)."""

import pytest

pytest.importorskip("triton")

import torch

from pagebus.executor.attention import register
from pagebus.executor.gpu_linears import Fp8Linear, quantize_linears
from pagebus.executor.merging import find_siblings, merge
from pagebus.kernels import fp8
from pagebus.kernels.jit import IS_INTERPRETED
from pagebus.kernels.triton_fp8 import fp8_linear, reference_fp8_linear, triton_quantize
from tests.support.kernel_checks import poison_empty
from tests.support.models import TINY, random_model

pytestmark = pytest.mark.skipif(not IS_INTERPRETED, reason="needs TRITON_INTERPRET=1 before triton's import")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "dim"), [(1, 16), (5, 100), (3, 5000), (0, 32)])
def test_rows_are_stored_as_torch_stores_them(monkeypatch, dtype, rows, dim) -> None:
    poison_empty(monkeypatch)
    values = (torch.randn(rows, dim + 3) * 10.0 ** torch.randint(-4, 4, (rows, 1))).to(dtype)[:, :dim]
    if rows > 1:
        values[1] = 0.0
    stored, peaks = triton_quantize(values)
    wanted, wanted_peaks = fp8.quantize(values)
    assert torch.equal(peaks, wanted_peaks)
    assert torch.equal(stored.float(), wanted.float())
    assert not rows or float(stored.float().abs().max()) == fp8.MOST
    error = (fp8.dequantize(stored, peaks) - values.float()).abs()
    assert (error <= values.float().abs() / 16 * 1.01 + peaks[:, None] / 448 / 1024 * 1.01).all()


def test_what_is_not_finite_shows() -> None:
    values = torch.ones(2, 40)
    values[1, 7] = float("nan")
    stored, peaks = triton_quantize(values)
    assert torch.isfinite(fp8.dequantize(stored[:1], peaks[:1])).all()
    assert not torch.isfinite(fp8.dequantize(stored[1:], peaks[1:])).all()


@pytest.mark.parametrize("is_fixed", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear(is_fixed, has_bias) -> None:
    weight, inputs = torch.randn(48, 80), torch.randn(2, 9, 80) * 3
    bias = torch.randn(48) if has_bias else None
    out = Fp8Linear(weight, bias, is_fixed=is_fixed)(inputs)
    assert out.shape == (2, 9, 48)
    stored = fp8.quantize(inputs.view(18, 80)), fp8.quantize(weight)
    expected = reference_fp8_linear(*stored[0], *stored[1], bias)
    torch.testing.assert_close(out.view(18, 48).double(), expected, atol=1e-4, rtol=1e-4)
    exact = torch.nn.functional.linear(inputs, weight, bias)
    assert float((out - exact).std() / exact.std()) < 0.06


def test_a_fixed_linear_does_not_see_the_batch() -> None:
    linear, inputs = Fp8Linear(torch.randn(32, 64), is_fixed=True), torch.randn(70, 64)
    whole = linear(inputs)
    for first, count in ((0, 1), (69, 1), (30, 17)):
        assert torch.equal(linear(inputs[first : first + count]), whole[first : first + count])


def test_the_plain_product_is_the_reference() -> None:
    """Without a GPU, in the inputs' type."""
    inputs, (weight, peaks) = torch.randn(3, 32).half(), fp8.quantize(torch.randn(16, 32))
    out = fp8_linear(inputs, weight, peaks)
    assert out.dtype == torch.float16
    expected = reference_fp8_linear(*fp8.quantize(inputs), weight, peaks)
    torch.testing.assert_close(out.double(), expected, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_model_with_merged_linears_stays_near(kind) -> None:
    register()
    model = random_model(TINY[kind]()).requires_grad_(False).eval()
    ids = torch.arange(9)[None]

    def run() -> torch.Tensor:
        with torch.inference_mode():
            return model(input_ids=ids, use_cache=False).logits[0]

    wanted = run()
    for group in find_siblings(model, run):
        merge(group)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert quantize_linears(model, model.get_output_embeddings()) == 2 * 4, "qkv, out, gate and up, down"
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    assert tied == (model.get_input_embeddings().weight is model.get_output_embeddings().weight)
    alike = torch.nn.functional.cosine_similarity(run(), wanted, dim=-1)
    assert (alike > 0.97).all(), alike
    stored = [module.stored for module in model.modules() if isinstance(module, Fp8Linear)]
    assert all(weight.element_size() == 1 for weight in stored)
