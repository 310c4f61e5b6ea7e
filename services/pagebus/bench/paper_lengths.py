"""Seeded prompt and output lengths with the means of the PagedAttention paper's data sets, and arrivals.

The data sets themselves are not needed: the paper's memory figures depend on how long sequences are.
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

MAX_LEN = 2048
"""The paper's limit on prompt and output together."""


class SimRequest(NamedTuple):
    """One request of a simulation: lengths in tokens, `outputs` one a choice."""

    arrival_s: float
    num_prompt: int
    outputs: tuple[int, ...]


class Distribution(NamedTuple):
    """Log-normal prompt and output lengths, independent of each other, cut at `MAX_LEN` together.

    A `spread` is the standard deviation over the mean before the cut.
    """

    name: str
    mean_prompt: float
    prompt_spread: float
    mean_output: float
    output_spread: float


SHAREGPT = Distribution("ShareGPT", 161.31, 1.4, 337.99, 0.95)
ALPACA = Distribution("Alpaca", 19.31, 0.6, 58.45, 1.1)


class Lengths(NamedTuple):
    """Lengths of one request each."""

    prompts: Ints  # [n]
    outputs: Ints  # [n]


def draw_lengths(distribution: Distribution, num_requests: int, seed: int) -> Lengths:
    """`num_requests` lengths whose means, after the cut, are the distribution's (to within rounding).

    Fitting the mean of each sample rather than of the law keeps a run of a few hundred requests comparable
    with the paper's figures. More requests of a seed begin with nearly the same ones.
    """
    raw_prompts = _log_normal(np.random.default_rng([seed, 0]), distribution.prompt_spread, num_requests)
    raw_outputs = _log_normal(np.random.default_rng([seed, 1]), distribution.output_spread, num_requests)
    prompts = _fit(raw_prompts, np.full(num_requests, MAX_LEN // 2), distribution.mean_prompt)
    outputs = _fit(raw_outputs, MAX_LEN - prompts, distribution.mean_output)
    return Lengths(prompts, outputs)


def _log_normal(rng: np.random.Generator, spread: float, num: int) -> Floats:
    sigma = math.sqrt(math.log1p(spread * spread))
    drawn: Floats = np.exp(sigma * rng.standard_normal(num) - sigma * sigma / 2)
    return drawn


def _fit(raw: Floats, most: Ints, mean: float) -> Ints:
    """`raw` times one factor, rounded and cut to [1, most], such that the mean is `mean`."""
    lengths = np.minimum(most, 1)
    low, high = mean / 100, mean * 100
    for _ in range(60):
        factor = math.sqrt(low * high)
        lengths = np.minimum(np.maximum(np.rint(raw * factor), 1).astype(np.int64), most)
        if lengths.mean() < mean:
            low = factor
        else:
            high = factor
    return lengths


def unit_gaps(num_requests: int, seed: int) -> Floats:
    """Times of Poisson arrivals at one request a second, the first at 0. Divide them by a rate."""
    gaps = np.random.default_rng([seed, 2]).exponential(size=num_requests)
    gaps[:1] = 0.0
    return np.cumsum(gaps)


def to_requests(lengths: Lengths, arrivals_s: Floats) -> list[SimRequest]:
    """Requests with one choice each."""
    return [
        SimRequest(float(arrival_s), int(num_prompt), (int(num_output),))
        for arrival_s, num_prompt, num_output in zip(
            arrivals_s, lengths.prompts, lengths.outputs, strict=True
        )
    ]
