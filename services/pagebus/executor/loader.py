"""Makes a transformers model out of a Hugging Face directory, ready for paged attention. Knows no pages.

Only safetensors are read, never a pickle, and no code that comes with a model is run. Whatever is wrong
with a directory is a `ModelError` of one sentence.
"""

import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from pagebus.executor import attention
from pagebus.executor.attention import AttentionCall, answering
from pagebus.executor.errors import ModelError
from pagebus.executor.kv_cache import LayerSpec
from pagebus.executor.linears import make_row_invariant
from pagebus.executor.rotary import fix_rotary
from pagebus.settings.structs import Dtype, LoadFormat

_log = logging.getLogger(__name__)

_LAYER_TYPES = {"full_attention", "sliding_attention"}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_DEFAULT_LEN = 2048  # where a config does not say


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in evaluation mode with our attention, and what the rest must know about it."""

    model: PreTrainedModel
    specs: tuple[LayerSpec, ...]
    vocab_size: int  # ids that may be put in
    max_model_len: int
    dtype: torch.dtype
    device: torch.device


def load_model(
    path: Path,
    *,
    dtype: Dtype = "auto",
    device: Literal["cpu", "cuda"] = "cpu",
    load_format: LoadFormat = "auto",
    seed: int = 0,
    max_model_len: int = 0,
) -> LoadedModel:
    """The model in `path`; `load_format="dummy"` takes random weights and needs only the config.

    `max_model_len` 0 means what the model allows. Raises `ModelError`.
    """
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    attention.register()
    config = _read_config(path)
    longest = _longest(path, config, max_model_len)
    target = torch.device(device)
    kind = choose_dtype(dtype, config, target)
    if load_format == "dummy":
        model = _dummy(path, config, kind, target, seed)
    else:
        model = _with_weights(path, config, kind, target)
    model.requires_grad_(False).train(False)
    fix_rotary(model, longest)
    if target.type == "cpu":
        make_row_invariant(model)
    return LoadedModel(
        model=model,
        specs=_probe(path, model, target, longest),
        vocab_size=_num_embeddings(model),
        max_model_len=longest,
        dtype=kind,
        device=target,
    )


def _read_config(path: Path) -> PreTrainedConfig:
    """The directory's config, of a family that can be served."""
    if not path.is_dir():
        raise ModelError(f"{path}: there is no such model directory")
    file = path / "config.json"
    if not file.is_file():
        raise ModelError(f"{path}: not a model directory, it has no config.json")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: its config.json is not JSON: {_first_line(error)}") from None
    if not isinstance(raw, dict):
        raise ModelError(f"{path}: its config.json is not a JSON object")
    _check_family(path, raw)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            path, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # whatever transformers makes of a wrong field
        raise ModelError(f"{path}: its config.json is not usable: {_first_line(error)}") from None
    _check_layers(path, config)
    return config


def _check_family(path: Path, raw: Mapping[str, object]) -> None:
    kind = raw.get("model_type")
    if not isinstance(kind, str):
        raise ModelError(f"{path}: its config.json names no model_type")
    mapping = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if kind not in CONFIG_MAPPING:
        raise ModelError(f"{path}: unknown architecture {kind!r} (code that comes with a model is never run)")
    if kind not in mapping:
        raise ModelError(f"{path}: architecture {kind!r} is not a causal language model")
    named = raw.get("architectures")
    classes = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    causal = mapping[kind]
    if classes and causal not in classes:
        raise ModelError(
            f"{path}: architecture {classes[0]} is not a causal language model ({causal} would be)"
        )
    if raw.get("quantization_config") is not None:
        raise ModelError(f"{path}: its weights are quantized, which is not supported yet")


def _check_layers(path: Path, config: PreTrainedConfig) -> None:
    if config.is_encoder_decoder:
        raise ModelError(f"{path}: {config.model_type} has an encoder, only decoders are supported")
    kinds = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if kinds:
        raise ModelError(
            f"{path}: {config.model_type} has layers of kind {', '.join(sorted(map(str, kinds)))}, which are"
            " not supported"
        )


