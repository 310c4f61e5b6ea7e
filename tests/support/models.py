"""Small random models of many families, saved as Hugging Face directories with a tokenizer."""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    NemotronConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tests.support.tokenizers import make_tokenizer

VOCAB_SIZE = 500
_BASE = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
    "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
_HEAD = {"head_dim": 64}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_BASE, **_HEAD),
    "qwen2": lambda: Qwen2Config(**_BASE),
    "qwen3": lambda: Qwen3Config(**_BASE, **_HEAD),
    "mistral": lambda: MistralConfig(**_BASE, **_HEAD, sliding_window=37),
    "gemma2": lambda: Gemma2Config(
        **_BASE, **_HEAD, sliding_window=21, attn_logit_softcapping=5.0, final_logit_softcapping=8.0,
        query_pre_attn_scalar=64,
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **_BASE, **_HEAD, sliding_window=21, query_pre_attn_scalar=64,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi3": lambda: Phi3Config(**_BASE),
    "granite": lambda: GraniteConfig(
        **_BASE, logits_scaling=3.0, attention_multiplier=0.2, residual_multiplier=0.7,
        embedding_multiplier=2.0,
    ),
    "nemotron": lambda: NemotronConfig(**_BASE, **_HEAD),
    "olmo2": lambda: Olmo2Config(**_BASE),
    "gpt_oss": lambda: GptOssConfig(
        **_BASE, **_HEAD, **_EXPERTS, sliding_window=21,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "mixtral": lambda: MixtralConfig(**_BASE, **_EXPERTS),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **_BASE, **_HEAD, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64
    ),
    "deepseek_v3": lambda: DeepseekV3Config(
        **{**_BASE, "num_key_value_heads": 4}, moe_intermediate_size=64, n_routed_experts=4, n_group=1,
        topk_group=1, num_experts_per_tok=2, kv_lora_rank=32, q_lora_rank=32, qk_rope_head_dim=16,
        qk_nope_head_dim=32, v_head_dim=32, first_k_dense_replace=1,
    ),
}  # fmt: skip


def make_model(kind: str, path: Path, *, seed: int = 0, has_tokenizer: bool = True) -> Path:
    """Write a random model of family `kind` to `path`; its greedy output has many distinct tokens."""
    path.mkdir(parents=True, exist_ok=True)
    if has_tokenizer:
        make_tokenizer(path, "byte_level", vocab_size=VOCAB_SIZE - 50)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](), dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            sharpen(name, weight)
    model.generation_config.eos_token_id = None
    model.save_pretrained(path)
    return path


def sharpen(name: str, weight: torch.Tensor) -> None:
    """Scale a fresh weight: initial ones are so small that attention is flat and outputs repeat."""
    if "norm" in name:
        weight.add_(torch.randn_like(weight) * 0.1)
    elif name.endswith("sinks"):
        weight.normal_()
    elif weight.dim() >= 2:
        fan_in = weight.shape[-1]
        gain = 2.0 if "q_proj" in name or "k_proj" in name or "qkv" in name else 1.0
        weight.normal_(std=1.0 if "embed" in name else gain / fan_in**0.5)
