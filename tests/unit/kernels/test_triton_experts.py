"""Experts as grouped products: right for any choice, the same bits in any batch (interpreted)."""

import pytest

pytest.importorskip("triton")

import torch

from pagebus.executor.attention import register
from pagebus.executor.experts import are_experts
from pagebus.executor.gpu_experts import GroupedExperts, group_experts
from pagebus.kernels.jit import IS_INTERPRETED
from pagebus.kernels.triton_experts import reference_experts, triton_combine, triton_grouped_linear
from tests.support.kernel_checks import poison_empty
from tests.support.models import TINY, random_model

pytestmark = pytest.mark.skipif(not IS_INTERPRETED, reason="needs TRITON_INTERPRET=1 before triton's import")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("rows", "chosen", "experts", "num_in", "num_out"),
    [(1, 2, 5, 20, 33), (50, 3, 4, 70, 40), (40, 1, 9, 16, 16)],
)
@pytest.mark.parametrize("is_turned", [False, True])
def test_grouped_linear(monkeypatch, dtype, rows, chosen, experts, num_in, num_out, is_turned) -> None:
    """Some experts have no rows, the last one has none ever."""
    poison_empty(monkeypatch)
    inputs = torch.randn(rows, num_in).to(dtype)
    shape = (experts, num_in, num_out) if is_turned else (experts, num_out, num_in)
    weight = torch.randn(shape).to(dtype)
    weight = weight.transpose(1, 2) if is_turned else weight
    bias = torch.randn(experts, num_out).to(dtype) if is_turned else None
    choice = torch.stack([torch.randperm(experts - 1)[:chosen] for _ in range(rows)])
    weights = torch.rand(rows, chosen)
    order = choice.reshape(-1).argsort(stable=True)
    offsets = torch.searchsorted(choice.reshape(-1)[order], torch.arange(experts + 1)).int()
    made = triton_grouped_linear(inputs, order // chosen, weight, bias, offsets)
    out = triton_combine(made, order.argsort().view(rows, chosen), weights)
    expected = reference_experts(inputs, choice, weights, weight, bias)
    close = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(out.double(), expected, atol=close, rtol=close)


def test_no_rows_and_wrong_sizes() -> None:
    weight, offsets = torch.zeros(3, 4, 5), torch.zeros(4, dtype=torch.int32)
    assert triton_grouped_linear(torch.zeros(0, 5), None, weight, None, offsets).shape == (0, 4)
    with pytest.raises(ValueError, match="offsets for"):
        triton_grouped_linear(torch.zeros(2, 6), None, weight, None, offsets)
    with pytest.raises(ValueError, match="offsets for"):
        triton_grouped_linear(torch.zeros(2, 5), None, weight, None, offsets[:2])


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_a_layers_experts_are_its_own(kind) -> None:
    register()
    model = random_model(TINY[kind]()).requires_grad_(False).eval()
    own = [module for module in model.modules() if are_experts(module)]
    hidden = torch.randn(19, 32)
    num_experts = own[0].get_parameter("gate_up_proj").shape[0]
    choice = torch.stack([torch.randperm(num_experts)[:2] for _ in range(19)])
    weights = torch.rand(19, 2)
    with torch.inference_mode():
        wanted = own[0](hidden, choice, weights)
        assert group_experts(model) == len(own)
        assert group_experts(model) == 0, "once"
        grouped = next(module for module in model.modules() if isinstance(module, GroupedExperts))
        found = grouped(hidden, choice, weights)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
        for first, count in ((0, 1), (18, 1), (4, 3), (1, 17)):
            part = slice(first, first + count)
            assert torch.equal(grouped(hidden[part], choice[part], weights[part]), found[part])
