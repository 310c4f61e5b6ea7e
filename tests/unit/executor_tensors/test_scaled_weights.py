"""Checkpoints in fp8: each layout of scales gives the weights that it stands for; others are named."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations import accelerate as placing

from pagebus.executor import weights
from pagebus.executor.errors import ModelError
from pagebus.executor.loader import load_model
from pagebus.executor.scaled_weights import scaled
from tests.support.models import make_tiny

FP8 = torch.float8_e4m3fn
CHANNELS = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}},
    "ignore": ["lm_head"],
}
BLOCKS = {"quant_method": "fp8", "weight_block_size": [16, 24], "activation_scheme": "dynamic"}
TENSORS = {"quant_method": "fp8", "activation_scheme": "static"}


def quantize(path: Path, config: dict[str, object], kind: str) -> dict[str, torch.Tensor]:
    """Store the linears of the model at `path` in fp8; what they stand for, by name."""
    file = path / "model.safetensors"
    stored, meant = load_file(file), {}
    for name in [name for name in stored if name.endswith("_proj.weight")]:
        weight, stem = stored[name], name.removesuffix("weight")
        match kind:
            case "channel":
                scale = (weight.abs().amax(1, keepdim=True) / 448).bfloat16()
                spread, key = scale.float(), "weight_scale"
            case "tensor":
                scale = weight.abs().max() / 448
                spread, key = scale, "weight_scale"
                stored[stem + "input_scale"] = torch.tensor(0.5)
            case _:
                rows, columns = (-(-size // step) for size, step in zip(weight.shape, (16, 24), strict=True))
                scale = torch.rand(rows, columns) + 0.5
                spread = scale.repeat_interleave(16, 0).repeat_interleave(24, 1)
                spread, key = spread[: weight.shape[0], : weight.shape[1]], "weight_scale_inv"
        stored[name] = (weight / spread).clamp(-448, 448).to(FP8)
        stored[stem + key] = scale
        meant[name] = stored[name].float() * spread
    save_file(stored, file, metadata={"format": "pt"})
    edit(path, config)
    return meant


def edit(path: Path, config: object) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": config}))


@pytest.mark.parametrize(
    ("config", "kind"),
    [(CHANNELS, "channel"), (TENSORS, "tensor"), (BLOCKS, "block")],
    ids=lambda x: str(x)[:9],
)
@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "mixtral"])
def test_weights_are_what_is_stored_times_the_scales(tmp_path, config, kind, family) -> None:
    path = make_tiny(family, tmp_path / "model")
    meant = quantize(path, config, kind)
    assert len(meant) >= 2 * 4
    device = torch.device("cpu")
    from transformers import AutoConfig

    from pagebus.executor import attention

    attention.register()
    read = AutoConfig.from_pretrained(path)
    model = weights.read(path, read, torch.float32, device)
    assert not hasattr(model.config, "quantization_config")
    found = dict(model.named_parameters())
    compared = 0
    for name, weight in meant.items():
        if name in found:
            assert torch.equal(found[name], weight)
            compared += 1
    assert compared >= 4
    if family == "deepseek_v3":
        up = found["model.layers.1.mlp.experts.gate_up_proj"][3]
        names = [f"model.layers.1.mlp.experts.3.{part}_proj.weight" for part in ("gate", "up")]
        assert torch.equal(up, torch.cat([meant[name] for name in names]))
    loaded = load_model(path, dtype="float32")
    assert len(loaded.specs) == 2


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantized as gptq, which is not supported yet"),
        ({**CHANNELS, "format": "pack-quantized"}, "quantized as pack-quantized"),
        ({**CHANNELS, "config_groups": {"g": {"weights": {"num_bits": 8, "type": "int"}}}}, "are not fp8"),
        ({**CHANNELS, "config_groups": {"g": {"weights": None}}}, "are not fp8"),
        ({**BLOCKS, "weight_block_size": [0, 128]}, r"blocks of \[0, 128\]"),
        ({**BLOCKS, "weight_block_size": "big"}, "blocks of 'big'"),
        ("fp8", "not a JSON object"),
        ({}, "unnamed format"),
    ],
)
def test_other_formats_are_named(tmp_path, config, said) -> None:
    path = make_tiny("llama", tmp_path / "model")
    edit(path, config)
    with pytest.raises(ModelError, match=said):
        load_model(path)


def test_scales_that_do_not_fit_or_are_missing_are_named(tmp_path) -> None:
    path = make_tiny("llama", tmp_path / "model")
    quantize(path, CHANNELS, "channel")
    stored = load_file(path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    whole = dict(stored)
    stored[f"{name}.weight_scale"] = torch.ones(5)
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"{name}.weight of \[48, 32\] has scales of \[5\]"):
        load_model(path)
    del whole[f"{name}.weight_scale"]
    save_file(whole, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"{name}.weight is stored in fp8 without a scale"):
        load_model(path)


def test_blocks_at_the_edge_are_cut() -> None:
    stored = torch.ones(5, 7).to(FP8)
    scales = torch.arange(6.0).view(2, 3)
    found = scaled("w", stored, scales, (4, 3))
    assert found[:, 0].tolist() == [0, 0, 0, 0, 3]
    assert found[4].tolist() == [3, 3, 3, 4, 4, 4, 5]
    with pytest.raises(ModelError, match=r"for blocks of \[4, 4\]"):
        scaled("w", stored, scales, (4, 4))


def test_a_cpu_says_that_it_does_not_quantize(tmp_path) -> None:
    with pytest.raises(ModelError, match="--quantization fp8 needs a CUDA device"):
        load_model(make_tiny("llama", tmp_path / "model"), quantization="fp8")


def test_transformers_reads_straight_to_one_device(tmp_path) -> None:
    """Without the accelerate package, which it asks for and does not use. The device is the host here."""
    from transformers import AutoConfig, AutoModelForCausalLM

    path = make_tiny("mixtral", tmp_path / "model")
    before = placing.is_accelerate_available
    with weights._straight_to(torch.device("cuda")) as device_map:
        assert device_map == {"": torch.device("cuda")}
        model = AutoModelForCausalLM.from_pretrained(
            path, config=AutoConfig.from_pretrained(path), device_map={"": torch.device("cpu")}
        )
    assert placing.is_accelerate_available is before
    plain = AutoModelForCausalLM.from_pretrained(path)
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other), name
