"""Every operator on a model's path against itself: 1, 2, 7 and 32 rows, and prefill against decode.

The operators are the modules of served models, with the inputs that they really get; what is no module
(turning by rotary factors, softmax) is called by itself. Attention: see test_paged_attention.py.
"""

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from pagebus.executor.experts import SteadyRouter
from pagebus.executor.invariant import make_row_invariant
from pagebus.executor.linears import can_pack
from pagebus.executor.model_runner import ModelRunner, build_runner
from pagebus.settings.structs import Dtype, ExecutorSettings
from tests.support.models import FAMILIES, VOCAB_SIZE, make_model
from tests.support.rows import Blocks, Row

NUM_TOKENS = 56  # not padded, and no model has another dimension of this size
SIZES = (1, 2, 7, 32)
DTYPES: list[Dtype] = ["float32", "bfloat16"]
CONTAINERS = ("Model", "ForCausalLM", "DecoderLayer", "Attention", "MLP", "MoE", "Moe", "MoeBlock")

Tensors = tuple[torch.Tensor, ...]
Operator = Callable[..., object]


def tensors(value: object) -> Tensors:
    return (
        tuple(part for part in value if isinstance(part, torch.Tensor))
        if isinstance(value, tuple)
        else (value,)
    )


def of_rows(tensor: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Those rows of the dimension that counts tokens."""
    if NUM_TOKENS not in tensor.shape:
        return tensor
    return tensor.index_select(tensor.shape.index(NUM_TOKENS), torch.tensor(rows))


def first(tensor: torch.Tensor, whole: torch.Tensor, num_rows: int) -> torch.Tensor:
    return tensor.narrow(whole.shape.index(NUM_TOKENS), 0, num_rows) if NUM_TOKENS in whole.shape else tensor


def check(name: str, operator: Operator, inputs: Tensors) -> None:
    """Rows alone (computed twice, as a step is never of one token) and in batches equal the whole's."""
    whole = tensors(operator(*inputs))
    assert any(NUM_TOKENS in part.shape for part in whole)
    for size in SIZES:
        for start in (0, 5, NUM_TOKENS - size):
            rows = list(range(start, start + size))
            given = [of_rows(part, rows if size > 1 else rows * 2) for part in inputs]
            for found, wanted in zip(tensors(operator(*given)), whole, strict=True):
                same = torch.equal(first(found, wanted, size), of_rows(wanted, rows))
                assert same, f"{name}: {size} rows from {start} on differ"


def is_operator(module: nn.Module) -> bool:
    """A module that computes something itself; the router and the experts as a whole."""
    kind = type(module).__name__
    return kind in ("SteadyRouter", "PackedExperts") or not (
        list(module.children()) or kind.endswith(CONTAINERS)
    )


def build(path: Path, kind: str, dtype: Dtype) -> ModelRunner:
    if not can_pack(getattr(torch, dtype)):
        pytest.skip(f"no packed linears for {dtype} on this machine")
    settings = ExecutorSettings(dtype=dtype, device="cpu", kv_cache_memory="8MiB", num_threads=1)
    return build_runner(settings, make_model(kind, path, has_tokenizer=False))


def seen(runner: ModelRunner) -> Iterator[tuple[str, nn.Module, Tensors]]:
    """The model's operators with what they got in a prefill of NUM_TOKENS tokens."""
    calls: dict[str, tuple[nn.Module, Tensors]] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[object, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[object, ...]) -> None:
            calls[name] = (module, tuple(part.clone() for part in inputs if isinstance(part, torch.Tensor)))

        return hook

    modules = dict(runner._loaded.model.named_modules())
    inner = {f"{name}.router" for name, module in modules.items() if isinstance(module, SteadyRouter)}
    for name, module in modules.items():
        if (
            is_operator(module) and name not in inner
        ):  # a router within its stand-in is never called by itself
            module.register_forward_pre_hook(note(name))
    prompt = [11 * i % VOCAB_SIZE for i in range(NUM_TOKENS)]
    runner._program = None  # it asks no modules
    runner.logits([Row(prompt, Blocks(runner).tables(NUM_TOKENS), 1).input(NUM_TOKENS)])
    for name, (module, inputs) in calls.items():
        yield name, module, inputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", FAMILIES)
def test_modules(tmp_path: Path, kind: str, dtype: Dtype) -> None:
    runner = build(tmp_path, kind, dtype)
    kinds = set()
    with torch.inference_mode():
        for name, module, inputs in list(seen(runner)):
            if name == "lm_head":  # it is asked for few rows: here for all
                inputs = (torch.randn(NUM_TOKENS, module.in_features).to(inputs[0].dtype),)
            if NUM_TOKENS in inputs[0].shape and not isinstance(module, nn.Embedding):
                kinds.add(type(module).__name__)
                check(f"{name} ({type(module).__name__})", module, inputs)
    assert kinds & {"PackedLinear", "CpuLinear"}
    assert any("Norm" in kind for kind in kinds)
    if kind.startswith(("deepseek", "mixtral", "qwen3_moe", "gpt_oss")):
        assert {"SteadyRouter", "PackedExperts"} <= kinds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_experts_of_real_width(dtype: torch.dtype, num_threads: int) -> None:
    if not can_pack(dtype):
        pytest.skip(f"no packed linears for {dtype} on this machine")
    config = Qwen3MoeConfig(hidden_size=1536, moe_intermediate_size=704, num_experts=6, num_experts_per_tok=3)
    config._experts_implementation = "eager"
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        with torch.inference_mode():
            block = nn.Sequential(Qwen3MoeSparseMoeBlock(config)).to(dtype)
            for weight in block.parameters():
                weight.normal_(std=0.03)
            inputs = torch.randn(1, NUM_TOKENS, 1536).to(dtype)
            plain = block(inputs)
            assert make_row_invariant(block) == []
            torch.testing.assert_close(block(inputs), plain, rtol=0.02, atol=0.02 * float(plain.std()) + 1e-5)
            check("experts", block, (inputs,))
    finally:
        torch.set_num_threads(before)


TURNS = [
    ("llama", "apply_rotary_pos_emb"), ("gpt_oss", "apply_rotary_pos_emb"), ("phi3", "apply_rotary_pos_emb"),
    ("deepseek_v3", "apply_rotary_pos_emb_interleave"), ("deepseek_v2", "apply_rotary_emb"),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "name"), TURNS)
