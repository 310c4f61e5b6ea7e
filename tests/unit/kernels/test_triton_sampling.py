"""The sampling kernels against sorting and float64 noise, in Triton's interpreter."""

import math

import pytest

pytest.importorskip("triton")

import torch

from pagebus.kernels import gumbel, triton_sampling
from pagebus.kernels.gumbel import noise_key
from pagebus.kernels.jit import IS_INTERPRETED, kernel, tl
from pagebus.kernels.triton_sampling import noise_prefix, triton_sample, triton_scan
from tests.support.kernel_checks import poison_empty
from tests.support.sampling_checks import check_draws, check_limits, check_penalties, check_scan

pytestmark = pytest.mark.skipif(
    not IS_INTERPRETED, reason="triton was imported before TRITON_INTERPRET was set"
)

_mixed, _key, _exponential = triton_sampling._mixed, triton_sampling._key, triton_sampling._exponential
_GOLDEN, _GROUPS_KEY = triton_sampling._GOLDEN, triton_sampling._GROUPS_KEY


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    poison_empty(monkeypatch)


@kernel
def _bits(prefixes, indices, counters, keys, bits, exponentials, SIZE: tl.constexpr):
    row, at = tl.program_id(0), tl.arange(0, SIZE)
    key = _key(prefixes, indices, row)
    tl.store(keys + row, key.to(tl.int64))
    mixed = _mixed(tl.load(counters + at).to(tl.uint64) * _GOLDEN + (key ^ _GROUPS_KEY))
    tl.store(bits + row * SIZE + at, mixed.to(tl.int64))
    tl.store(exponentials + row * SIZE + at, _exponential(mixed))


def test_the_noise_has_the_same_integers_as_everywhere() -> None:
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 12345678901234567890, 7]
    indices = torch.tensor([0, 1, 5, 2**31, 2**40, 99, 100_000])
    counters = torch.tensor([0, 1, 63, 64, 151_935, 2**31 - 1, 2**40, 5])
    prefixes = torch.tensor([noise_prefix(seed, n) for n, seed in enumerate(seeds)])
    keys = torch.empty(len(seeds), dtype=torch.int64)
    bits = torch.empty(len(seeds), len(counters), dtype=torch.int64)
    exponentials = torch.empty(bits.shape, dtype=torch.float64)
    _bits[(len(seeds),)](prefixes, indices, counters, keys, bits, exponentials, SIZE=len(counters))
    assert keys.tolist() == [noise_key(s, n, int(indices[n])) for n, s in enumerate(seeds)]
    wanted = gumbel._hash(keys ^ gumbel._GROUPS_KEY, counters[None])
    assert torch.equal(bits, wanted)
    expected = -torch.log1p(-gumbel._uniform(wanted))
    torch.testing.assert_close(exponentials, expected, atol=0, rtol=1e-15)


@pytest.mark.parametrize("vocabulary", [1, 63, 1000, 4096, 4097, 9001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scan(vocabulary, dtype) -> None:
    check_scan((torch.randn(3, vocabulary + 1) * 4).to(dtype)[:, :vocabulary])


def test_equal_logits_give_the_lowest_id() -> None:
    logits = torch.zeros(2, 5000)
    logits[1, [4999, 4097]] = 1.0
    check_scan(logits)


@pytest.mark.parametrize("vocabulary", [1, 63, 130, 5001])
@pytest.mark.parametrize("spread", [0.0, 1.0, 10.0])
def test_draws(vocabulary, spread) -> None:
    seed = int(torch.randint(0, 2**62, ()))
    logits = (torch.randn(4, vocabulary + 3) * spread)[:, :vocabulary]
    check_draws(logits, [0.7, 0.0, 1.0, 2.5], [-math.inf, -1.0, -2.0, 0.0], seed)


def test_draws_do_not_depend_on_the_batch() -> None:
    logits = torch.randn(5, 300)
    heat, least = torch.full((5,), 1.3), torch.full((5,), -math.inf)
    prefixes, indices = torch.arange(5) * 77 - 100, torch.arange(5)

    def of(rows):
        part = logits[rows]
        return triton_sample(part, triton_scan(part), heat[rows], least[rows], prefixes[rows], indices[rows])

    together = of(slice(0, 5))
    for row in range(5):
        alone = of(slice(row, row + 1))
        assert torch.equal(alone[0], together[0][row : row + 1])
        assert torch.equal(alone[1], together[1][row : row + 1])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_has_no_id_and_harms_no_other(bad, temperature) -> None:
    logits = torch.randn(2, 100)
    logits[0, 3] = bad
    if bad == -math.inf:
        logits[0] = bad
    ids, logprobs = triton_sample(
        logits, triton_scan(logits), torch.full((2,), temperature), torch.full((2,), -math.inf),
        torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64),
    )  # fmt: skip
    assert ids[0] == -1
    assert logprobs[0].isnan()
    assert 0 <= ids[1] < 100
    assert logprobs[1].isfinite()


@pytest.mark.parametrize("vocabulary", [1, 65, 1500])
@pytest.mark.parametrize("spread", [0.0, 0.3, 8.0])
def test_limits(vocabulary, spread) -> None:
    logits = (torch.randn(6, vocabulary + 3) * spread)[:, :vocabulary]
    logits[:, ::7] = logits[:, :1]  # equal ones
    check_limits(
        logits, [1.0, 0.5, 2.0, 0.0, 1.0, 1.0], [0, 5, 40, 3, 1, vocabulary],
        [0.9, 1.0, 0.5, 0.5, 0.3, 0.001], [0.0, 0.0, 0.02, 0.0, 0.3, 0.0],
    )  # fmt: skip


def test_limits_with_banned_ids() -> None:
    logits = torch.randn(4, 200)
    logits[:, 20:] = -math.inf
    check_limits(logits, [1.0] * 4, [30, 10, 0, 0], [1.0, 0.9, 0.99, 1.0], [0.0, 0.0, 0.0, 0.1])


@pytest.mark.parametrize("seed", range(3))
def test_penalties(seed) -> None:
    check_penalties(5, 97, seed)


def test_penalties_of_long_lists() -> None:
    check_penalties(60, 600, 9)
