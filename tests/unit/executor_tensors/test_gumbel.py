"""The noise is independent Gumbel noise, a function of key and id alone, the same in torch and in NumPy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pagebus.kernels.gumbel import GROUP, gumbel_noise, host_group_noise, host_gumbel_noise, noise_key

KEYS = torch.tensor([noise_key(5, 0, i) for i in range(20)])


def test_noise_is_gumbel() -> None:
    noise = gumbel_noise(KEYS, torch.arange(50_000)[None])
    assert torch.isfinite(noise).all()
    assert abs(noise.mean() - 0.5772) < 0.005
    assert abs(noise.var() - math.pi**2 / 6) < 0.01
    for quantile in (0.0001, 0.001, 0.1, 0.5, 0.9, 0.999, 0.9999):
        share = (noise < -math.log(-math.log(quantile))).double().mean()
        assert abs(share - quantile) < 4 * math.sqrt(quantile * (1 - quantile) / noise.numel())


def test_noise_within_a_group_is_independent() -> None:
    """A group's best noise, its place, and all others come from few hashes: nothing of that may be seen."""
    keys = torch.tensor([noise_key(9, 1, i) for i in range(40_000)])
    uniform = torch.exp(-torch.exp(-gumbel_noise(keys, torch.tensor([[0, 1, 63, 64]]))))
    cells = (uniform * 5).long().clamp(max=4)
    for first, second in ((0, 1), (0, 2), (1, 2), (2, 3), (0, 3)):
        counts = torch.bincount(cells[:, first] * 5 + cells[:, second], minlength=25).double()
        chi = ((counts - 1600) ** 2 / 1600).sum()
        assert 5 < chi < 60, chi  # 24 degrees of freedom
    # The least of the exponentials of several ids is exponential, of as many times the rate.
    ids = torch.tensor([[1, 2, 5, 40, 41, 80]])
    least = torch.exp(-gumbel_noise(keys, ids)).amin(-1) * ids.shape[1]
    for value in (0.01, 0.1, 0.7, 2.0, 5.0):
        share, expected = float((least < value).double().mean()), 1 - math.exp(-value)
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / len(keys))


def test_places_of_the_best_are_even() -> None:
    _, ids = host_group_noise(KEYS.numpy(), 2000)
    counts = np.bincount((ids % GROUP).reshape(-1), minlength=GROUP)
    chi = ((counts - 625) ** 2 / 625).sum()
    assert 25 < chi < 115  # 63 degrees of freedom


def test_host_and_device_agree() -> None:
    ids = torch.randint(200_000, (20, 3000))
    on_host = host_gumbel_noise(KEYS.numpy()[:, None], ids.numpy())
    assert np.allclose(on_host, gumbel_noise(KEYS, ids).numpy(), rtol=1e-13, atol=1e-13)


def test_a_group_has_no_better_noise_than_its_best() -> None:
    best, ids = host_group_noise(KEYS.numpy(), 500)
    noise = gumbel_noise(KEYS, torch.arange(500 * GROUP)[None]).numpy()
    assert np.array_equal(ids, noise.reshape(20, 500, GROUP).argmax(-1) + np.arange(500) * GROUP)
    assert np.allclose(best, noise.reshape(20, 500, GROUP).max(-1), rtol=1e-13, atol=1e-13)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(-(2**70), 2**70), choice=st.integers(0, 2**31), index=st.integers(0, 2**31))
def test_noise_does_not_depend_on_what_else_is_asked(seed: int, choice: int, index: int) -> None:
    key = noise_key(seed, choice, index)
    assert -(2**63) <= key < 2**63
    keys, ids = torch.tensor([3, key, 7]), torch.randint(300_000, (77,))
    together = gumbel_noise(keys, ids[None])[1]
    alone = torch.cat([gumbel_noise(torch.tensor([key]), id.view(1, 1))[0] for id in ids[:9]])
    assert together[:9].tolist() == pytest.approx(alone.tolist(), rel=1e-14)


def test_keys_are_functions_of_their_parts() -> None:
    parts = [(s, c, i) for s in (0, 1, -1, 2**63, 2**64 - 2) for c in (0, 1, 127) for i in (0, 1, 2**20)]
    assert len({noise_key(*part) for part in parts}) == len(parts)
