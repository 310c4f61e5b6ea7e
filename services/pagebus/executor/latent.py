"""Latent attention (DeepSeek): pages keep one latent and one rotary key a token, no heads. Knows no pages.

Keys and values are linear in the latent: k = W_k c and v = W_v c for each head. So q . k = (W_k^T q) . c,
and the weighted sum of values is W_v times the weighted sum of latents: queries are taken to the latent's
space, attention runs there as over a single KV head, and what comes out is taken back. Source: DeepSeek-V2
(2024), section 2.1.
"""

import torch
from torch import nn

_ROWS = (
    16  # rows multiplied at once on a CPU: always so many, so that a row's bits do not depend on the batch
)


class LatentTap(nn.Module):
    """Stands in for the linear that expands latents into every head's keys and values.

    It notes the latents and answers with zeros that take no memory; attention asks it for the rest.
    """

    def __init__(self, weight: torch.Tensor, num_heads: int, key_dim: int) -> None:
        # weight: [heads * (key_dim + value_dim), rank]
        super().__init__()
        self.num_heads = num_heads
        self.key_dim = key_dim  # of the part without positions
        self.rank = weight.shape[1]
        self._num_out = weight.shape[0]
        heads = weight.detach().view(num_heads, -1, self.rank)
        self.absorbing = HeadLinears(heads[:, :key_dim])  # [heads, key_dim, rank]
        self.expanding = HeadLinears(heads[:, key_dim:].transpose(1, 2))  # [heads, rank, value_dim]
        # Models ask their weights for the data type; this one has the type and no memory.
        self.weight = weight.detach().new_empty(0)
        self._latents: torch.Tensor | None = None
        self._is_known = False  # whether the module lays keys out as `absorb` takes them

    def forward(self, latents: torch.Tensor) -> torch.Tensor:  # [..., rank]
        self._latents = latents
        return latents.new_zeros(()).expand(*latents.shape[:-1], self._num_out)

    def absorb(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [heads, tokens, rank + rotary] and the one key [1, tokens, rank + rotary].

        From the module's own [heads, tokens, key_dim + rotary], whose keys' first part is zeros.
        """
        if self._latents is None:
            raise RuntimeError("attention ran before the latents were computed")
        latents = self._latents.reshape(-1, self.rank)
        self._latents = None
        if not self._is_known:
            self._check(key)
        moved = self.absorbing(query[..., : self.key_dim]).to(query.dtype)
        queries = torch.cat((moved, query[..., self.key_dim :]), -1)
        return queries, torch.cat((latents, key[0, :, self.key_dim :]), -1)[None]

    def _check(self, key: torch.Tensor) -> None:
        """Once, when the model is probed: zeros come first, and then the same in every head."""
        if bool(key[..., : self.key_dim].any()) or not torch.equal(key, key[:1].expand_as(key)):
            raise TypeError("its latent attention lays keys out in another way")
        self._is_known = True

    def expand(self, out: torch.Tensor) -> torch.Tensor:
        """From [tokens, heads, rank] to [tokens, heads, value_dim]."""
        expanded: torch.Tensor = self.expanding(out.transpose(0, 1))
        return expanded.transpose(0, 1).to(out.dtype)


class HeadLinears(nn.Module):
    """One matrix a head: [heads, tokens, in] -> [heads, tokens, out]. In float32, row-invariant, on a CPU."""

    def __init__(self, weight: torch.Tensor) -> None:  # [heads, in, out]
        super().__init__()
        self._is_steady = weight.device.type == "cpu"
        self._num_out = weight.shape[2]
        if self._is_steady:  # odd sizes take other kernels, by the row's place
            size = [-(-dim // _ROWS) * _ROWS for dim in weight.shape[1:]]
            kept = weight.new_zeros(len(weight), *size, dtype=torch.float32)
            kept[:, : weight.shape[1], : weight.shape[2]] = weight
        else:
            kept = weight.clone(memory_format=torch.contiguous_format)
        self.weight = nn.Parameter(kept, requires_grad=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if not self._is_steady:
            return torch.bmm(inputs, self.weight)
        num_heads, num_tokens, dim = inputs.shape
        num_tiles = -(-num_tokens // _ROWS)
        padded = self.weight.new_zeros(num_heads, num_tiles * _ROWS, self.weight.shape[1])
        padded[:, :num_tokens, :dim] = inputs
        tiles = padded.view(num_heads, num_tiles, _ROWS, -1).transpose(0, 1).contiguous()
        out = torch.cat([torch.bmm(tile, self.weight) for tile in tiles], 1)
        return out[:, :num_tokens, : self._num_out]


def keep_latents(model: nn.Module) -> int:
    """Swap the expanding linear of every latent attention module, in place; how many there were."""
    num_swapped = 0
    for module in list(model.modules()):
        linear = module._modules.get("kv_b_proj")
        if not isinstance(linear, nn.Linear) or linear._parameters.get("bias") is not None:
            continue
        num_heads, key_dim = _sizes(module)
        module.add_module("kv_b_proj", LatentTap(linear.weight, num_heads, key_dim))
        num_swapped += 1
    return num_swapped


def _sizes(module: nn.Module) -> tuple[int, int]:
    """A latent attention module's heads, and the part of their keys that has no positions."""
    num_heads, key_dim = vars(module).get("num_heads"), vars(module).get("qk_nope_head_dim")
    if not isinstance(num_heads, int) or not isinstance(key_dim, int):
        raise TypeError(f"{type(module).__name__} does not say its heads' sizes")
    return num_heads, key_dim
