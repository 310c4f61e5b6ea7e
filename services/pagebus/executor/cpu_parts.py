"""What a decoder layer's modules compute, told from what they were seen to take and give. Knows no family.

Each finder tries a few ways in plain torch on the inputs of one forward pass, and names the one that gives
the same. None fits: None, and the layer stays with its modules.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from pagebus.executor.attention import AttentionCall
from pagebus.executor.cpu_linears import CpuLinear
from pagebus.executor.merging import LinearPart, Merged

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-1}
"""Largest difference, in standard deviations of what the module gave."""

_ACTIVATIONS = ("silu", "gelu_tanh", "relu_squared", "gelu")
"""In the order of the kernels' numbers."""


class Seen(NamedTuple):
    """What a module was called with, and gave."""

    args: tuple[object, ...]
    kwargs: dict[str, object]
    output: object

    @property
    def input(self) -> torch.Tensor | None:
        """The hidden states that came in."""
        found = self.args[0] if self.args else self.kwargs.get("hidden_states")
        return found if isinstance(found, torch.Tensor) else None

    @property
    def made(self) -> torch.Tensor | None:
        """The tensor that came out, the first of a tuple."""
        found = self.output[0] if isinstance(self.output, tuple) and self.output else self.output
        return found if isinstance(found, torch.Tensor) else None


@dataclass(frozen=True, slots=True)
class NormPart:
    """weight * normed (+ bias), in float32; with `is_centered` a layer norm, else an RMS norm."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float
    is_centered: bool

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        wide = inputs.float()
        if self.is_centered:
            wide = wide - wide.mean(-1, keepdim=True)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight
        return wide if self.bias is None else wide + self.bias


@dataclass(frozen=True, slots=True)
class MlpPart:
    """down(act(gate) * up), or down(act(up)) where nothing is gated."""

    up: CpuLinear
    down: CpuLinear
    activation: int
    is_gated: bool


@dataclass(frozen=True, slots=True)
class AttentionPart:
    """The merged product, norms and rotary positions of queries and keys, and the way out."""

    qkv: CpuLinear
    out: CpuLinear
    query_norm: NormPart | None
    key_norm: NormPart | None
    is_norm_over_heads: bool
    is_interleaved: bool
    num_turned: int  # factors used of each position's


def is_same(given: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether two tensors are equal but for rounding in the type of `wanted`."""
    if given.shape != wanted.shape or wanted.dtype not in _TOLERANCE:
        return False
    scale = float(wanted.float().std())
    if not scale > 0:
        return False  # of zeros nothing can be told
    return float((given.float() - wanted.float()).abs().max()) <= _TOLERANCE[wanted.dtype] * scale


def find_norm(module: nn.Module, seen: Seen) -> NormPart | None:
    """What norm over the last dimension `module` is."""
    inputs, wanted = seen.input, seen.made
    if inputs is None or wanted is None:
        return None
    return next((part for part in norms_of(module) if is_same(part(inputs), wanted)), None)


def norms_of(module: nn.Module) -> Iterator[NormPart]:
    """The norms that `module` may be, by its parameters."""
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    eps = next(
        (eps for name in ("variance_epsilon", "eps") if isinstance(eps := vars(module).get(name), float)),
        None,
    )
    if weight is None or weight.dim() != 1 or eps is None:
        return
    for is_centered in (False, True):
        for offset in (0.0, 1.0):
            wide = weight.detach().float() + offset
            yield NormPart(wide, None if bias is None else bias.detach().float(), eps, is_centered)


def find_mlp(module: nn.Module, seen: Seen) -> MlpPart | None:
    """What feed-forward part `module` is."""
    inputs, wanted = seen.input, seen.made
    if inputs is None or wanted is None:
        return None
    merged = [child.inner for child in module.children() if isinstance(child, Merged)]
    linears = [child for child in module.children() if isinstance(child, CpuLinear)]
    if len(merged) == len(linears) == 1:
        up, down = merged[0], linears[0]
    elif not merged and len(linears) == 2:
        up, down = linears
    else:
        return None
    if not isinstance(up, CpuLinear) or up.out_features not in {down.in_features, 2 * down.in_features}:
        return None
    wide, is_gated = up(inputs), up.out_features == 2 * down.in_features
    for activation, name in enumerate(_ACTIVATIONS):
        first, second = wide.float().tensor_split(2, -1) if is_gated else (wide.float(), None)
        inner = _activate(name, first)
        inner = inner if second is None else inner * second
        if is_same(down(inner.to(wide.dtype)), wanted):
            return MlpPart(up, down, activation, is_gated)
    return None


