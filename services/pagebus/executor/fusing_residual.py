"""Decoder layers whose residual is added and normed in one go, also from one layer to the next. Knows no
kernel and no family: the pair of operations comes from the caller, a layer's form is found by trying.

A layer's end and the next one's beginning are one operation, so the next layer's norm runs at this one's end:

```
as it is     x ─ norm ─ attention ─ add ─ norm ─ MLP ─ add ─▶ x' ─ norm ─ ...
here         (x, normed) ─ attention ─ add+norm ─ MLP ─ add+norm ─▶ (x', normed') ─ ...
```

Layers hand each other x' alone, as before; `Handoff` keeps what was normed of it. Where somebody else has
changed x' on the way it is another tensor, and is normed again.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from pagebus.executor.attention import Attend, answering

AddNorm = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""norm(x + residual) and x + residual; both [..., hidden]."""

FindAddNorm = Callable[[nn.Module, torch.Tensor, torch.Tensor], AddNorm | None]
"""The pair of a module that made the second tensor of the first one; None where it is no such norm."""

IsSame = Callable[[torch.Tensor, torch.Tensor], bool]
"""Whether what was found is what was wanted, as far as rounding goes."""


class Handoff:
    """What was normed of the newest sum; one for all layers of a model."""

    def __init__(self) -> None:
        self._total: torch.Tensor | None = None
        self._normed: torch.Tensor | None = None

    def put(self, total: torch.Tensor, normed: torch.Tensor) -> None:
        """Keep `normed` for whoever gets `total`."""
        self._total, self._normed = total, normed

    def take(self, total: torch.Tensor) -> torch.Tensor | None:
        """What was normed of this very tensor, once."""
        normed = self._normed if self._total is total else None
        self._total = self._normed = None
        return normed


