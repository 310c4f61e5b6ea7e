"""Makes a transformers model out of a Hugging Face directory, ready for paged attention. Knows no pages.

Only safetensors are read, never a pickle, and no code that comes with a model is run. Whatever is wrong
with a directory is a `ModelError` of one sentence.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from pagebus.executor import attention, checkpoint, weights
from pagebus.executor.attention import Attend, AttentionCall, FusedCall, answering
from pagebus.executor.errors import ModelError, first_line
from pagebus.executor.estimates import estimated_specs, num_weights
from pagebus.executor.gpu_memory import check_fits
from pagebus.executor.invariant import make_row_invariant
from pagebus.executor.kv_cache import LayerSpec, needs_of
from pagebus.executor.latent import keep_latents
from pagebus.executor.memory import return_freed_memory
from pagebus.executor.merging import find_siblings, merge
from pagebus.executor.rotary import fix_rotary
from pagebus.executor.scaled_weights import block_of
from pagebus.kernels import fp8
from pagebus.kernels.cpu_library import library_for
from pagebus.settings.structs import Dtype, KvCacheDtype, LoadFormat, Quantization

_log = logging.getLogger(__name__)

_LAYER_TYPES = {"full_attention", "sliding_attention"}
_TESTED = (
    "Llama, Qwen2, Qwen3, Mistral, Gemma 2, Gemma 3 text, Phi-3, Granite, Nemotron, OLMo 2,"
    " DeepSeek V2 and V3, Mixtral, Qwen3 experts, gpt-oss"
)
_CAN = f"what can: {_TESTED}"
_DEFAULT_LEN = 2048  # where a config does not say
_COMPILER_S = 300.0


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in evaluation mode with our attention, and what the rest must know about it."""

    model: PreTrainedModel
    specs: tuple[LayerSpec, ...]
    vocab_size: int  # ids that may be put in
    max_model_len: int
    dtype: torch.dtype
    device: torch.device
    page_dtype: torch.dtype  # of keys and values
    is_batch_invariant: bool = False  # asked for on a GPU; on a CPU every model is


def load_model(
    path: Path,
    *,
    dtype: Dtype = "auto",
    device: Literal["cpu", "cuda"] = "cpu",
    load_format: LoadFormat = "auto",
    seed: int = 0,
    max_model_len: int = 0,
    kv_cache_dtype: KvCacheDtype = "auto",
    quantization: Quantization = "none",
    is_batch_invariant: bool = False,
    room: int | None = None,
) -> LoadedModel:
    """The model in `path`; `load_format="dummy"` takes random weights and needs only the config.

    `max_model_len` 0 means what the model allows. `room` is what the device has left for it, in bytes: what
    cannot fit is refused before anything is loaded. Raises `ModelError`.
    """
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    attention.register()
    return_freed_memory()
    config = _read_config(path)
    longest = _longest(path, config, max_model_len)
    target = torch.device(device)
    kind = choose_dtype(dtype, config, target)
    pages = _page_dtype(kv_cache_dtype, kind, target)
    if room is not None:
        _check_room(path, config, kind, pages, load_format, longest, is_asked=max_model_len > 0, room=room)
    if load_format == "dummy":
        model = weights.random(path, config, kind, target, seed)
    else:
        model = weights.read(path, config, kind, target)
    model.requires_grad_(False).train(False)
    _check_finite(path, model, kind)
    fix_rotary(model, longest)
    for group in find_siblings(model, lambda: _try_out(path, model, target, _zeros)):
        merge(group)
    num_latent = keep_latents(model)
    if num_latent:
        _log.info("%d layers of latent attention keep their expanding matrices by head", num_latent)
    if target.type == "cpu":
        _pack(model)
    specs = _probe(path, model, target, longest)
    if target.type == "cuda":
        _fuse(path, model, target)
        is_fp8 = quantization == "fp8" or weights.quantization_of(config) is not None
        _swap_products(path, model, is_fp8=is_fp8, is_batch_invariant=is_batch_invariant)
    elif quantization == "fp8":
        raise ModelError(f"{path}: --quantization fp8 needs a CUDA device")
    return LoadedModel(
        model=model,
        specs=specs,
        vocab_size=_num_embeddings(model),
        max_model_len=longest,
        dtype=kind,
        device=target,
        page_dtype=pages,
        is_batch_invariant=is_batch_invariant,
    )


