"""Small random models of many families, saved as Hugging Face directories with a tokenizer."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
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
    PreTrainedModel,
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
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
_LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 48, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32,
    "v_head_dim": 24, "first_k_dense_replace": 1, "moe_intermediate_size": 64, "n_routed_experts": 8,
    "n_shared_experts": 2, "num_experts_per_tok": 3,
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip
_YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 128,
    "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1,
}  # fmt: skip
_PHI3_ORIGINAL = 320


def _phi3(original: int) -> PreTrainedConfig:
    half = 128 // 4 // 2
    factors = {
        "short_factor": [1.0 + i / 8 for i in range(half)],
        "long_factor": [4.0 + i for i in range(half)],
    }
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": original,
        **factors,
    }
    return Phi3Config(**_BASE, original_max_position_embeddings=original, rope_parameters=rope)


@dataclass(frozen=True)
class Family:
    """A family's small configuration, and how it is served."""

    config: Callable[[], PreTrainedConfig]
    max_model_len: int = 0
    min_prompt: int = 1  # shorter prompts are another model to transformers


FAMILIES: dict[str, Family] = {
    "llama": Family(lambda: LlamaConfig(**_BASE, **_HEAD, rope_parameters=dict(_LLAMA3))),
    "qwen2": Family(lambda: Qwen2Config(**_BASE)),
    "qwen3": Family(lambda: Qwen3Config(**_BASE, **_HEAD)),
    "mistral": Family(lambda: MistralConfig(**_BASE, **_HEAD, sliding_window=37)),
    "gemma2": Family(
        lambda: Gemma2Config(
            **_BASE, **_HEAD, sliding_window=21, attn_logit_softcapping=5.0, final_logit_softcapping=8.0,
            query_pre_attn_scalar=64,
        )
    ),
    "gemma3": Family(
        lambda: Gemma3TextConfig(
            **_BASE, **_HEAD, sliding_window=21, query_pre_attn_scalar=64, layer_types=list(_MIXED)
        )
    ),
    "phi3": Family(lambda: _phi3(_PHI3_ORIGINAL), max_model_len=_PHI3_ORIGINAL),
    "phi3_long": Family(lambda: _phi3(64), min_prompt=65),
    "granite": Family(
        lambda: GraniteConfig(
            **_BASE, logits_scaling=3.0, attention_multiplier=0.2, residual_multiplier=0.7,
            embedding_multiplier=2.0,
        )
    ),
    "nemotron": Family(lambda: NemotronConfig(**_BASE, **_HEAD)),
    "olmo2": Family(lambda: Olmo2Config(**_BASE)),
    "deepseek_v2": Family(
        lambda: DeepseekV2Config(
            **{**_BASE, **_LATENT}, q_lora_rank=32, topk_method="group_limited_greedy", n_group=4,
            topk_group=2, routed_scaling_factor=1.5, rope_parameters=dict(_YARN),
        )
    ),
    "deepseek_v2_lite": Family(lambda: DeepseekV2Config(**{**_BASE, **_LATENT}, q_lora_rank=None)),
    "deepseek_v3": Family(
        lambda: DeepseekV3Config(
            **{**_BASE, **_LATENT}, q_lora_rank=32, n_group=4, topk_group=2, rope_parameters=dict(_YARN)
        )
    ),
    "mixtral": Family(lambda: MixtralConfig(**_BASE, **_EXPERTS)),
    "qwen3_moe": Family(
        lambda: Qwen3MoeConfig(
            **_BASE, **_HEAD, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64,
            norm_topk_prob=True,
        )
    ),
    "gpt_oss": Family(
        lambda: GptOssConfig(
            **_BASE, **_HEAD, **_EXPERTS, sliding_window=21, layer_types=list(_MIXED),
            rope_parameters=dict(_YARN),
        )
    ),
}  # fmt: skip

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    kind: family.config for kind, family in FAMILIES.items()
}


def make_model(kind: str, path: Path, *, seed: int = 0, has_tokenizer: bool = True) -> Path:
    """Write a random model of family `kind` to `path`; its greedy output has many distinct tokens."""
    path.mkdir(parents=True, exist_ok=True)
    if has_tokenizer:
        make_tokenizer(path, "byte_level", vocab_size=VOCAB_SIZE - 50)
    random_model(CONFIGS[kind](), seed).save_pretrained(path)
    return path


_TINY = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 256,
    "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
TINY: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_TINY),
    "qwen3": lambda: Qwen3Config(**_TINY),
    "gemma2": lambda: Gemma2Config(**_TINY, sliding_window=21, query_pre_attn_scalar=16),
    "granite": lambda: GraniteConfig(**{**_TINY, "num_attention_heads": 2}, residual_multiplier=0.7),
    "olmo2": lambda: Olmo2Config(**_TINY),
    "mixtral": lambda: MixtralConfig(**_TINY, **_EXPERTS),
    "deepseek_v3": lambda: DeepseekV3Config(
        **{**_TINY, **_LATENT, "num_key_value_heads": 2}, q_lora_rank=32, n_group=4, topk_group=2
    ),
    "gpt_oss": lambda: GptOssConfig(**_TINY, **_EXPERTS, sliding_window=21),
}
"""As small as they can be: Triton's interpreter takes milliseconds a program."""


def make_tiny(kind: str, path: Path, *, seed: int = 0) -> Path:
    """Write a random model of `TINY`."""
    path.mkdir(parents=True, exist_ok=True)
    random_model(TINY[kind](), seed).save_pretrained(path)
    return path


def random_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model with sharp random weights in float32."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            sharpen(name, weight)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.2)
    model.generation_config.eos_token_id = None
    return model


def sharpen(name: str, weight: torch.Tensor) -> None:
    """Scale a fresh weight: initial ones are so small that attention is flat and outputs repeat."""
    if "q_norm" in name or "k_norm" in name:
        weight.add_(torch.randn_like(weight) * 0.1 + 1.0)
    elif "norm" in name:
        weight.add_(torch.randn_like(weight) * 0.1)
    elif name.endswith("sinks"):
        weight.normal_(mean=2.0)
    elif weight.dim() >= 2:
        fan_in = weight.shape[-2] if "experts" in name and weight.dim() == 3 else weight.shape[-1]
        sharp = ("q_proj", "k_proj", "qkv", "q_b_proj", "kv_a_proj")
        gain = 2.0 if any(part in name for part in sharp) else 1.0
        weight.normal_(std=1.0 if "embed" in name else gain / fan_in**0.5)
    elif "bias" in name:
        weight.normal_(std=0.1)
