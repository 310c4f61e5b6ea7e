"""The network that is trained: Qwen3's architecture in plain torch, weights under Hugging Face's names.

It knows no text. `config_of` says what transformers needs to load the same weights as `Qwen3ForCausalLM`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

EPS = 1e-6


@dataclass(frozen=True)
class Shape:
    """The sizes of the network."""

    vocab: int = 1024
    hidden: int = 192
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    ffn: int = 512
    rope_theta: float = 10000.0
    max_positions: int = 8192


class _RmsNorm(torch.autograd.Function):
    """Root mean square normalisation in a handful of passes over memory, backwards as well."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
        normed = wide * scale
        ctx.save_for_backward(normed, scale, weight)
        ctx.input_dtype = x.dtype  # type: ignore[attr-defined]
        return (normed * weight).to(dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        normed, scale, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        wide = grad.float()
        product = wide * normed
        size = normed.shape[-1]
        grad_weight = product.reshape(-1, size).sum(0)
        mean = product.matmul(weight.unsqueeze(1)) / size
        grad_x = (wide * weight).addcmul_(normed, mean, value=-1).mul_(scale)
        return grad_x.to(ctx.input_dtype), grad_weight, None  # type: ignore[attr-defined]


class Norm(nn.Module):
    """Root mean square normalisation with a learned scale."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32
        out: Tensor = _RmsNorm.apply(x, self.weight, dtype)  # type: ignore[no-untyped-call]
        return out


def rotary(length: int, shape: Shape) -> tuple[Tensor, Tensor]:
    """Cosines and sines, [length, head_dim] each, in the half-split layout of transformers."""
    powers = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    angles = torch.outer(torch.arange(length, dtype=torch.float32), shape.rope_theta**-powers)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns `x` [batch, heads, length, head_dim] by its positions."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention over [batch, heads, length, head_dim], written out: for short rows in bfloat16 on the
    CPU this is three to six times as fast, forward and backward, as torch's fused kernel."""
    future = torch.full((q.shape[2], q.shape[2]), float("-inf"), dtype=q.dtype).triu(1)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + future
    out: Tensor = scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v
    return out


class Attention(nn.Module):
    """Causal attention with grouped keys and values and normalised queries and keys."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.q_proj = nn.Linear(shape.hidden, shape.heads * shape.head_dim, bias=False)
        self.k_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.v_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.o_proj = nn.Linear(shape.heads * shape.head_dim, shape.hidden, bias=False)
        self.q_norm = Norm(shape.head_dim)
        self.k_norm = Norm(shape.head_dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # x: [batch, length, hidden]
        batch, length, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(batch, length, -1, self.shape.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(batch, length, -1, self.shape.head_dim)).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, -1, self.shape.head_dim).transpose(1, 2)
        group = self.shape.heads // self.shape.kv_heads
        k = rotate(k, cos, sin).repeat_interleave(group, dim=1)
        v = v.repeat_interleave(group, dim=1)
        y = attend(rotate(q, cos, sin), k, v)
        out: Tensor = self.o_proj(y.transpose(1, 2).reshape(batch, length, -1))
        return out


class FeedForward(nn.Module):
    """The gated feed-forward part."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.down_proj = nn.Linear(shape.ffn, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = FeedForward(shape)
        self.input_layernorm = Norm(shape.hidden)
        self.post_attention_layernorm = Norm(shape.hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Network(nn.Module):
    """The decoder, with the embedding tied to the output."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = Norm(shape.hidden)
        cos, sin = rotary(2048, shape)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                scale = 0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                std = 0.02 if "embed" in name else scale * parameter.shape[1] ** -0.5
                nn.init.normal_(parameter, std=std)

    def forward(self, ids: Tensor) -> Tensor:  # [batch, length] -> [batch, length, hidden]
        length = ids.shape[1]
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32
        cos, sin = self.get_buffer("cos")[:length].to(dtype), self.get_buffer("sin")[:length].to(dtype)
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        out: Tensor = self.norm(x)
        return out

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy where `targets` [batch, length] is not negative; the rest gets no logits."""
        wanted = targets >= 0
        logits = F.linear(self.forward(ids)[wanted], self.embed_tokens.weight)
        return F.cross_entropy(logits.float(), targets[wanted])


def exported(network: Network) -> dict[str, Tensor]:
    """The weights as transformers names them, rounded to bfloat16."""
    return {
        "model." + name: value.detach().to(torch.bfloat16).contiguous()
        for name, value in network.named_parameters()
    }


def config_of(shape: Shape, end_ids: list[int], pad_id: int) -> dict[str, object]:
    """config.json for `Qwen3ForCausalLM`: stored in bfloat16, computed in float32."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "dtype": "float32",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": EPS,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_theta": shape.rope_theta,
        "rope_scaling": None,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": shape.layers,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": end_ids[0],
        "pad_token_id": pad_id,
    }