def _page_dtype(asked: KvCacheDtype, kind: torch.dtype, device: torch.device) -> torch.dtype:
    """What keys and values are stored in; on a CPU its kernels are compiled then. Raises `ModelError`."""
    if asked == "auto":
        return kind
    if device.type == "cpu":
        library_for(kind, patience_s=_COMPILER_S)  # nothing else here attends to pages of bytes
    if asked == "int8" and device.type == "cuda":
        raise ModelError("--kv-cache-dtype int8 needs a CPU; on a CUDA device fp8 takes as little memory")
    return torch.int8 if asked == "int8" else fp8.DTYPE


def _pack(model: PreTrainedModel) -> None:
    """Put row-invariant modules in the place of the model's, and say what that costs."""
    for copy in make_row_invariant(model):
        _log.info(
            "%s is kept twice, packed and as the embedding: a second copy of %.1f MiB",
            copy.name, copy.num_bytes / 2**20,
        )  # fmt: skip


def _check_room(
    path: Path,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    pages: torch.dtype,
    load_format: LoadFormat,
    max_model_len: int,
    *,
    is_asked: bool,
    room: int,
) -> None:
    """Refuse what cannot fit by the sizes that the config and the files' headers tell."""
    is_scaled = weights.quantization_of(config) is not None
    if load_format == "dummy":
        numbers = num_weights(config)
    else:
        numbers = checkpoint.check(path, is_scaled=is_scaled).num_numbers
    groups = needs_of(estimated_specs(config, max_model_len), pages)
    check_fits(
        str(path), numbers * dtype.itemsize, groups, max_model_len=max_model_len, is_asked=is_asked, left=room
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
        raise ModelError(f"{path}: its config.json is not JSON: {first_line(error)}") from None
    if not isinstance(raw, dict):
        raise ModelError(f"{path}: its config.json is not a JSON object")
    _check_family(path, raw)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            path, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # whatever transformers makes of a wrong field
        raise ModelError(f"{path}: its config.json is not usable: {first_line(error)}") from None
    _check_layers(path, config)
    return config


def _check_family(path: Path, raw: Mapping[str, object]) -> None:
    kind = raw.get("model_type")
    if not isinstance(kind, str):
        raise ModelError(f"{path}: its config.json names no model_type")
    mapping = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if kind not in CONFIG_MAPPING:
        raise ModelError(
            f"{path}: unknown architecture {kind!r} (code that comes with a model is never run); {_CAN}"
        )
    if kind not in mapping:
        raise ModelError(f"{path}: architecture {kind!r} is not a causal language model; {_CAN}")
    named = raw.get("architectures")
    classes = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    causal = mapping[kind]
    if classes and causal not in classes:
        raise ModelError(
            f"{path}: architecture {classes[0]} is not a causal language model ({causal} would be); {_CAN}"
        )
    quantization = raw.get("quantization_config")
    if isinstance(quantization, dict):
        block_of(path, quantization)
    elif quantization is not None:
        raise ModelError(f"{path}: its quantization_config is not a JSON object")


def _check_layers(path: Path, config: PreTrainedConfig) -> None:
    if config.is_encoder_decoder:
        raise ModelError(f"{path}: {config.model_type} has an encoder, only decoders are supported; {_CAN}")
    kinds = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if kinds:
        raise ModelError(
            f"{path}: {config.model_type} has layers of kind {', '.join(sorted(map(str, kinds)))}, which are"
            f" not supported; {_CAN}"
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


def _check_finite(path: Path, model: PreTrainedModel, dtype: torch.dtype) -> None:
    """A NaN in a weight would make every answer fail, one by one; here it has a name."""
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and weight.numel():
            lowest, highest = torch.aminmax(weight)
            if not bool(torch.isfinite(lowest) & torch.isfinite(highest)):
                kind = str(dtype).removeprefix("torch.")
                raise ModelError(f"{path}: {name} holds values that are not finite in {kind}")


def _probe(
    path: Path, model: PreTrainedModel, device: torch.device, max_model_len: int
) -> tuple[LayerSpec, ...]:
    """What each attention layer stores, from a forward pass over two tokens that attend to nothing."""
    specs: dict[int, LayerSpec] = {}
    num_calls = 0

    def note(call: AttentionCall | FusedCall) -> torch.Tensor:
        nonlocal num_calls
        if isinstance(call, FusedCall):
            raise TypeError("layers are looked at before they are fused")
        num_calls += 1
        window = call.window if call.window and call.window < max_model_len else None
        num_heads, _, key_dim = call.query.shape
        num_kv_heads, value_dim = call.key.shape[0], call.value.shape[-1]
        specs[call.layer] = LayerSpec(
            call.layer, num_heads, num_kv_heads, key_dim, value_dim, window, call.is_latent
        )
        return _zeros(call)

    _try_out(path, model, device, note)
    num_layers = model.config.get_text_config().num_hidden_layers
    if not num_calls == len(specs) == num_layers:
        raise ModelError(
            f"{path}: {model.config.model_type} has {num_layers} layers of which {num_calls} attend through"
            f" transformers' attention interface, so it cannot run paged; {_CAN}"
        )
    return tuple(specs[layer] for layer in sorted(specs))


def _fuse(path: Path, model: PreTrainedModel, device: torch.device) -> None:
    """Put Triton's kernels where they do what the model's modules do."""
    from pagebus.kernels.jit import HAS_TRITON  # Triton's import takes long, and a CPU does without

    if not HAS_TRITON:
        _log.warning("there is no Triton here: the model runs unfused, and slowly")
        return
    from pagebus.executor.fusing import fuse

    counts = fuse(model, lambda attend: _try_out(path, model, device, attend, num_tokens=5))
    _log.info("fused modules: %s", ", ".join(f"{count} {kind}" for kind, count in counts.items()))


def _swap_products(path: Path, model: PreTrainedModel, *, is_fp8: bool, is_batch_invariant: bool) -> None:
    """Experts as grouped products; linears in fp8; products of one cut. Raises `ModelError`."""
    from pagebus.kernels.jit import HAS_TRITON

    if not HAS_TRITON:
        if is_fp8 or is_batch_invariant:
            flag = "--batch-invariant" if is_batch_invariant else "fp8"
            raise ModelError(f"{path}: {flag} on a GPU needs Triton, which this machine does not have")
        return
    from pagebus.executor.gpu_experts import group_experts
    from pagebus.executor.gpu_linears import make_batch_invariant, quantize_linears

    num_experts = group_experts(model)
    if num_experts:
        _log.info("%d layers of experts as grouped products", num_experts)
    if is_fp8:
        head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        _log.info("linears in fp8: %d", quantize_linears(model, head, is_fixed=is_batch_invariant))
    if is_batch_invariant:
        counts = make_batch_invariant(model)
        _log.info("batch-invariant: %s", ", ".join(f"{count} {kind}" for kind, count in counts.items()))


def _try_out(
    path: Path, model: PreTrainedModel, device: torch.device, attend: Attend, num_tokens: int = 2
) -> None:
    """A forward pass over a few tokens whose attention `attend` answers. Raises `ModelError`."""
    positions = torch.arange(num_tokens, device=device)[None]
    try:
        with torch.inference_mode(), answering(attend):
            model(input_ids=positions % _num_embeddings(model), position_ids=positions, use_cache=False)
    except Exception as error:
        raise ModelError(
            f"{path}: {model.config.model_type} cannot run paged: {first_line(error)}; {_CAN}"
        ) from error


def _zeros(call: AttentionCall | FusedCall) -> torch.Tensor:
    """Attention to nothing."""
    if isinstance(call, FusedCall):
        raise TypeError("layers are looked at before they are fused")
    num_heads, num_tokens, _ = call.query.shape
    return call.query.new_zeros(num_tokens, num_heads, call.value.shape[-1])


def _num_embeddings(model: PreTrainedModel) -> int:
    embeddings = model.get_input_embeddings()
    if not isinstance(embeddings, nn.Embedding):
        raise ModelError(f"{model.config.model_type} has no token embeddings")
    return embeddings.num_embeddings
