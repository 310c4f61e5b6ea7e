"""Lengths have the paper's means, stay within the limit, and come again with their seed."""

import numpy as np
import pytest

from pagebus.bench.paper_lengths import (
    ALPACA,
    MAX_LEN,
    SHAREGPT,
    Distribution,
    draw_lengths,
    to_requests,
    unit_gaps,
)


@pytest.mark.parametrize("distribution", [SHAREGPT, ALPACA], ids=lambda d: d.name)
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_requests", [50, 700])
def test_means_are_the_papers(distribution: Distribution, seed: int, num_requests: int) -> None:
    lengths = draw_lengths(distribution, num_requests, seed)
    assert lengths.prompts.mean() == pytest.approx(distribution.mean_prompt, rel=0.01)
    assert lengths.outputs.mean() == pytest.approx(distribution.mean_output, rel=0.01)
    assert lengths.prompts.min() >= 1
    assert lengths.outputs.min() >= 1
    assert (lengths.prompts + lengths.outputs).max() <= MAX_LEN


def test_lengths_are_spread_as_the_paper_needs() -> None:
    lengths = draw_lengths(SHAREGPT, 4000, 0)
    # From the paper's figure 2, Orca (Max): 33.7 % of 7 x 2,048 slots of 15.7 K is what running requests will
    # write in all, 757 each; seen at a random moment, a request's length is weighted by how long it runs.
    total = lengths.prompts + lengths.outputs
    weighted = (total * lengths.outputs).sum() / lengths.outputs.sum()
    assert weighted == pytest.approx(757, rel=0.06)


def test_a_seed_gives_the_same_again_and_another_does_not() -> None:
    first, again, other = (draw_lengths(ALPACA, 100, seed) for seed in (3, 3, 4))
    assert (first.prompts == again.prompts).all()
    assert (first.outputs == again.outputs).all()
    assert (first.outputs != other.outputs).any()
    assert (unit_gaps(100, 3) == unit_gaps(100, 3)).all()
    assert (unit_gaps(100, 3) != unit_gaps(100, 4)).any()


def test_more_requests_begin_with_nearly_the_same() -> None:
    few, many = draw_lengths(SHAREGPT, 100, 0), draw_lengths(SHAREGPT, 1000, 0)
    assert np.corrcoef(few.prompts, many.prompts[:100])[0, 1] > 0.99
    assert np.corrcoef(few.outputs, many.outputs[:100])[0, 1] > 0.99


def test_arrivals_begin_at_zero_in_order_at_one_a_second() -> None:
    arrivals_s = unit_gaps(5000, 1)
    assert arrivals_s[0] == 0.0
    assert (np.diff(arrivals_s) > 0).all()
    assert arrivals_s[-1] == pytest.approx(5000, rel=0.05)


def test_requests_carry_lengths_and_times() -> None:
    lengths = draw_lengths(ALPACA, 3, 0)
    requests = to_requests(lengths, np.array([0.0, 0.5, 2.0]))
    assert [request.arrival_s for request in requests] == [0.0, 0.5, 2.0]
    assert [request.num_prompt for request in requests] == lengths.prompts.tolist()
    assert [request.outputs for request in requests] == [(output,) for output in lengths.outputs.tolist()]
