"""Gumbel noise from a counter: a function of a row's key and the token id alone. Knows no sampling policy.

The integers are the same on every device; the logarithms may differ between devices in the last bit.
Source of the mixing function: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014),
the finalizer with the constants of splitmix64.
"""

import torch

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def noise_key(seed: int, choice: int, index: int) -> int:
    """The key of one id to be sampled, as a signed 64-bit integer. Any Python integers are fine."""
    key = 0
    for part in (seed, choice, index):
        key = _mix((key + _GOLDEN + (part & _MASK)) & _MASK)
    return _signed(key)


def gumbel_noise(keys: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, float32 [rows, n], for keys [rows] (int64) and token ids [n] (int64).

    The argmax of (logits + noise) is a draw from softmax(logits). 32 random bits are spent on the upper
    tail, where the draw is decided: noise reaches 22.9.
    """
    state = (ids * _signed(_GOLDEN))[None, :] + keys[:, None]
    scratch = torch.empty_like(state)
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        _xor_shifted(state, shift, scratch)
        state.mul_(_signed(factor))
    _xor_shifted(state, 31, scratch)
    torch.bitwise_right_shift(state, 32, out=scratch)
    scratch.bitwise_and_(0xFFFFFFFF)
    uniform = scratch.float().add_(0.5).mul_(-(2.0**-32)).clamp_(min=-1.0 + 2.0**-24)
    exponential = torch.log1p(uniform).neg_()  # -log(1 - u): exact where u is small, which is where it wins
    return torch.log(exponential).neg_()


def _xor_shifted(state: torch.Tensor, shift: int, scratch: torch.Tensor) -> None:
    """state ^= state >> shift, as unsigned."""
    torch.bitwise_right_shift(state, shift, out=scratch)
    scratch.bitwise_and_((1 << (64 - shift)) - 1)
    state.bitwise_xor_(scratch)


def _mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * _MIX_1) & _MASK
    value = ((value ^ (value >> 27)) * _MIX_2) & _MASK
    return value ^ (value >> 31)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
