"""Shapes of well-known models, for runs with random weights, and what a step of them costs at least."""

import heapq
import json
from collections import deque
from collections.abc import Mapping, Sequence
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
    num_parameters: int  # that multiply something in each token that is made
    head_parameters: int  # of these the head's, which prompts' tokens do without
    kv_bytes: int  # a token
    attention_flops: int  # of a query for each key that it sees
    speed: float = 1.0  # of products, against those in bf16

    def decode_floor_s(self, num_rows: int, context: float, bytes_per_s: float, flops: float) -> float:
        """Seconds of a decoding step at least; `context`: of a row, on average."""
        flops *= self.speed
        weights_s = max(self.weight_bytes / bytes_per_s, 2 * self.num_parameters * num_rows / flops)
        return weights_s + num_rows * context * self.kv_bytes / bytes_per_s

    def prefill_floor(self, flops: float, context: int = 0) -> float:
        """Prompt tokens a second at most, of prompts of `context` tokens (0: attention left out)."""
        products = 2 * (self.num_parameters - self.head_parameters) / self.speed
        return flops / (products + self.attention_flops * context / 2)

    def batch_floor_s(
        self, lengths: Sequence[tuple[int, int]], max_rows: int, bytes_per_s: float, flops: float
    ) -> float:
        """Seconds for requests of (prompt, output) tokens that all wait from the start, so many at a time."""
        waiting = deque(lengths)
        total_s, context = 0.0, 0
        endings: list[tuple[int, int]] = []  # (the step after which a row ends, its context then)
        step = 0
        while waiting or endings:
            while waiting and len(endings) < max_rows:
                prompt, output = waiting.popleft()
                total_s += prompt / self.prefill_floor(flops, prompt)
                heapq.heappush(endings, (step + output, prompt + output))
                context += prompt
            until, _ = endings[0]
            num, num_rows = until - step, len(endings)
            total_s += num * self.decode_floor_s(
                num_rows, context / num_rows + (num + 1) / 2, bytes_per_s, flops
            )
            context += num * num_rows
            step = until
            while endings and endings[0][0] == step:
                context -= heapq.heappop(endings)[1]
        return total_s


def cost_of(name: str, *, is_fp8: bool = False, has_fp8_kv: bool = False) -> Cost:
    """From the shape alone; two bytes a number, four for the tiny one. In fp8: one, the head's two."""
    config = CONFIGS[name]

    def size(key: str) -> int:
        value = config[key]
        if not isinstance(value, int):
            raise TypeError(f"{name}: {key} is {value!r}")
        return value

    hidden, inner, head = size("hidden_size"), size("intermediate_size"), size("head_dim")
    heads, kv_heads = size("num_attention_heads"), size("num_key_value_heads")
    layer = 2 * hidden * heads * head + 2 * hidden * kv_heads * head + 3 * hidden * inner
    layers, head_parameters = size("num_hidden_layers") * layer, hidden * size("vocab_size")
    num_bytes = 4 if config["dtype"] == "float32" else 2
    vector_bytes = head + 4 if has_fp8_kv else head * num_bytes  # a peak beside each
    return Cost(
        weight_bytes=layers * (1 if is_fp8 else num_bytes) + head_parameters * num_bytes,
        num_parameters=layers + head_parameters,
        head_parameters=head_parameters,
        kv_bytes=2 * size("num_hidden_layers") * kv_heads * vector_bytes,
        attention_flops=4 * size("num_hidden_layers") * heads * head,
        speed=2.0 if is_fp8 else 1.0,
    )


class Linears(NamedTuple):
    """Linears of one size in a model, as the executor merges them."""

    num_in: int
    num_out: int
    times: int  # in a step
    is_gated: bool = False


def linears_of(name: str) -> list[Linears]:
    """Queries, keys and values; the way out; gate and up; down; the head."""
    config = CONFIGS[name]
    hidden, inner, head, heads, kv_heads, layers, vocabulary = (
        int(str(config[key]))
        for key in (
            "hidden_size", "intermediate_size", "head_dim", "num_attention_heads", "num_key_value_heads",
            "num_hidden_layers", "vocab_size",
        )
    )  # fmt: skip
    return [
        Linears(hidden, (heads + 2 * kv_heads) * head, layers),
        Linears(heads * head, hidden, layers),
        Linears(hidden, 2 * inner, layers, is_gated=True),
        Linears(inner, hidden, layers),
        Linears(hidden, vocabulary, 1),
    ]


def write_config(name: str, folder: Path) -> Path:
    """A model directory with the shape's config.json alone, as `--load-format dummy` takes it."""
    path = folder / name
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(dict(CONFIGS[name])), encoding="utf-8")
    return path
