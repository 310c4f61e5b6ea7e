"""Layers whose residual is added and normed in one kernel give what they gave (interpreted)."""

import pytest

pytest.importorskip("triton")

import torch
from transformers import PreTrainedModel

from pagebus.executor.attention import INTERFACE, AttentionCall, FusedCall, answering, register
from pagebus.executor.fusing import _add_norm, _is_same, fuse
from pagebus.executor.fusing_residual import HandedNorm, Handoff, ResidualLayer, fuse_residuals
from pagebus.kernels import triton_norm
from pagebus.kernels.jit import IS_INTERPRETED
from tests.support.models import TINY, random_model

pytestmark = pytest.mark.skipif(not IS_INTERPRETED, reason="needs TRITON_INTERPRET=1 before triton's import")
NUM_LAYERS = 2


def attend(call: AttentionCall | FusedCall) -> torch.Tensor:
    """The values' mean so far, which depends on every number that came in."""
    assert isinstance(call, AttentionCall)
    share = call.query.shape[0] // call.value.shape[0]
    counts = torch.arange(1, call.value.shape[1] + 1)[:, None]
    return (call.value.cumsum(1) / counts).repeat_interleave(share, 0).transpose(0, 1)


def tiny(kind: str) -> PreTrainedModel:
    register()
    model = random_model(TINY[kind]()).requires_grad_(False).eval()
    model.set_attn_implementation(INTERFACE)
    return model


def logits(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    given = torch.tensor([ids])
    with torch.inference_mode(), answering(attend):
        out = model(input_ids=given, position_ids=torch.arange(len(ids))[None], use_cache=False).logits
    return out[0]


def fused(model: PreTrainedModel) -> int:
    def run(answer) -> None:
        with torch.inference_mode(), answering(answer):
            model(input_ids=torch.arange(5)[None], position_ids=torch.arange(5)[None], use_cache=False)

    return fuse_residuals(model, run, attend, _add_norm, _is_same)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "granite", "mixtral", "deepseek_v3", "gpt_oss"])
def test_layers_give_what_they_gave(monkeypatch, kind) -> None:
    model = tiny(kind)
    wanted = logits(model, [3, 9, 27, 1])
    assert fused(model) == NUM_LAYERS
    assert isinstance(model.model.norm, HandedNorm)
    launched = []
    real = triton_norm._rms_norm

    class Counted:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: (launched.append(args[1] is not None), real[grid](*args, **kwargs))

    monkeypatch.setattr(triton_norm, "_rms_norm", Counted())
    found = logits(model, [3, 9, 27, 1])
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=2e-4)
    assert launched == [True] * (2 * NUM_LAYERS), "one in the middle and one at the end of each layer"
    torch.testing.assert_close(logits(model, [5]), logits(tiny(kind), [5]), atol=2e-4, rtol=2e-4)


def test_layers_that_norm_before_they_add_stay() -> None:
    model = tiny("olmo2")
    before = list(model.model.layers)
    assert fused(model) == 0
    assert list(model.model.layers) == before


def test_a_model_with_one_strange_layer_stays_whole() -> None:
    """The last layer adds something else: all layers hand on, or none does."""
    model = tiny("llama")
    last = model.model.layers[1]
    last.register_forward_hook(lambda _module, _inputs, output: output * 1.01)
    assert fused(model) == 0
    assert not any(isinstance(layer, ResidualLayer) for layer in model.model.layers)


def test_what_somebody_has_changed_on_the_way_is_normed_again() -> None:
    model, plain = tiny("llama"), tiny("llama")
    assert fused(model) == NUM_LAYERS
    for changed in (model, plain):
        changed.model.layers[0].register_forward_hook(lambda _module, _inputs, output: output + 0.25)
    torch.testing.assert_close(logits(model, [3, 9]), logits(plain, [3, 9]), atol=2e-4, rtol=2e-4)


def test_a_handed_tensor_is_given_once_and_to_its_own_sum_only() -> None:
    handoff, total, normed = Handoff(), torch.ones(2), torch.zeros(2)
    handoff.put(total, normed)
    assert handoff.take(total.clone()) is None
    assert handoff.take(total) is None, "a taken one is forgotten, also where it was another's"
    handoff.put(total, normed)
    assert handoff.take(total) is normed
    assert handoff.take(total) is None


def test_parts_of_fused_layers_are_fused_too() -> None:
    model = tiny("llama")
    plain = logits(model, [3, 9, 27])

    def run(answer) -> None:
        with torch.inference_mode(), answering(answer):
            model(input_ids=torch.arange(5)[None], position_ids=torch.arange(5)[None], use_cache=False)

    counts = fuse(model, run)
    assert counts["residual"] == NUM_LAYERS
    assert counts["norm"] == 1, "the first layer's: the others are part of an addition"
    torch.testing.assert_close(logits(model, [3, 9, 27]), plain, atol=2e-4, rtol=2e-4)