def test_turning_by_rotary_factors(family: str, name: str, dtype: torch.dtype) -> None:
    turn = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)
    query, key = torch.randn(1, 4, NUM_TOKENS, 32).to(dtype), torch.randn(1, 2, NUM_TOKENS, 32).to(dtype)
    angles = torch.randn(1, NUM_TOKENS, 16)
    factors: Tensors = tuple(torch.cat((part, part), -1).to(dtype) for part in (angles.cos(), angles.sin()))
    if family == "gpt_oss":
        factors = (angles.cos().to(dtype), angles.sin().to(dtype))
    elif family == "deepseek_v2":
        factors = (torch.polar(torch.ones_like(angles), angles),)
    check(name, turn, (query, key, *factors))


@pytest.mark.parametrize("width", [500, 151_936])
def test_softmax_over_the_vocabulary(width: int) -> None:
    logits = torch.randn(NUM_TOKENS, width) * 5
    for operator in (torch.softmax, torch.log_softmax):
        check(operator.__name__, lambda rows, operator=operator: operator(rows, -1), (logits,))


def test_an_operator_that_sees_the_batch_is_noticed() -> None:
    with pytest.raises(AssertionError, match="rows from"):
        check("centred", lambda rows: rows - rows.mean(0), (torch.randn(NUM_TOKENS, 8),))
    with pytest.raises(AssertionError, match="rows from"):
        check("placed", lambda rows: rows + torch.arange(len(rows))[:, None], (torch.randn(NUM_TOKENS, 8),))
