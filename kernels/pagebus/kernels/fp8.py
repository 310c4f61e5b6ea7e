"""Vectors in float8 e4m3 with a scale of their own, in plain torch. Knows no pages and no linears.

A vector is stored as vector * 448 / peak, where its peak is its largest magnitude: what the e4m3 format holds
(three bits of mantissa) is then used to the top by every vector, whatever the others are, so that nothing has
to be calibrated and a row's numbers do not depend on its neighbours.
"""

import torch

MOST = 448.0
"""float8_e4m3fn's largest value."""

DTYPE = torch.float8_e4m3fn
_LEAST_PEAK = 1e-30  # a vector of zeros is divided by something


def quantize(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`vectors` [..., dim] in e4m3, and their peaks [...] in float32: vector = stored * peak / MOST."""
    wide = vectors.float()
    peaks = wide.abs().amax(-1)
    # A number over a tensor is the number times a reciprocal, rounded twice: kernels divide.
    scales = torch.full_like(peaks, MOST) / peaks.clamp(min=_LEAST_PEAK)
    scaled = wide * scales[..., None]
    # A conversion alone makes NaN of what rounding has put above the largest value.
    return scaled.clamp(-MOST, MOST).to(DTYPE), peaks


def dequantize(stored: torch.Tensor, peaks: torch.Tensor) -> torch.Tensor:
    """What `quantize` has stored, in float32."""
    return stored.float() * (peaks / MOST)[..., None]


def peak_strides(peaks: torch.Tensor | None) -> tuple[int, int]:
    """A kernel's strides of a block and a head in [blocks, kv_heads, BLOCK_SIZE]; places lie side by side."""
    if peaks is None:
        return 0, 0
    if peaks.stride(2) != 1:
        raise ValueError("the peaks of a block's tokens must lie side by side")
    return peaks.stride(0), peaks.stride(1)
