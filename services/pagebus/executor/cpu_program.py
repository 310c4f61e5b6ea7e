"""A model as a flat list of layers that our CPU kernels run in one call. Knows modules by watching them.

One forward pass of the modules is watched. Each layer's parts are told by what they did (`cpu_parts.py`);
then the kernels run each layer on the inputs that it was seen to get, and the whole model at last.
The program is taken only where all of it gives the same. It holds for any model that fits.
"""

import ctypes
import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from pagebus.executor.attention import AttentionCall, FusedCall, answering
from pagebus.executor.cpu_cache import CpuCache
from pagebus.executor.cpu_linears import CpuLinear
from pagebus.executor.cpu_parts import (
    AttentionPart,
    MlpPart,
    NormPart,
    Seen,
    find_attention,
    find_mlp,
    find_norm,
    is_same,
)
from pagebus.executor.cpu_run import CpuProgram, HeadShape, Rotary
from pagebus.executor.kv_cache import LayerSpec
from pagebus.executor.rotary import RotaryTable
from pagebus.kernels.cpu_library import LayerStruct, ModelStruct, NormStruct
from pagebus.kernels.kv_write import BLOCK_SIZE
from pagebus.kernels.paged_attention import RowSpan

_log = logging.getLogger(__name__)

_MOST_TOKENS = 37  # of the watched pass: more than two blocks, and not whole ones
_NORM_ORDERS = {
    "NANM": ("before_attention", "before_mlp"),
    "NANNMN": ("before_attention", "after_attention", "before_mlp", "after_mlp"),
    "ANMN": ("after_attention", "after_mlp"),
}
"""Where a layer's norms stand, by the order in which norms (N), attention (A) and the rest (M) ran."""


class _Unfit(Exception):  # noqa: N818
    """Why the kernels cannot run a model."""


@dataclass(slots=True)
class _Watched:
    """One forward pass of the modules."""

    seen: dict[nn.Module, Seen] = field(default_factory=dict)
    order: list[nn.Module] = field(default_factory=list)  # as they were called
    calls: dict[int, AttentionCall] = field(default_factory=dict)
    given: dict[int, torch.Tensor] = field(default_factory=dict)
    rotary: list[tuple[RotaryTable, str | None, object]] = field(default_factory=list)


