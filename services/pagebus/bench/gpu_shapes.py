"""Shapes of well-known models, for runs with random weights, and what a step of them costs at least."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

CONFIGS: Mapping[str, Mapping[str, object]] = {
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    },
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000,
        "rope_scaling": _LLAMA3,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    },
    "qwen3-8b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    },
    "tiny": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 512,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000,
        "tie_word_embeddings": False,
        "dtype": "float32",
    },
}


class Cost(NamedTuple):
    """What a model's steps move and compute; `weight_bytes`: what a step reads, so no embedding table."""

    weight_bytes: int
    num_parameters: int  # that multiply something in each token
    kv_bytes: int  # a token

    def decode_floor_s(self, num_rows: int, context: int, bytes_per_s: float, flops: float) -> float:
        """Seconds of a decoding step at least."""
        weights_s = max(self.weight_bytes / bytes_per_s, 2 * self.num_parameters * num_rows / flops)
        return weights_s + num_rows * context * self.kv_bytes / bytes_per_s

    def prefill_floor(self, flops: float) -> float:
        """Prompt tokens a second at most, attention left out."""
        return flops / (2 * self.num_parameters)


def cost_of(name: str) -> Cost:
    """From the shape alone; two bytes a number, four for the tiny one."""
    config = CONFIGS[name]

    def size(key: str) -> int:
        value = config[key]
        if not isinstance(value, int):
            raise TypeError(f"{name}: {key} is {value!r}")
        return value

    hidden, inner, head = size("hidden_size"), size("intermediate_size"), size("head_dim")
    heads, kv_heads = size("num_attention_heads"), size("num_key_value_heads")
    layer = 2 * hidden * heads * head + 2 * hidden * kv_heads * head + 3 * hidden * inner
    num_parameters = size("num_hidden_layers") * layer + hidden * size("vocab_size")
    num_bytes = 4 if config["dtype"] == "float32" else 2
    kv_bytes = 2 * size("num_hidden_layers") * kv_heads * head * num_bytes
    return Cost(num_parameters * num_bytes, num_parameters, kv_bytes)


def write_config(name: str, folder: Path) -> Path:
    """A model directory with the shape's config.json alone, as `--load-format dummy` takes it."""
    path = folder / name
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(dict(CONFIGS[name])), encoding="utf-8")
    return path
