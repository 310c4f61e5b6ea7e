"""Gumbel noise from a counter: a function of a row's key and the token id alone. Knows no sampling policy.

Ids lie in groups of 64. The best noise of a group and the place where it lies come from one hash, all else
from a hash an id, so that a caller can rule out whole groups before it looks at their ids:

```
E(id) = floor(group)             where the group's hash puts its least exponential
        floor(group) + E'(id)    elsewhere           noise(id) = -log E(id) <= -log floor(group)
```

The least of 64 exponentials is one of 64 times the rate, at any place alike, and what the others have above
it is exponential again (the exponential distribution has no memory): all noise is independent and exact.

The integers are the same on every device; the logarithms may differ between devices in the last bit of a
float64. Source of the mixing function: Steele, Lea, Flood, "Fast splittable pseudorandom number generators"
(2014), the finalizer with the constants of splitmix64.
"""

import numpy as np
import numpy.typing as npt
import torch

GROUP = 64

_Ids = npt.NDArray[np.int64]
_Words = npt.NDArray[np.int64]
_Bits = npt.NDArray[np.uint64]
_Doubles = npt.NDArray[np.float64]

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1
_GROUPS_KEY = 0x5851F42D4C957F2D  # sets the groups' hashes apart from the ids'
_BITS = 52  # (n + 0.5) / 2**52 is exact in a float64 and never 0 or 1


def noise_key(seed: int, choice: int, index: int) -> int:
    """The key of one id to be sampled, as a signed 64-bit integer. Any Python integers are fine."""
    key = 0
    for part in (seed, choice, index):
        key = _mix((key + _GOLDEN + (part & _MASK)) & _MASK)
    return _signed(key)


def gumbel_noise(keys: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, float64 [rows, ...], of ids [rows, ...] (or [1, ...]: the same for all rows).

    `keys` [rows], like `ids` int64. The argmax of (logits + noise) is a draw from softmax(logits).
    """
    of_groups = _hash(keys ^ _GROUPS_KEY, ids >> 6)
    floors = _uniform(of_groups).neg_().log1p_().mul_(-1 / GROUP)
    above = _uniform(_hash(keys, ids)).neg_().log1p_().neg_()
    above.masked_fill_((ids & (GROUP - 1)) == (of_groups & (GROUP - 1)), 0.0)
    return above.add_(floors).log_().neg_()


def _hash(keys: torch.Tensor, counters: torch.Tensor) -> torch.Tensor:
    """64 mixed bits, int64 [rows, ...], for keys [rows] and counters [rows or 1, ...]."""
    state = counters * _signed(_GOLDEN) + keys.view(-1, *[1] * (counters.dim() - 1))
    scratch = torch.empty_like(state)
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        _xor_shifted(state, shift, scratch)
        state.mul_(_signed(factor))
    _xor_shifted(state, 31, scratch)
    return state


def _uniform(bits: torch.Tensor) -> torch.Tensor:
    """The upper bits as float64 between 0 and 1, neither of them ever."""
    upper = (bits >> (64 - _BITS)) & ((1 << _BITS) - 1)
    return upper.double().add_(0.5).mul_(2.0**-_BITS)


def _xor_shifted(state: torch.Tensor, shift: int, scratch: torch.Tensor) -> None:
    """state ^= state >> shift, as unsigned."""
    torch.bitwise_right_shift(state, shift, out=scratch)
    scratch.bitwise_and_((1 << (64 - shift)) - 1)
    state.bitwise_xor_(scratch)


def host_gumbel_noise(keys: _Words, ids: _Ids) -> _Doubles:
    """The same as `gumbel_noise`, on the host: float64 [...] for keys [...] and ids [...] (int64)."""
    of_groups = _host_hash(keys ^ np.int64(_GROUPS_KEY), ids >> 6)
    floors = np.log1p(-_host_uniform(of_groups)) * (-1 / GROUP)
    above = -np.log1p(-_host_uniform(_host_hash(keys, ids)))
    above[(ids.view(np.uint64) ^ of_groups) & np.uint64(GROUP - 1) == 0] = 0.0
    above += floors
    noise: _Doubles = -np.log(above, out=above)
    return noise


def host_group_noise(keys: _Words, num_groups: int) -> tuple[_Doubles, _Ids]:
    """The best noise of groups 0, 1, ... and the ids that have it, both [rows, num_groups], for keys [rows].

    No noise of a group exceeds it by more than a rounding error. The last ids may lie beyond a vocabulary.
    """
    groups = np.arange(num_groups)
    bits = _host_hash(keys[:, None] ^ np.int64(_GROUPS_KEY), groups[None])
    noise: _Doubles = -np.log(np.log1p(-_host_uniform(bits)) * (-1 / GROUP))
    ids: _Ids = (bits & np.uint64(GROUP - 1)).view(np.int64) + groups * GROUP
    return noise, ids


def _host_hash(keys: _Words, counters: _Ids) -> _Bits:
    state: _Bits = counters.view(np.uint64) * np.uint64(_GOLDEN) + keys.view(np.uint64)
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        state ^= state >> np.uint64(shift)
        state *= np.uint64(factor)
    state ^= state >> np.uint64(31)
    return state


def _host_uniform(bits: _Bits) -> _Doubles:
    uniform: _Doubles = ((bits >> np.uint64(64 - _BITS)).astype(np.float64) + 0.5) * 2.0**-_BITS
    return uniform


def _mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * _MIX_1) & _MASK
    value = ((value ^ (value >> 27)) * _MIX_2) & _MASK
    return value ^ (value >> 31)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
