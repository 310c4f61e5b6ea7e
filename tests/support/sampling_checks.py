"""Inputs and comparisons for the sampling kernels; the interpreter's tests and the GPU's use the same."""

import math

import torch

from pagebus.kernels.gumbel import noise_key
from pagebus.kernels.triton_filters import reference_limits, triton_limits
from pagebus.kernels.triton_penalties import reference_penalize, triton_penalize
from pagebus.kernels.triton_sampling import noise_prefix, reference_sums, triton_sample, triton_scan


def check_scan(logits: torch.Tensor) -> None:
    scanned = triton_scan(logits)
    values = logits.float()
    assert torch.equal(scanned.tops, values.amax(-1))
    assert torch.equal(scanned.ids, values.argmax(-1))
    expected = values.double().logsumexp(-1) - values.amax(-1)
    torch.testing.assert_close(scanned.log_sums.double(), expected, atol=2e-6, rtol=2e-6)


def check_draws(
    logits: torch.Tensor, temperatures: list[float], limits: list[float], seed: int
) -> torch.Tensor:
    """Ids are the argmax of the reference's sums, or within rounding of it; log-probabilities are theirs."""
    device, rows = logits.device, range(len(logits))
    heat = torch.tensor(temperatures, device=device)
    least = torch.tensor(limits, device=device)
    prefixes = torch.tensor([noise_prefix(seed, row) for row in rows], device=device)
    indices = torch.tensor([row * 3 for row in rows], device=device)
    keys = torch.tensor([noise_key(seed, row, row * 3) for row in rows], device=device)
    ids, logprobs = triton_sample(logits, triton_scan(logits), heat, least, prefixes, indices)
    sums = reference_sums(logits, torch.where(heat > 0, heat, 1.0), least, keys)
    wanted = torch.where(heat > 0, sums.argmax(-1), logits.float().argmax(-1))
    for row in rows:
        if ids[row] != wanted[row]:
            assert heat[row] > 0
            assert sums[row, wanted[row]] - sums[row, ids[row]] < 1e-12
    expected = logits.double().log_softmax(-1).gather(1, ids[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), expected, atol=1e-5, rtol=1e-5)
    return ids


def check_limits(
    logits: torch.Tensor, temperatures: list[float], top_k: list[int], top_p: list[float], min_p: list[float]
) -> None:
    """Top-k and min-p exact; top-p within rounding of the masses: the share is reached, not earlier."""
    device = logits.device
    heat, ks = (
        torch.tensor(temperatures, device=device),
        torch.tensor(top_k, dtype=torch.int32, device=device),
    )
    ps = torch.tensor(top_p, dtype=torch.float64, device=device)
    least = torch.tensor([math.log(p) if p > 0 else -math.inf for p in min_p], device=device)
    found = triton_limits(logits, triton_scan(logits).tops, heat, least, ks, ps)
    expected = reference_limits(logits, heat, least, ks, ps)
    without_p = reference_limits(logits, heat, least, ks, torch.ones_like(ps))
    for row in range(len(logits)):
        if found[row] == expected[row]:
            continue
        assert heat[row] > 0 and ps[row] < 1, (row, found[row], expected[row])  # noqa: PT018
        values = logits[row].float()
        scores = (values - values.max()) / heat[row]
        assert found[row] in scores
        masses = scores.double().exp() * (scores >= without_p[row])
        share = ps[row] * masses.sum()
        assert masses[scores >= found[row]].sum() >= share * (1 - 1e-6)
        assert masses[scores > found[row]].sum() <= share * (1 + 1e-6)


def check_penalties(num_rows: int, vocabulary: int, seed: int, device: str = "cpu") -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, vocabulary + 5, generator=generator)[:, :vocabulary]
    lists = [torch.randperm(vocabulary + 4, generator=generator)[: 7 * row] - 2 for row in range(num_rows)]
    offsets = torch.tensor([0, *(len(ids) for ids in lists)]).cumsum(0).int()
    ids = torch.cat(lists).int()
    biases = torch.where(
        torch.rand(len(ids), generator=generator) < 0.5, 0.0, torch.randn(len(ids), generator=generator)
    )
    biases[::11] = -math.inf
    counts = torch.randint(0, 4, (len(ids),), generator=generator).int()
    is_seen = ((counts > 0) | (torch.rand(len(ids), generator=generator) < 0.3)).to(torch.int8)
    of_rows = [torch.rand(num_rows, generator=generator) * 2 + low for low in (0.5, -1.0, -1.0)]
    of_rows[0][::3] = 1.0
    arguments = [part.to(device) for part in (offsets, ids, biases, counts, is_seen, *of_rows)]
    logits = logits.to(device)
    expected = reference_penalize(logits, *arguments)
    triton_penalize(logits, *arguments)
    torch.testing.assert_close(logits.double(), expected, atol=1e-5, rtol=1e-5)
