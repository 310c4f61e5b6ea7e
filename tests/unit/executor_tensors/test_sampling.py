"""Drawn ids follow the exact probabilities, and depend on nothing but their own row."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pagebus.bus.messages import Sampling
from pagebus.executor.sampling import Draw, sample, thresholds
from pagebus.kernels.gumbel import gumbel_noise, noise_key

GREEDY = Sampling(temperature=0)


def probabilities(logits: list[float], sampling: Sampling) -> list[float]:
    """What a draw's distribution must be, written out: temperature, top-k, top-p, min-p."""
    weights = [math.exp((x - max(logits)) / sampling.temperature) for x in logits]
    kept = sorted(range(len(weights)), key=lambda i: -weights[i])
    if sampling.top_k:
        kept = kept[: sampling.top_k]
    total, held, nucleus = sum(weights[i] for i in kept), 0.0, []
    for i in kept:
        if held >= sampling.top_p * total and sampling.top_p < 1:
            break
        nucleus.append(i)
        held += weights[i]
    nucleus = nucleus or kept[:1]
    kept = [i for i in nucleus if weights[i] >= sampling.min_p * max(weights)]
    total = sum(weights[i] for i in kept)
    chosen = set(kept)
    return [weights[i] / total if i in chosen else 0.0 for i in range(len(weights))]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.5),
        Sampling(temperature=2.5),
        Sampling(top_k=4),
        Sampling(top_p=0.8),
        Sampling(min_p=0.15),
        Sampling(temperature=1.7, top_k=8, top_p=0.85, min_p=0.05),
        Sampling(top_k=1000),
    ],
    ids=str,
)
def test_chi_square(sampling: Sampling) -> None:
    torch.manual_seed(3)
    logits = torch.randn(12) * 1.5
    num_draws = 20_000
    expected = torch.tensor(probabilities(logits.tolist(), sampling))
    draws = [Draw(sampling, choice=i % 7, index=i) for i in range(num_draws)]
    counts = torch.bincount(sample(logits.expand(num_draws, -1), draws), minlength=12).double()
    assert counts[expected == 0].sum() == 0
    used = expected > 0
    chi = ((counts - num_draws * expected)[used] ** 2 / (num_draws * expected[used])).sum()
    freedom = int(used.sum()) - 1
    assert chi < freedom + 5 * math.sqrt(2 * max(freedom, 1)) + 5, (chi, freedom)


def test_neighbouring_counters_are_independent() -> None:
    """Pairs of draws at consecutive indexes, choices and seeds fall evenly over all pairs."""
    flat = torch.zeros(6000, 5)
    first = sample(flat, [Draw(Sampling(seed=1), 0, i) for i in range(6000)])
    for other in (
        [Draw(Sampling(seed=1), 0, i + 1) for i in range(6000)],
        [Draw(Sampling(seed=1), 1, i) for i in range(6000)],
        [Draw(Sampling(seed=2), 0, i) for i in range(6000)],
    ):
        pairs = torch.bincount(first * 5 + sample(flat, other), minlength=25).double()
        chi = ((pairs - 240) ** 2 / 240).sum()
        assert 5 < chi < 60, chi  # 24 degrees of freedom


def test_noise_is_gumbel() -> None:
    noise = gumbel_noise(torch.tensor([noise_key(5, 0, i) for i in range(20)]), torch.arange(50_000))
    assert torch.isfinite(noise).all()
    assert abs(noise.mean() - 0.5772) < 0.005
    assert abs(noise.var() - math.pi**2 / 6) < 0.01
    for quantile in (0.001, 0.1, 0.5, 0.9, 0.999):
        share = (noise < -math.log(-math.log(quantile))).double().mean()
        assert abs(share - quantile) < 4 * math.sqrt(quantile * (1 - quantile) / noise.numel())


def test_keys_are_functions_of_their_parts() -> None:
    parts = [(s, c, i) for s in (0, 1, -1, 2**63, 2**64 - 2) for c in (0, 1, 127) for i in (0, 1, 2**20)]
    keys = {noise_key(*part) for part in parts}
    assert len(keys) == len(parts)
    assert all(-(2**63) <= key < 2**63 for key in keys)


sampling_strategy = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 1e-6, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 2, 50, 1023, 1024, 1025, 3000, 10**9]),
    top_p=st.sampled_from([1.0, 0.999999, 0.9, 0.3, 0.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    seed=st.integers(0, 2**64 - 1),
)


@settings(max_examples=60, deadline=None)
@given(
    samplings=st.lists(sampling_strategy, min_size=1, max_size=6),
    size=st.sampled_from([3, 500, 1024, 1025, 2500]),
    seed=st.integers(0, 1000),
    is_coarse=st.booleans(),
)
def test_a_row_draws_the_same_alone_and_in_any_place(
    samplings: list[Sampling], size: int, seed: int, is_coarse: bool
) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(len(samplings), size) * 3
    if is_coarse:  # many ties, as bfloat16 makes them
        logits = logits.round()
    draws = [Draw(sampling, i, i) for i, sampling in enumerate(samplings)]
    together = sample(logits, draws).tolist()
    assert together == [int(sample(logits[i : i + 1], [draws[i]])) for i in range(len(draws))]
    assert together[::-1] == sample(logits.flip(0), draws[::-1]).tolist()
    for i, sampling in enumerate(samplings):
        if sampling.temperature == 0 or sampling.top_k == 1 or sampling.top_p == 0 or sampling.min_p == 1:
            assert logits[i, together[i]] == logits[i].max()


@settings(max_examples=60, deadline=None)
@given(sampling=sampling_strategy, seed=st.integers(0, 1000), scale=st.sampled_from([0.1, 1.0, 4.0]))
def test_thresholds_keep_what_the_filters_keep(sampling: Sampling, seed: int, scale: float) -> None:
    torch.manual_seed(seed)
    scores = (torch.randn(2100) * scale).double()
    scores -= scores.max()
    sampling = Sampling(top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p)
    limit = thresholds(scores.float()[None], [sampling])[0]
    expected = torch.tensor(probabilities(scores.tolist(), sampling)) > 0
    differing = (scores.float() >= limit) != expected
    assert scores.exp()[differing].sum() <= 1e-5 * scores.exp().sum()  # rounding at the nucleus's edge
    assert sampling.top_p < 1 or not differing.any()


def test_greedy_takes_the_first_of_equals() -> None:
    logits = torch.zeros(2, 400)
    logits[0, 30] = logits[0, 300] = 1
    assert sample(logits, [Draw(GREEDY, 0, 0)] * 2).tolist() == [30, 0]


def test_large_vocabulary_with_a_flat_nucleus() -> None:
    """A nucleus beyond the largest 1,024 logits."""
    logits = torch.zeros(3, 40_000)
    logits[:, 7] = 1.0
    draws = [Draw(Sampling(top_p=0.9999, seed=s), 0, s) for s in range(3)]
    ids = sample(logits, draws).tolist()
    assert ids == [int(sample(logits[:1], [draw])) for draw in draws]
    assert len(set(ids)) == 3