def find_program(
    model: nn.Module, specs: tuple[LayerSpec, ...], cache: CpuCache, vocab_size: int, max_len: int
) -> CpuProgram | None:
    """The model as a program over `cache`, or None where the kernels do not give what its modules give.

    It is tried on pages of its own, which hold numbers as they are: rounding to bytes would hide faults.
    """
    num_tokens = min(_MOST_TOKENS, max_len)
    num_blocks = -(-num_tokens // BLOCK_SIZE)
    spans = [[RowSpan(0, num_tokens, 0, np.arange(num_blocks))] for _ in cache.windows]
    tried_on = CpuCache(specs, [num_blocks] * len(cache.windows), cache.library)
    ids = (torch.arange(num_tokens) * 7 + 3) % vocab_size
    try:
        with torch.inference_mode():
            watched = _watch(model, tried_on, ids, spans)
            program = _build(model, specs, tried_on, watched)
            _check(model, program, watched, ids, spans)
    except _Unfit as unfit:
        _log.info("the model's modules run one by one: %s", unfit)
        return None
    program.use(cache)
    _log.info("all %d layers run in compiled kernels", len(specs))
    return program


def _watch(model: nn.Module, cache: CpuCache, ids: torch.Tensor, spans: list[list[RowSpan]]) -> _Watched:
    watched = _Watched()
    answer = cache.answer(spans, len(ids))

    def before(module: nn.Module, _: object) -> None:
        watched.order.append(module)

    def after(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
        watched.seen[module] = Seen(args, kwargs, output)
        if isinstance(module, RotaryTable):
            kind = kwargs.get("layer_type", args[2] if len(args) > 2 else None)
            watched.rotary.append((module, kind if isinstance(kind, str) else None, output))

    def attend(call: AttentionCall | FusedCall) -> torch.Tensor:
        if isinstance(call, FusedCall):
            raise TypeError("the modules are watched before they are fused")
        watched.calls[call.layer] = call
        watched.given[call.layer] = answer(call)
        return watched.given[call.layer]

    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(module.register_forward_pre_hook(before).remove)
            stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        stack.enter_context(answering(attend))
        positions = torch.arange(len(ids))[None]
        model(input_ids=ids[None], position_ids=positions, use_cache=False)
    return watched


def _build(model: nn.Module, specs: tuple[LayerSpec, ...], cache: CpuCache, watched: _Watched) -> CpuProgram:
    layers = _layers(model, watched)
    if len(layers) != len(specs):
        raise _Unfit(f"{len(layers)} of {len(specs)} layers are decoder layers")
    structs = (LayerStruct * len(layers))()
    kept: list[object] = []
    rotary: dict[tuple[int, str | None], Rotary] = {}
    for at, (layer, attention) in enumerate(layers):
        number = vars(attention)["layer_idx"]
        if number != at or at not in watched.calls:
            raise _Unfit("its layers are not called in order")
        _fill_layer(structs[at], layer, attention, specs[at], cache, watched, kept)
        table = _rotary_of(attention, watched)
        rotary.setdefault((id(table[0]), table[1]), Rotary(*table)).layers.append(structs[at])
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    if not isinstance(embedding, nn.Embedding):
        raise _Unfit("it has no plain embedding")
    first, last = layers[0][0], layers[-1][0]
    hidden = watched.seen[first].input
    after = watched.seen[last].made
    if hidden is None or after is None:
        raise _Unfit("its layers take no hidden states")
    norm = next(
        (part for module, part in _norms(model, watched) if watched.seen[module].input is after), None
    )
    head = model.get_output_embeddings()  # type: ignore[operator]
    if norm is None or not isinstance(head, CpuLinear):
        raise _Unfit("what follows its layers is no norm and a head")
    kept += [norm, embedding.weight]
    struct = ModelStruct(
        layers=ctypes.addressof(structs), embedding=embedding.weight.data_ptr(), last=_norm(norm, kept),
        num_layers=len(layers), hidden=hidden.shape[-1], residual_scale=_residual_scale(first),
        embedding_scale=_scale(embedding.weight, watched.seen[embedding], hidden),
    )  # fmt: skip
    return CpuProgram(cache, structs, struct, list(rotary.values()), head, _head_shape(model), kept)


def _layers(model: nn.Module, watched: _Watched) -> list[tuple[nn.Module, nn.Module]]:
    """The decoder layers in the order of their calls, each with its attention."""
    found: dict[nn.Module, nn.Module] = {}
    for parent in model.modules():
        for child in parent.children():
            if isinstance(vars(child).get("layer_idx"), int) and child in watched.seen:
                found[parent] = child
    return [(module, found[module]) for module in watched.order if module in found]


def _norms(parent: nn.Module, watched: _Watched) -> Iterator[tuple[nn.Module, NormPart]]:
    for module in parent.modules():
        if not any(True for _ in module.children()) and module in watched.seen:
            part = find_norm(module, watched.seen[module])
            if part is not None:
                yield module, part


def _is_idle(module: nn.Module, watched: _Watched) -> bool:
    """Whether it gives back what it takes: dropout, for one."""
    inputs, made = watched.seen[module].input, watched.seen[module].made
    return (
        inputs is not None and made is not None and inputs.shape == made.shape and torch.equal(inputs, made)
    )


def _fill_layer(
    struct: LayerStruct, layer: nn.Module, attention: nn.Module, spec: LayerSpec, cache: CpuCache,
    watched: _Watched, kept: list[object],
) -> None:  # fmt: skip
    """Tell what each part of a layer does. Raises `_Unfit`."""
    children = [
        module
        for module in watched.order
        if module in set(layer.children()) and not _is_idle(module, watched)
    ]
    norms = {module: part for child in children for module, part in _norms(child, watched) if module is child}
    order = "".join("A" if child is attention else "N" if child in norms else "M" for child in children)
    if order not in _NORM_ORDERS:
        raise _Unfit(f"{type(layer).__name__} calls its parts in an order of its own ({order})")
    placed = zip(_NORM_ORDERS[order], (norms[child] for child in children if child in norms), strict=True)
    for name, part in placed:
        setattr(struct, name, _norm(part, kept))
    call = watched.calls[spec.layer]
    found = find_attention(attention, watched.seen[attention], call, watched.given[spec.layer])
    if found is None:
        raise _Unfit(f"{type(attention).__name__} does something of its own")
    rest = next(child for child in children if child is not attention and child not in norms)
    mlp = find_mlp(rest, watched.seen[rest])
    if mlp is None:
        raise _Unfit(f"{type(rest).__name__} does something of its own")
    kept += [found, mlp]
    _fill_attention(struct, found, call, spec, cache, kept)
    _fill_mlp(struct, mlp)


def _fill_attention(
    struct: LayerStruct,
    part: AttentionPart,
    call: AttentionCall,
    spec: LayerSpec,
    cache: CpuCache,
    kept: list[object],
) -> None:
    struct.qkv, struct.out = part.qkv.struct, part.out.struct
    if part.query_norm is not None and part.key_norm is not None:
        struct.query, struct.key = _norm(part.query_norm, kept), _norm(part.key_norm, kept)
    struct.is_norm_over_heads, struct.is_interleaved = part.is_norm_over_heads, part.is_interleaved
    struct.num_turned = part.num_turned
    struct.group = cache.group_of[spec.layer]
    struct.window = spec.window or 0
    struct.heads = spec.num_heads
    struct.scale, struct.softcap = call.scale, call.softcap or 0.0
    if call.sinks is not None:
        sinks = call.sinks.detach().float().contiguous()
        kept.append(sinks)
        struct.sinks = sinks.data_ptr()


def _fill_mlp(struct: LayerStruct, part: MlpPart) -> None:
    struct.up, struct.down = part.up.struct, part.down.struct
    struct.activation, struct.is_gated = part.activation, part.is_gated


def _norm(part: NormPart, kept: list[object]) -> NormStruct:
    weight = part.weight.contiguous()
    bias = None if part.bias is None else part.bias.contiguous()
    kept += [weight, bias]
    return NormStruct(
        weight.data_ptr(), None if bias is None else bias.data_ptr(), part.eps, part.is_centered
    )


def _rotary_of(attention: nn.Module, watched: _Watched) -> tuple[RotaryTable, str | None]:
    factors = watched.seen[attention].kwargs.get("position_embeddings")
    for table, kind, output in watched.rotary:
        if isinstance(factors, tuple) and isinstance(output, tuple) and factors[0] is output[0]:
            return table, kind
    raise _Unfit("its rotary factors come from somewhere else")


def _scale(weight: torch.Tensor, seen: Seen, hidden: torch.Tensor) -> float:
    """What embeddings are multiplied by before the first layer."""
    ids = seen.args[0] if seen.args else seen.kwargs["input"]
    if not isinstance(ids, torch.Tensor):
        raise _Unfit("its embedding takes no ids")
    plain = weight[ids].double()
    scale = float((plain * hidden.double()).sum() / plain.square().sum())
    scale = 1.0 if abs(scale - 1.0) < 1e-3 and is_same(plain, hidden) else scale
    if not is_same(plain * scale, hidden):
        raise _Unfit("its embeddings are changed before the first layer")
    return scale


def _residual_scale(layer: nn.Module) -> float:
    scale = vars(layer).get("residual_multiplier", 1.0)
    return float(scale) if isinstance(scale, int | float) else 1.0


def _head_shape(model: nn.Module) -> HeadShape:
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    scaling = getattr(config, "logits_scaling", None) or 1.0
    return HeadShape(float(scaling), getattr(config, "final_logit_softcapping", None))


def _check(
    model: nn.Module, program: CpuProgram, watched: _Watched, ids: torch.Tensor, spans: list[list[RowSpan]]
) -> None:
    """Each layer by itself, then all of it. Raises `_Unfit`."""
    positions = np.arange(len(ids), dtype=np.int32)
    for at, (layer, _) in enumerate(_layers(model, watched)):
        seen = watched.seen[layer]
        if seen.input is None or seen.made is None:
            raise _Unfit("its layers take no hidden states")
        made = program.one_layer(at, seen.input[0], positions, spans)
        if not is_same(made, seen.made[0]):
            raise _Unfit(f"layer {at} gives something else in the kernels")
    normed, is_finite = program.run(ids.numpy(), positions, spans)
    logits = program.logits(normed)
    wanted = watched.seen[model].output.logits[0]  # type: ignore[attr-defined]
    # Rounding adds up over the layers: here the two are only held side by side.
    difference = (logits - wanted.float()).abs().mean() / wanted.float().std()
    limit = 1e-3 if wanted.dtype == torch.float32 else 0.2
    if not bool(is_finite.all()) or not float(difference) <= limit:
        raise _Unfit(f"its logits differ in the kernels by {float(difference):.2g} standard deviations")
