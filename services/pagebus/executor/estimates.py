"""What a model will take, told from its configuration before it is loaded. Knows no device.

An estimate of what `loader.py` measures afterwards: it refuses only what cannot fit.
"""

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from pagebus.executor.kv_cache import LayerSpec


def num_weights(config: PreTrainedConfig) -> int:
    """Numbers in all weights, those that are tied counted once. Builds the model without memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return sum(weight.numel() for weight in model.parameters())


def estimated_specs(config: PreTrainedConfig, max_model_len: int) -> tuple[LayerSpec, ...]:
    """What each layer stores for a token; none where the configuration does not say it."""
    config = config.get_text_config()
    num_layers, num_heads = _number(config, "num_hidden_layers"), _number(config, "num_attention_heads")
    hidden = _number(config, "hidden_size")
    if not num_layers or not num_heads or not hidden:
        return ()
    kv_heads = _number(config, "num_key_value_heads") or num_heads
    key_dim = _number(config, "head_dim") or hidden // num_heads
    rank = _number(config, "kv_lora_rank")
    if rank:
        rotary = _number(config, "qk_rope_head_dim") or 0
        return tuple(
            LayerSpec(layer, num_heads, 1, rank + rotary, rank, None, is_latent=True)
            for layer in range(num_layers)
        )
    return tuple(
        LayerSpec(layer, num_heads, kv_heads, key_dim, key_dim, _window(config, layer, max_model_len))
        for layer in range(num_layers)
    )


def _window(config: PreTrainedConfig, layer: int, max_model_len: int) -> int | None:
    window = _number(config, "sliding_window")
    if window is None or window >= max_model_len:
        return None
    kinds = config.to_dict().get("layer_types")
    if isinstance(kinds, list) and layer < len(kinds):
        return window if kinds[layer] == "sliding_attention" else None
    is_used = config.to_dict().get("use_sliding_window")
    return None if is_used is False else window


def _number(config: PreTrainedConfig, name: str) -> int | None:
    value = getattr(config, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
