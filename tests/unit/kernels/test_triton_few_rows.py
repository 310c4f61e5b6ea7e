"""Products of few rows against float64, in the interpreter: odd sizes, both ways, gated or not."""

import pytest
import torch

pytest.importorskip("triton")

from pagebus.kernels.jit import IS_INTERPRETED
from pagebus.kernels.triton_few_rows import FewRowsConfig, triton_few_rows
from pagebus.kernels.triton_gated import reference_gated
from tests.support.kernel_checks import poison_empty

pytestmark = pytest.mark.skipif(not IS_INTERPRETED, reason="needs TRITON_INTERPRET=1 before triton's import")

SMALL = FewRowsConfig(4, 64, 4, 1), FewRowsConfig(16, 32, 4, 2)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_empty(monkeypatch)


@pytest.mark.parametrize("num_rows", [1, 2, 5, 16])
@pytest.mark.parametrize(("num_in", "num_out"), [(64, 32), (100, 37), (128, 50)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_products(num_rows: int, num_in: int, num_out: int, dtype: torch.dtype) -> None:
    inputs = torch.randn(num_rows, num_in + 8).to(dtype)[:, :num_in]
    weight = (torch.randn(num_out, num_in) / num_in**0.5).to(dtype)
    room = 1e-5 if dtype == torch.float32 else 5e-3
    for bias in (None, torch.randn(num_out).to(dtype)):
        expected = inputs.double() @ weight.double().t() + (0 if bias is None else bias.double())
        found = triton_few_rows(inputs, weight, bias, SMALL[num_rows > 1])
        torch.testing.assert_close(found.double(), expected, atol=room, rtol=room)


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_products(num_rows: int, activation: str) -> None:
    inputs, weight = torch.randn(num_rows, 100), torch.randn(2 * 37, 100) / 10
    expected = reference_gated(inputs.double() @ weight.double().t(), activation)  # type: ignore[arg-type]
    found = triton_few_rows(inputs, weight, None, SMALL[num_rows > 1], activation)  # type: ignore[arg-type]
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="for few rows"):
        triton_few_rows(torch.zeros(17, 4), torch.zeros(4, 4), None, SMALL[1])
    with pytest.raises(ValueError, match="with a bias"):
        triton_few_rows(torch.zeros(1, 4), torch.zeros(4, 4), torch.zeros(2), SMALL[0], "silu")