class _Seen(NamedTuple):
    """A module's call."""

    module: nn.Module
    args: tuple[object, ...]
    kwargs: dict[str, object]
    output: object

    @property
    def pair(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A tensor that became another, or None where the call was of another kind."""
        given = self.args[0] if self.args else next(iter(self.kwargs.values()), None)
        if isinstance(given, torch.Tensor) and isinstance(self.output, torch.Tensor):
            return given, self.output
        return None


@dataclass(frozen=True, slots=True)
class _Parts:
    """A layer's children in the order in which they ran, and how they are joined."""

    before: _Seen  # a norm
    attention: nn.Module
    after_attention: nn.Module | None  # a norm of what attention gave: Gemma 2
    add_middle: AddNorm
    mlp: nn.Module
    after_mlp: nn.Module | None
    factor: float  # of what is added: Granite


class ResidualLayer(nn.Module):
    """A decoder layer: what it adds is normed at once, for itself or for the next one."""

    def __init__(self, parts: _Parts, handoff: Handoff, layer: nn.Module) -> None:
        super().__init__()
        self.before, self.attention, self.mlp = parts.before.module, parts.attention, parts.mlp
        self.after_attention, self.after_mlp = parts.after_attention, parts.after_mlp
        self._add_middle, self._factor, self._handoff = parts.add_middle, parts.factor, handoff
        self.add_next: AddNorm | None = None  # of the next layer's first norm
        for name, value in vars(layer).items():  # models ask layers for such as `attention_type`
            if isinstance(value, str | int | float) and name not in vars(self):
                setattr(self, name, value)

    def forward(self, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        normed = self._handoff.take(hidden_states)
        if normed is None:
            normed = self.before(hidden_states)
        attended = _first(self.attention(normed, *args, **kwargs))
        normed, total = self._add_middle(self._scaled(attended, self.after_attention), hidden_states)
        added = self._scaled(_first(self.mlp(normed)), self.after_mlp)
        if self.add_next is None:
            return total + added
        normed, result = self.add_next(added, total)
        self._handoff.put(result, normed)
        return result

    def _scaled(self, values: torch.Tensor, norm: nn.Module | None) -> torch.Tensor:
        if norm is not None:
            values = norm(values)
        return values if self._factor == 1.0 else values * self._factor


class HandedNorm(nn.Module):
    """The norm after the last layer, which that one has run already."""

    def __init__(self, norm: nn.Module, handoff: Handoff) -> None:
        super().__init__()
        self.norm, self._handoff = norm, handoff

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = self._handoff.take(hidden_states)
        return self.norm(hidden_states) if normed is None else normed


def fuse_residuals(
    model: nn.Module, run: Callable[[Attend], object], attend: Attend, find: FindAddNorm, is_same: IsSame
) -> int:
    """Swap decoder layers in place where all of a stack have a stand-in that gives what they gave; how many.

    `run` runs `model` once, with its attention answered by `attend`, whose numbers depend on the call alone.
    Comes before the layers' parts are swapped.
    """
    handoff, num_swapped = Handoff(), 0
    with torch.inference_mode():
        calls = _watch(model, lambda: run(attend))
        for layers in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
            found = [_find_parts(layer, calls, attend, find, is_same) for layer in layers]
            parts = [one for one in found if one is not None]
            if not parts or len(parts) < len(found):
                continue
            last = _norm_after(model, layers[-1], calls)
            following = [_pair_of(one.before, find) for one in parts[1:]]
            following.append(None if last is None else _pair_of(last.call, find))
            for place, (one, add_next) in enumerate(zip(parts, following, strict=True)):
                layer = ResidualLayer(one, handoff, layers[place])
                layer.add_next = add_next
                layers[place] = layer
            if last is not None and following[-1] is not None:
                last.parent.add_module(last.name, HandedNorm(last.call.module, handoff))
            num_swapped += len(parts)
    return num_swapped


def _first(output: object) -> torch.Tensor:
    """What a module gave, without what it gave besides (weights, a router's scores)."""
    found = output[0] if isinstance(output, tuple) else output
    if not isinstance(found, torch.Tensor):
        raise TypeError(f"a {type(found).__name__} is no tensor")
    return found


def _watch(model: nn.Module, run: Callable[[], object]) -> list[_Seen]:
    """The calls of all modules, in the order in which they ended."""
    calls: list[_Seen] = []

    def note(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
        calls.append(_Seen(module, args, kwargs, output))

    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(module.register_forward_hook(note, with_kwargs=True).remove)
        run()
    return calls


def _find_parts(
    layer: nn.Module, calls: list[_Seen], attend: Attend, find: FindAddNorm, is_same: IsSame
) -> _Parts | None:
    """How the layer is made, if a stand-in made of its parts gives what it gave."""
    own = [call for call in calls if call.module is layer]
    children = {id(child) for child in layer.children() if not isinstance(child, nn.Dropout | nn.Identity)}
    ran = [call for call in calls if id(call.module) in children]
    if len(own) != 1 or not isinstance(own[0].output, torch.Tensor):
        return None
    for factor in (1.0, *{value for value in vars(layer).values() if isinstance(value, float)}):
        parts = _parts(ran, factor, find)
        if parts is None:
            return None
        with answering(attend):
            try:
                given = ResidualLayer(parts, Handoff(), layer)(*own[0].args, **own[0].kwargs)
            except (TypeError, RuntimeError, ValueError):  # parts that want to be called in another way
                return None
        if is_same(given, own[0].output):
            return parts
    return None


def _parts(ran: list[_Seen], factor: float, find: FindAddNorm) -> _Parts | None:
    match ran:
        case [before, attention, middle, mlp]:
            add_middle = _pair_of(middle, find)
            if add_middle is not None:
                return _Parts(before, attention.module, None, add_middle, mlp.module, None, factor)
        case [before, attention, after, middle, mlp, last]:
            add_middle = _pair_of(middle, find)
            if add_middle is not None:
                return _Parts(
                    before, attention.module, after.module, add_middle, mlp.module, last.module, factor
                )
    return None


def _pair_of(call: _Seen, find: FindAddNorm) -> AddNorm | None:
    return None if call.pair is None else find(call.module, *call.pair)


class _Place(NamedTuple):
    """A call of a child, and where the child stands."""

    parent: nn.Module
    name: str
    call: _Seen


def _norm_after(model: nn.Module, layer: nn.Module, calls: list[_Seen]) -> _Place | None:
    """The module that is called with what the last layer gave."""
    given = next((call.output for call in calls if call.module is layer), None)
    for call in calls:
        if call.pair is not None and call.pair[0] is given:
            for parent in model.modules():
                for name, child in parent.named_children():
                    if child is call.module:
                        return _Place(parent, name, call)
    return None
