"""What is wrong with a model directory is said in one sentence."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, PreTrainedConfig

from pagebus.executor.checkpoint import INDEX
from pagebus.executor.errors import ModelError
from pagebus.executor.linears import PackedLinear, StableSiLU, StableTanhGELU, can_pack
from pagebus.executor.loader import choose_dtype, load_model
from pagebus.executor.rotary import RotaryTable
from tests.support.models import CONFIGS, VOCAB_SIZE, make_model, random_model

CPU = torch.device("cpu")


def edit(path: Path, **changes: object) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def truncate(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


SPOILERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda p: (p / "config.json").unlink(), "no config.json"),
    "broken json": (lambda p: (p / "config.json").write_text("{"), "not JSON"),
    "a list": (lambda p: (p / "config.json").write_text("[]"), "not a JSON object"),
    "no type": (lambda p: edit(p, model_type=None), "no model_type"),
    "unknown": (lambda p: edit(p, model_type="nosuch"), "unknown architecture 'nosuch'"),
    "own code": (lambda p: edit(p, model_type="nosuch", auto_map={"AutoConfig": "x.Y"}), "never run"),
    "encoder": (
        lambda p: edit(p, model_type="bert", architectures=["BertModel"]),
        "not a causal language model",
    ),
    "encoder-decoder": (lambda p: edit(p, model_type="t5", architectures=["T5Model"]), "not a causal"),
    "linear attention": (
        lambda p: edit(p, model_type="qwen3_next", architectures=["Qwen3NextForCausalLM"]),
        "linear_attention",
    ),
    "state space": (
        lambda p: edit(p, model_type="mamba", architectures=["MambaForCausalLM"]),
        "linear_attention|cannot",
    ),
    "quantized": (lambda p: edit(p, quantization_config={"quant_method": "x"}), "quantized"),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "it has no safetensors"),
    "weights of another name": (
        lambda p: (p / "model.safetensors").rename(p / "consolidated.safetensors"),
        "has consolidated.safetensors, but neither model.safetensors nor",
    ),
    "a pickle": (lambda p: (p / "model.safetensors").rename(p / "pytorch_model.bin"), "only pickled weights"),
    "truncated": (truncate, "cut short"),
    "empty": (lambda p: (p / "model.safetensors").write_bytes(b""), "cut short"),
    "text": (
        lambda p: (p / "model.safetensors").write_text("version https://git-lfs" * 9),
        "not a safetensors",
    ),
    "header of noise": (
        lambda p: (p / "model.safetensors").write_bytes(b"\x10" + bytes(7) + b"\xff" * 16),
        "its header is not JSON",
    ),
    "a tail": (
        lambda p: (p / "model.safetensors").open("ab").write(b"more"),
        "longer than it says",
    ),
    "float8": (
        lambda p: change_weights(p, lambda w: w.update({"x": torch.zeros(4).to(torch.float8_e4m3fn)})),
        "x is stored as F8_E4M3, which is not supported",
    ),
    "not a number": (
        lambda p: change_weights(p, lambda w: w["model.layers.0.mlp.up_proj.weight"][3].fill_(float("nan"))),
        "model.layers.0.mlp.up_proj.weight holds values that are not finite in float32",
    ),
    "a tensor missing": (
        lambda p: change_weights(p, lambda w: w.pop("model.layers.1.mlp.up_proj.weight")),
        "1 tensors are missing in the weights, such as model.layers.1.mlp.up_proj.weight",
    ),
    "another shape": (
        lambda p: change_weights(p, lambda w: w.update({"model.norm.weight": torch.ones(7)})),
        r"model.norm.weight has shape \[7\] in the weights, but the config asks for \[128\]",
    ),
    "odd sizes": (lambda p: edit(p, num_attention_heads="four"), "config.json|weights"),
}


@pytest.mark.parametrize("name", SPOILERS)
def test_one_clear_sentence(tmp_path: Path, name: str) -> None:
    path = make_model("llama", tmp_path / "model", has_tokenizer=False)
    spoil, reason = SPOILERS[name]
    spoil(path)
    with pytest.raises(ModelError, match=reason) as caught:
        load_model(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def drop_from_shard(path: Path) -> None:
    shard = sorted(path.glob("model-*.safetensors"))[1]
    weights = load_file(shard)
    weights.popitem()
    save_file(weights, shard, metadata={"format": "pt"})


def edit_index(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    index = json.loads((path / INDEX).read_text())
    change(index)
    (path / INDEX).write_text(json.dumps(index))


SHARD_SPOILERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shard missing": (
        lambda p: sorted(p.glob("model-*.safetensors"))[1].unlink(),
        r"shard model-00002-of-\d+.safetensors \(2 of \d+ in model.safetensors.index.json\) is missing",
    ),
    "a shard truncated": (
        lambda p: os.truncate(sorted(p.glob("model-*.safetensors"))[2], 90_000),
        "model-00003-of-.*cut short: 90000 bytes where its header names",
    ),
    "an absent tensor": (drop_from_shard, "says that model-00002-of-.* holds .*weight, but it does not"),
    "index of noise": (lambda p: (p / INDEX).write_text("{]"), "index.json is not JSON"),
    "index without map": (lambda p: edit_index(p, dict.clear), "has no weight_map"),
    "index leading away": (
        lambda p: edit_index(p, lambda i: i["weight_map"].update(x="../../other.safetensors")),
        "names '../../other.safetensors', which is no safetensors file beside it",
    ),
}


@pytest.mark.parametrize("name", SHARD_SPOILERS)
def test_one_clear_sentence_about_shards(tmp_path: Path, name: str) -> None:
    random_model(CONFIGS["llama"]()).save_pretrained(tmp_path, max_shard_size="300KB")
    assert load_model(tmp_path).vocab_size == VOCAB_SIZE
    spoil, reason = SHARD_SPOILERS[name]
    spoil(tmp_path)
    with pytest.raises(ModelError, match=reason) as caught:
        load_model(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["nosuch", "bert", "t5", "mamba", "bloom", "qwen3_next"])
def test_what_cannot_work_is_named_with_what_can(tmp_path: Path, kind: str) -> None:
    path = make_model("llama", tmp_path / "model", has_tokenizer=False)
    edit(path, model_type=kind, architectures=None)
    with pytest.raises(ModelError, match=f"{kind}.*; what can: Llama, .*DeepSeek V2 and V3.*gpt-oss"):
        load_model(path, load_format="dummy")


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model directory"):
        load_model(tmp_path / "absent")


def test_max_model_len(tmp_path: Path) -> None:
    path = make_model("llama", tmp_path / "model", has_tokenizer=False)
    assert load_model(path, max_model_len=100).max_model_len == 100
    with pytest.raises(ModelError, match="--max-model-len 5000 is more than the model's 1024"):
        load_model(path, max_model_len=5000)


def test_dummy_weights_need_only_the_config_and_follow_the_seed(tmp_path: Path) -> None:
    path = make_model("llama", tmp_path / "model", has_tokenizer=False)
    (path / "model.safetensors").unlink()

    def embeddings(seed: int) -> torch.Tensor:
        loaded = load_model(path, load_format="dummy", seed=seed)
        return loaded.model.get_input_embeddings().weight

    assert torch.equal(embeddings(1), embeddings(1))
    assert not torch.equal(embeddings(1), embeddings(2))


@pytest.mark.parametrize(("given", "has_bf16", "expected"), [
    (torch.bfloat16, True, torch.bfloat16),
    (torch.bfloat16, False, torch.float32),
    (torch.float16, True, torch.float32),
    (torch.float32, True, torch.float32),
    (None, True, torch.float32),
])  # fmt: skip
def test_auto_dtype(
    monkeypatch: pytest.MonkeyPatch, given: torch.dtype | None, has_bf16: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr("pagebus.executor.loader._has_bfloat16", lambda: has_bf16)
    config: PreTrainedConfig = LlamaConfig(dtype=given)
    assert choose_dtype("auto", config, CPU) == expected
    assert choose_dtype("bfloat16", config, CPU) == torch.bfloat16
    assert choose_dtype("auto", LlamaConfig(dtype=torch.float16), torch.device("cuda")) == torch.float16


def test_rotary_factors_do_not_depend_on_the_batch() -> None:
    """transformers picks Phi-3's long factors by the largest position present; here they are fixed."""
    from transformers import Phi3Config
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    half = 128 // 4 // 2
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * half, "long_factor": [4.0] * half}
    config = Phi3Config(
        hidden_size=128, num_attention_heads=4, max_position_embeddings=4096,
        original_max_position_embeddings=1024, rope_parameters={"rope_theta": 1e4, **scaling},
        pad_token_id=0,
    )  # fmt: skip
    hidden = torch.zeros(1, 1, 128)
    table = RotaryTable(Phi3RotaryEmbedding(config), 4096)
    low, high = torch.tensor([[5]]), torch.tensor([[5, 3000]])
    alone = table(hidden, low)[0][0, 0]
    assert torch.equal(table(hidden, high)[0][0, 0], alone)
    short = RotaryTable(Phi3RotaryEmbedding(config), 1024)
    assert not torch.equal(short(hidden, low)[0][0, 0], alone)
    original = Phi3RotaryEmbedding(config)(hidden, low)[0][0, 0]
    assert torch.equal(short(hidden, low)[0][0, 0], original)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_linears_are_row_invariant(dtype: torch.dtype) -> None:
    if not can_pack(dtype):
        pytest.skip("no packed linears on this machine")
    torch.manual_seed(0)
    for in_features, out_features in ((192, 512), (100, 37)):
        linear = torch.nn.Linear(in_features, out_features, dtype=dtype)
        packed = PackedLinear(linear.weight, linear.bias)
        inputs = torch.randn(520, in_features).to(dtype)
        alone = torch.cat([packed(row[None]) for row in inputs])
        torch.testing.assert_close(alone, linear(inputs), rtol=0.02, atol=0.02)
        for num_rows in (2, 3, 7, 16, 31, 32, 33, 64, 300, 520):
            for start in (0, 1, 17):
                rows = slice(start, start + num_rows)
                assert torch.equal(packed(inputs[rows]), alone[rows]), (num_rows, start)
    assert packed(inputs[:0]).shape == (0, 37)
    assert packed(inputs.view(2, 260, -1)).shape == (2, 260, 37)


@pytest.mark.parametrize(
    ("stable", "plain"),
    [(StableSiLU(), torch.nn.SiLU()), (StableTanhGELU(), torch.nn.GELU(approximate="tanh"))],
)
def test_activations_do_not_depend_on_the_place(stable: torch.nn.Module, plain: torch.nn.Module) -> None:
    torch.manual_seed(1)
    inputs = torch.randn(3001) * 5
    whole = stable(inputs)
    torch.testing.assert_close(whole, plain(inputs), rtol=1e-5, atol=1e-6)
    for length in (1, 3, 16, 17, 100, 1001):
        for start in (0, 1, 5, 2000):
            assert torch.equal(stable(inputs[start : start + length].clone()), whole[start : start + length])
    extreme = torch.tensor([-1e30, -200.0, 200.0, 1e30])
    assert torch.isfinite(stable(extreme)).all()
