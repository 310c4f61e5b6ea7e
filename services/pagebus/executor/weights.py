"""A transformers model with a directory's weights, or random ones, on a device. Knows no pages.

Weights go to the device one by one: the host never holds all of them where another device does.
"""

import copy
import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations import accelerate as placing
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from pagebus.executor import attention, checkpoint
from pagebus.executor.errors import ModelError, first_line
from pagebus.executor.progress import showing_transformers
from pagebus.executor.scaled_weights import block_of, state_dict

_log = logging.getLogger(__name__)

_Loaded = tuple[PreTrainedModel, Mapping[str, Collection[object]]]
"""What transformers gives: the model, and names of tensors that were missing or of other shapes."""


def random(
    path: Path, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, seed: int
) -> PreTrainedModel:
    """A model with random weights. Raises `ModelError`."""
    torch.manual_seed(seed)
    try:
        with device:
            model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=dtype, attn_implementation=attention.INTERFACE, trust_remote_code=False
            )
    except Exception as error:
        raise ModelError(f"{path}: cannot build the model: {first_line(error)}") from error
    return model


def read(path: Path, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model with the directory's weights, scaled where they are stored in fp8. Raises `ModelError`."""
    quantization = quantization_of(config)
    found = checkpoint.check(path, is_scaled=quantization is not None)
    _log.info(
        "loading %d tensors, %.1f MiB in %d files",
        found.num_tensors,
        found.num_bytes / 2**20,
        found.num_files,
    )
    loaded: _Loaded
    try:
        with showing_transformers("loading weights"), _one_by_one(), _straight_to(device) as device_map:
            options = {
                "config": config,
                "dtype": dtype,
                "attn_implementation": attention.INTERFACE,
                "use_safetensors": True,
                "local_files_only": True,
                "trust_remote_code": False,
                "output_loading_info": True,
                "ignore_mismatched_sizes": True,
                "device_map": device_map,
            }
            if quantization is None:
                loaded = AutoModelForCausalLM.from_pretrained(path, **options)  # type: ignore[assignment]
            else:
                loaded = _scaled(path, config, quantization, found.files, device, options)
    except ModelError:
        raise
    except Exception as error:  # a field that the family lacks, whatever the headers do not show
        raise ModelError(f"{path}: cannot load the weights: {first_line(error)}") from error
    model, info = loaded
    _check_loaded(path, info)
    on_device: PreTrainedModel = model.to(device)  # type: ignore[arg-type]
    return on_device


def quantization_of(config: PreTrainedConfig) -> dict[str, object] | None:
    """The config's `quantization_config`, or None."""
    found = getattr(config, "quantization_config", None)
    return found if isinstance(found, dict) else None


def _scaled(
    path: Path,
    config: PreTrainedConfig,
    quantization: dict[str, object],
    files: Sequence[Path],
    device: torch.device,
    options: dict[str, object],
) -> _Loaded:
    """The model with each weight times its scales, none of transformers' own quantizers asked."""
    plain = copy.copy(config)
    del plain.quantization_config
    kind: type[PreTrainedModel] = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]  # type: ignore[assignment]
    from_pretrained: Callable[..., _Loaded] = kind.from_pretrained  # type: ignore[assignment]
    with state_dict(path, files, block_of(path, quantization), device) as tensors:
        return from_pretrained(None, **{**options, "config": plain, "state_dict": tensors})


def _check_loaded(path: Path, info: Mapping[str, Collection[object]]) -> None:
    for key in info.get("mismatched_keys") or ():
        match key:
            case (name, stored, wanted):
                raise ModelError(
                    f"{path}: {name} has shape {_shape(stored)} in the weights, but the config asks for"
                    f" {_shape(wanted)}"
                )
        raise ModelError(f"{path}: {key} has another shape than the config asks for")
    missing = sorted(map(str, info.get("missing_keys") or ()))
    if missing:
        raise ModelError(f"{path}: {len(missing)} tensors are missing in the weights, such as {missing[0]}")


def _shape(shape: object) -> str:
    return str(list(shape)) if isinstance(shape, torch.Size | list | tuple) else str(shape)


@contextmanager
def _one_by_one() -> Iterator[None]:
    """Let transformers read tensors when it needs them. Ahead, it would hold parts and wholes at once."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def _straight_to(device: torch.device) -> Iterator[dict[str, torch.device] | None]:
    """Let transformers copy each tensor from its file to `device`, none of them kept on the host.

    It asks for the accelerate package before it does so, and uses nothing of it where there is one device.
    """
    if device.type == "cpu":
        yield None
        return
    asked = vars(placing)
    before = asked["is_accelerate_available"]
    asked["is_accelerate_available"] = lambda *_, **__: True
    try:
        yield {"": device}
    finally:
        asked["is_accelerate_available"] = before
