"""What is found through the maxima of blocks is what sorting everything finds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pagebus.executor.scan import greedy, largest, largest_values, num_at_least, scan


def some_logits(num_rows: int, size: int, seed: int, kind: str) -> torch.Tensor:
    torch.manual_seed(seed)
    logits = torch.randn(num_rows, size) * 3
    if kind == "coarse":  # many ties, as bfloat16 makes them
        return logits.round()
    if kind == "equal":
        return torch.zeros(num_rows, size)
    if kind == "masked":
        return logits.masked_fill(torch.rand(num_rows, size) < 0.9, float("-inf"))
    return logits


@settings(max_examples=80, deadline=None)
@given(
    num_rows=st.integers(1, 5),
    size=st.sampled_from([1, 2, 63, 64, 65, 500, 1000, 9000]),
    seed=st.integers(0, 1000),
    kind=st.sampled_from(["fine", "coarse", "equal", "masked"]),
    num=st.sampled_from([1, 2, 5, 20, 128, 300, 10_000]),
)
def test_against_a_stable_sort(num_rows: int, size: int, seed: int, kind: str, num: int) -> None:
    logits = some_logits(num_rows, size, seed, kind)
    ordered = logits.sort(dim=-1, descending=True, stable=True)
    scanned = scan(logits)
    assert torch.equal(scanned.tops, ordered.values[:, 0])
    assert torch.equal(greedy(scanned), ordered.indices[:, 0])
    assert torch.equal(largest(scanned, num), ordered.indices[:, :num])
    assert torch.equal(largest_values(scanned, num), ordered.values[:, :num])
    limits = ordered.values[:, min(num, size) - 1]
    assert torch.equal(num_at_least(scanned, limits), (logits >= limits[:, None]).sum(-1))
    places = list(range(num_rows))[::-2]
    assert torch.equal(largest(scanned.some(places), num), ordered.indices[places, :num])


def test_zeros_of_both_signs_are_equal() -> None:
    logits = torch.full((1, 200), -1.0)
    logits[0, [150, 70, 3]] = torch.tensor([0.0, -0.0, 0.0])
    assert largest(scan(logits), 3).tolist() == [[3, 70, 150]]
    assert greedy(scan(logits)).tolist() == [3]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 70, 129])
def test_values_that_are_not_finite_show(value: float, place: int) -> None:
    logits = torch.zeros(2, 130)
    logits[1, place] = value
    assert torch.isfinite(scan(logits).tops).tolist() == [True, False]
