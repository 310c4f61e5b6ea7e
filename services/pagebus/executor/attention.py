"""transformers' attention interface, answered from the paged cache. Knows layers and pages, no bus.

A model's attention modules call `attend` with the flat batch's queries, keys and values. What the running
forward pass needs besides stands in a context variable, because families do not hand unknown arguments
down reliably.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import AttentionInterface

from pagebus.executor.latent import LatentTap

if TYPE_CHECKING:
    from pagebus.kernels.triton_rope_kv import HeadNorm

INTERFACE = "pagebus"
"""Our name in transformers' registry. No mask function is registered under it, so no mask is built."""


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One attention layer's tensors and arguments in a forward pass over [1, tokens]."""

    layer: int
    query: torch.Tensor  # [heads, tokens, key_dim]
    key: torch.Tensor  # [kv_heads, tokens, key_dim]
    value: torch.Tensor  # [kv_heads, tokens, value_dim]
    scale: float
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None  # [heads]
    is_latent: bool = False  # the values are the first value_dim of the keys (see latent.py)


@dataclass(frozen=True, slots=True)
class FusedCall:
    """One attention layer right after its merged product: norms, rotary and the write into the pages are
    left to whoever answers."""

    layer: int
    qkv: torch.Tensor  # [tokens, heads * key_dim | kv_heads * key_dim | kv_heads * value_dim]
    cos: torch.Tensor  # [tokens, rotary_dim / 2]
    sin: torch.Tensor
    num_heads: int
    scale: float
    softcap: float | None
    sinks: torch.Tensor | None  # [heads]
    norm: "HeadNorm | None"
    is_interleaved: bool


Attend = Callable[[AttentionCall | FusedCall], torch.Tensor]
"""What answers the layers of one forward pass: [tokens, heads, value_dim]. Fused calls come only from models
that were fused (`fusing.py`), whose pages take them."""

_current: ContextVar[Attend] = ContextVar("pagebus_attend")


def answer(call: AttentionCall | FusedCall) -> torch.Tensor:
    """Have a call answered by this thread's forward pass."""
    return _current.get()(call)


@contextmanager
def answering(attend: Attend) -> Iterator[None]:
    """Within the block, this thread's attention layers are answered by `attend`."""
    token = _current.set(attend)
    try:
        yield
    finally:
        _current.reset(token)


def _interface(
    module: nn.Module,
    query: torch.Tensor,  # [1, heads, tokens, key_dim]
    key: torch.Tensor,  # [1, kv_heads, tokens, key_dim]
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    layer = module.layer_idx
    if not isinstance(layer, int):
        raise TypeError(f"{type(module).__name__} has no layer_idx")
    if vars(module).get("is_causal") is False:
        raise TypeError(f"{type(module).__name__} attends to later tokens")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    tap = module._modules.get("kv_b_proj")
    if isinstance(tap, LatentTap):
        queries, latents = tap.absorb(query[0], key[0])
        call = AttentionCall(
            layer=layer,
            query=queries,
            key=latents,
            value=latents[..., : tap.rank],
            scale=scale,
            window=sliding_window,
            softcap=softcap,
            sinks=s_aux,
            is_latent=True,
        )
        return tap.expand(_current.get()(call))[None], None
    call = AttentionCall(
        layer=layer,
        query=query[0],
        key=key[0],
        value=value[0],
        scale=scale,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return _current.get()(call)[None], None


def register() -> None:
    """Make `attn_implementation="pagebus"` known to transformers."""
    AttentionInterface.register(INTERFACE, _interface)
