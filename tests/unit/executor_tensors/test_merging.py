"""Linears that read the same tensor become one product, found by watching and not by name."""

import torch
from torch import nn

from pagebus.executor.linears import PackedLinear
from pagebus.executor.merging import LinearPart, Merged, find_siblings, merge


class Layer(nn.Module):
    """Two that share an input, one that reads another, one without a bias, one that is called elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 12)
        self.two = nn.Linear(8, 4)
        self.bare = nn.Linear(8, 6, bias=False)
        self.after = nn.Linear(12, 8)
        self.calls = 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        wide = self.one(inputs) * 2.0
        return self.after(wide) + self.two(inputs).sum(-1, keepdim=True) + self.bare(inputs).mean()


class Biased(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.bare = nn.Linear(8, 6)


def merged_model(kind: type[Layer]) -> tuple[nn.Module, torch.Tensor, torch.Tensor, list[list[str]]]:
    torch.manual_seed(3)
    model = nn.Sequential(kind(), kind()).requires_grad_(False)
    inputs = torch.randn(5, 8)
    wanted = model(inputs)
    groups = find_siblings(model, lambda: model(inputs))
    for group in groups:
        merge(group)
    return model, inputs, wanted, [group.names for group in groups]


def test_siblings_are_found_and_give_the_same() -> None:
    model, inputs, wanted, names = merged_model(Biased)
    assert names == [["one", "two", "bare"]] * 2
    torch.testing.assert_close(model(inputs), wanted)
    assert sum(isinstance(module, nn.Linear) for module in model.modules()) == 4  # the wide ones, and after
    assert {name for name, _ in model[0].named_parameters()} == {
        "after.weight", "after.bias", "merged_one_two_bare.inner.weight", "merged_one_two_bare.inner.bias",
    }  # fmt: skip


def test_one_without_a_bias_stays_by_itself() -> None:
    model, inputs, wanted, names = merged_model(Layer)
    assert names == [["one", "two"]] * 2
    torch.testing.assert_close(model(inputs), wanted)


def test_one_product_a_tensor_and_nothing_kept() -> None:
    model, _, _, _ = merged_model(Biased)
    merged = next(module for module in model.modules() if isinstance(module, Merged))
    parts = [module for module in model[0].modules() if isinstance(module, LinearPart)]
    calls: list[int] = []
    merged.inner.register_forward_hook(lambda *_: calls.append(1))
    first, second = torch.randn(3, 8), torch.randn(3, 8)
    for inputs in (first, second, first):
        for part in parts:
            part(inputs)
    assert len(calls) == 3
    assert merged._input is None
    parts[0](first)  # a pass that broke off in the middle
    torch.testing.assert_close(parts[1](second), merged.inner(second)[:, 12:16])


def test_packing_takes_the_wide_one() -> None:
    from pagebus.executor.invariant import make_row_invariant

    model, inputs, wanted, _ = merged_model(Biased)
    make_row_invariant(model)
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) in (0, 4)
    torch.testing.assert_close(model(inputs), wanted)
    assert model[0].one.weight.dtype == torch.float32
