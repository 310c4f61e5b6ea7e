"""Checkpoints whose weights are stored in fp8 with scales beside them. Knows no model and no device's memory.

A weight of [out, in] stored as e4m3 has a tensor of scales, which it is multiplied by: one for all of it, one
for each output, or one for each block. Formats: compressed-tensors' "float-quantized" (llm-compressor's)
and the "fp8" of DeepSeek V3 and others, whose scales end in `_scale_inv` and are multiplied all the same.
Scales of activations that were fixed at calibration are left aside: ours come from each row.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors import safe_open

from pagebus.executor.errors import ModelError

_STORED = torch.float8_e4m3fn
_SCALES = ("weight_scale", "weight_scale_inv")
_LEFT_ASIDE = (*_SCALES, "input_scale", "output_scale", "k_scale", "v_scale", "activation_scale")


def block_of(path: Path, config: Mapping[str, object]) -> tuple[int, int] | None:
    """The blocks of a `quantization_config` that can be read, None where it has none. Raises `ModelError`."""
    method = config.get("quant_method")
    if method == "fp8":
        return _block(path, config.get("weight_block_size"))
    if method != "compressed-tensors" or config.get("format") != "float-quantized":
        what = config.get("format") or method or "an unnamed format"
        raise ModelError(f"{path}: its weights are quantized as {what}, which is not supported yet (fp8 is)")
    blocks = set()
    groups = config.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict) or (weights.get("num_bits"), weights.get("type")) != (8, "float"):
            raise ModelError(f"{path}: some of its weights are not fp8, which is not supported yet")
        blocks.add(_block(path, weights.get("block_structure")))
    if len(blocks) > 1:
        raise ModelError(f"{path}: its weights have scales for blocks of several sizes")
    return blocks.pop() if blocks else None


def _block(path: Path, found: object) -> tuple[int, int] | None:
    match found:
        case None:
            return None
        case [int() as rows, int() as columns] if rows > 0 and columns > 0:
            return rows, columns
    raise ModelError(f"{path}: its quantization_config names blocks of {found!r}")


class ScaledWeight:
    """Stands for a tensor of a file, like a slice of one: `[...]` reads it, scaled, on the device.

    What transformers asks of a slice is that alone.
    """

    def __init__(
        self,
        name: str,
        files: tuple["safe_open", "safe_open"],
        scale: str,
        block: tuple[int, int] | None,
        device: torch.device,
    ) -> None:
        self._name, self._files, self._scale = name, files, scale
        self._block, self._device = block, device

    def __getitem__(self, _: object) -> torch.Tensor:
        stored, scales = (
            file.get_tensor(name).to(self._device)  # type: ignore[no-untyped-call]
            for file, name in zip(self._files, (self._name, self._scale), strict=True)
        )
        return scaled(self._name, stored, scales, self._block)


def scaled(
    name: str,
    stored: torch.Tensor,  # [..., out, in], e4m3
    scales: torch.Tensor,  # one, one an output, or one a block
    block: tuple[int, int] | None,
) -> torch.Tensor:
    """The weight in float32. Raises `ModelError` where the scales do not fit it."""
    wide, scales = stored.float(), scales.float()
    if scales.numel() == 1:
        return wide * scales.reshape(())
    if stored.dim() == 2 and scales.numel() == len(stored) and scales.shape[0] == len(stored):
        return wide * scales.reshape(-1, 1)
    if block is not None and stored.dim() == scales.dim() == 2:
        sizes = [-(-size // step) for size, step in zip(stored.shape, block, strict=True)]
        if list(scales.shape) == sizes:
            spread = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
            return wide * spread[: stored.shape[0], : stored.shape[1]]
    raise ModelError(
        f"{name} of {list(stored.shape)} has scales of {list(scales.shape)}"
        + ("" if block is None else f" for blocks of {list(block)}")
    )


@contextmanager
def state_dict(
    path: Path, files: Sequence[Path], block: tuple[int, int] | None, device: torch.device
) -> Iterator[dict[str, object]]:
    """Names to slices of all tensors that a model is made of; nothing is read before it is asked for.

    Raises `ModelError` where a weight has no scale.
    """
    with ExitStack() as stack:
        where: dict[str, safe_open] = {}
        for file in files:
            opened = stack.enter_context(safe_open(file, framework="pt", device="cpu"))
            where |= dict.fromkeys(opened.keys(), opened)
        found: dict[str, object] = {}
        for name, opened in where.items():
            stem, _, last = name.rpartition(".")
            if last in _LEFT_ASIDE:
                continue
            part = opened.get_slice(name)  # type: ignore[no-untyped-call]
            if part.get_dtype() != "F8_E4M3":
                found[name] = part
                continue
            scale = next(
                (f"{stem}.{s}" for s in _SCALES if last == "weight" and f"{stem}.{s}" in where), None
            )
            if scale is None:
                raise ModelError(f"{path}: {name} is stored in fp8 without a scale")
            found[name] = ScaledWeight(name, (opened, where[scale]), scale, block, device)
        yield found