def _activate(name: str, inputs: torch.Tensor) -> torch.Tensor:
    match name:
        case "silu":
            return nn.functional.silu(inputs)
        case "gelu_tanh":
            return nn.functional.gelu(inputs, approximate="tanh")
        case "relu_squared":
            return nn.functional.relu(inputs).square()
    return nn.functional.gelu(inputs)


def find_attention(
    module: nn.Module, seen: Seen, call: AttentionCall, given: torch.Tensor
) -> AttentionPart | None:
    """How `module` makes the queries, keys and values of `call`, and its output of what was `given` back."""
    inputs, wanted = seen.input, seen.made
    factors = seen.kwargs.get("position_embeddings")
    if inputs is None or wanted is None or not isinstance(factors, tuple) or len(factors) != 2:
        return None
    qkv, out = _linears(module)
    if qkv is None or out is None or not is_same(out(given.flatten(1)), wanted[0]):
        return None
    heads, num_tokens, key_dim = call.query.shape
    kv_heads, value_dim = call.key.shape[0], call.value.shape[-1]
    sizes = [heads * key_dim, kv_heads * key_dim, kv_heads * value_dim]
    if qkv.out_features != sum(sizes):
        return None
    query, key, value = qkv(inputs)[0].split(sizes, -1)
    if not is_same(value.view(num_tokens, kv_heads, value_dim).transpose(0, 1), call.value):
        return None
    for norms in _head_norms(module):
        for is_interleaved in (False, True):
            width = factors[0].shape[-1]
            for used in (width // 2, width):  # most families repeat the factors for both numbers of a pair
                if 2 * used > key_dim:
                    continue
                turned = _Turn(
                    factors[0][0, :, :used].float(), factors[1][0, :, :used].float(), is_interleaved
                )
                if is_same(turned(query, norms[0], heads), call.query) and is_same(
                    turned(key, norms[1], kv_heads), call.key
                ):
                    over_heads = norms[0] is not None and len(norms[0].weight) != key_dim
                    return AttentionPart(qkv, out, *norms, over_heads, is_interleaved, used)
    return None


def _linears(module: nn.Module) -> tuple[CpuLinear | None, CpuLinear | None]:
    """The product of queries, keys and values, and the way out."""
    merged = [child.inner for child in module.children() if isinstance(child, Merged)]
    linears = [child for child in module.children() if isinstance(child, CpuLinear)]
    parts = [child for child in module.children() if isinstance(child, LinearPart)]
    if len(merged) == 1 and len(parts) == 3 and len(linears) == 1:
        wide = merged[0]
        return (wide, linears[0]) if isinstance(wide, CpuLinear) else (None, None)
    if not merged and len(linears) == 2:  # merged already in the checkpoint
        return max(linears, key=lambda one: one.out_features), min(linears, key=lambda one: one.out_features)
    return None, None


def _head_norms(module: nn.Module) -> Iterator[tuple[NormPart | None, NormPart | None]]:
    query, key = module._modules.get("q_norm"), module._modules.get("k_norm")
    if query is None or key is None:
        yield None, None
    else:
        yield from zip(norms_of(query), norms_of(key), strict=False)


class _Turn(NamedTuple):
    cos: torch.Tensor  # [tokens, used]
    sin: torch.Tensor
    is_interleaved: bool

    def __call__(self, product: torch.Tensor, norm: NormPart | None, heads: int) -> torch.Tensor:
        """[tokens, heads * dim] -> normed and turned, [heads, tokens, dim]."""
        num_tokens, used = len(product), self.cos.shape[1]
        wide = product.float()
        if norm is not None and len(norm.weight) == wide.shape[1]:
            wide = norm(wide)
        wide = wide.reshape(num_tokens, heads, -1)
        if norm is not None and len(norm.weight) != product.shape[1]:
            if len(norm.weight) != wide.shape[2]:
                return product.new_empty(0)
            wide = norm(wide)
        turned, rest = wide[..., : 2 * used], wide[..., 2 * used :]
        if self.is_interleaved:
            first, second = turned[..., ::2], turned[..., 1::2]
        else:
            first, second = turned[..., :used], turned[..., used:]
        cos, sin = self.cos[:, None], self.sin[:, None]
        made = first * cos - second * sin, second * cos + first * sin
        whole = torch.stack(made, -1).flatten(-2) if self.is_interleaved else torch.cat(made, -1)
        return torch.cat([whole, rest], -1).transpose(0, 1)