def _longest(path: Path, config: PreTrainedConfig, max_model_len: int) -> int:
    longest = getattr(config, "max_position_embeddings", None)
    if not isinstance(longest, int) or longest < 1:
        longest = max_model_len or _DEFAULT_LEN
    if max_model_len > longest:
        raise ModelError(f"{path}: --max-model-len {max_model_len} is more than the model's {longest}")
    return max_model_len or longest


def choose_dtype(dtype: Dtype, config: PreTrainedConfig, device: torch.device) -> torch.dtype:
    """The data type asked for; for "auto" the config's, or float32 where the CPU has none of it natively."""
    named: dict[str, torch.dtype] = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    if dtype != "auto":
        return named[dtype]
    own = getattr(config, "dtype", None)
    if isinstance(own, str):
        own = named.get(own)
    if not isinstance(own, torch.dtype) or own not in named.values():
        return torch.float32
    if device.type == "cpu" and own != torch.float32 and not (own == torch.bfloat16 and _has_bfloat16()):
        _log.info("this CPU does not compute in %s natively: using float32", str(own).removeprefix("torch."))
        return torch.float32
    return own


def _has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 itself."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_arm_bf16_supported")
    checks = [getattr(torch.cpu, name, None) for name in names]
    return any(bool(check()) for check in checks if callable(check))


def _dummy(
    path: Path, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, seed: int
) -> PreTrainedModel:
    torch.manual_seed(seed)
    try:
        with device:
            model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=dtype, attn_implementation=attention.INTERFACE, trust_remote_code=False
            )
    except Exception as error:
        raise ModelError(f"{path}: cannot build the model: {_first_line(error)}") from error
    return model


def _with_weights(
    path: Path, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    if not any(path.glob("*.safetensors")):
        pickles = any(True for pattern in _PICKLES for _ in path.glob(pattern))
        why = "only pickled weights, which are not safe to read; convert them to" if pickles else "no"
        raise ModelError(f"{path}: it has {why} safetensors")
    loaded: tuple[PreTrainedModel, Mapping[str, Collection[object]]]
    try:
        loaded = AutoModelForCausalLM.from_pretrained(  # type: ignore[assignment]
            path,
            config=config,
            dtype=dtype,
            attn_implementation=attention.INTERFACE,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # a truncated file, tensors of other shapes, a field that the family lacks
        raise ModelError(f"{path}: cannot load the weights: {_first_line(error)}") from error
    model, info = loaded
    for what in ("missing", "mismatched"):
        keys = info.get(f"{what}_keys") or ()
        if keys:
            names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in keys)
            raise ModelError(f"{path}: {len(names)} tensors are {what} in the weights, such as {names[0]}")
    on_device: PreTrainedModel = model.to(device)  # type: ignore[arg-type]
    return on_device


def _probe(
    path: Path, model: PreTrainedModel, device: torch.device, max_model_len: int
) -> tuple[LayerSpec, ...]:
    """What each attention layer stores, from a forward pass over two tokens that attend to nothing."""
    specs: dict[int, LayerSpec] = {}
    num_calls = 0

    def note(call: AttentionCall) -> torch.Tensor:
        nonlocal num_calls
        num_calls += 1
        window = call.window if call.window and call.window < max_model_len else None
        key_dim, value_dim = call.key.shape[-1], call.value.shape[-1]
        specs[call.layer] = LayerSpec(call.layer, call.key.shape[0], key_dim, value_dim, window)
        return call.query.new_zeros(call.query.shape[1], call.query.shape[0], value_dim)

    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    try:
        with torch.inference_mode(), answering(note):
            model(input_ids=ids, position_ids=torch.arange(2, device=device)[None], use_cache=False)
    except Exception as error:
        raise ModelError(
            f"{path}: {model.config.model_type} cannot run paged: {_first_line(error)}"
        ) from error
    num_layers = model.config.get_text_config().num_hidden_layers
    if not num_calls == len(specs) == num_layers:
        raise ModelError(
            f"{path}: {model.config.model_type} has {num_layers} layers of which {num_calls} attend through"
            " transformers' attention interface, so it cannot run paged"
        )
    return tuple(specs[layer] for layer in sorted(specs))


def _num_embeddings(model: PreTrainedModel) -> int:
    embeddings = model.get_input_embeddings()
    if not isinstance(embeddings, nn.Embedding):
        raise ModelError(f"{model.config.model_type} has no token embeddings")
    return embeddings.num_embeddings


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
