"""Swaps a model's modules for row-invariant ones on the CPU, by its module graph. Knows no family."""

from dataclasses import dataclass

from torch import nn

from pagebus.executor.cpu_linears import CpuLinear
from pagebus.executor.experts import packed_experts, steady_router
from pagebus.executor.linears import PackedLinear, can_pack, stable_activation
from pagebus.kernels.cpu_library import library_for


@dataclass(frozen=True, slots=True)
class SecondCopy:
    """A weight that is kept packed and plain: the model needs it as an embedding too."""

    name: str
    num_bytes: int


def make_row_invariant(model: nn.Module) -> list[SecondCopy]:
    """Swap linears, activations, routers and experts in place; which weights are kept twice.

    A weight is packed when its turn comes and freed at once, so memory never holds two copies of more than
    one module, but for an embedding tied to a linear. On a machine without the packed kernels everything
    stays as it is.
    """
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if not all(can_pack(dtype) for dtype in dtypes):
        return []
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    copies: list[SecondCopy] = []
    _swap(model, "", embeddings, copies)
    return copies


def _swap(parent: nn.Module, prefix: str, embeddings: set[int], copies: list[SecondCopy]) -> None:
    """Depth first: what lies inside experts is swapped too. A list of all modules would keep all weights."""
    for name in list(parent._modules):
        child = parent._modules[name]
        if child is None:
            continue
        _swap(child, f"{prefix}{name}.", embeddings, copies)
        swapped = _stand_in(child)
        if swapped is None:
            continue
        if isinstance(child, nn.Linear) and id(child.weight) in embeddings:
            copies.append(SecondCopy(prefix + name, child.weight.nbytes))
        parent.add_module(name, swapped)


def _stand_in(module: nn.Module) -> nn.Module | None:
    if type(module) is nn.Linear:
        library = library_for(module.weight.dtype)
        if library is None or module.in_features % 2:
            return PackedLinear(module.weight, module.bias)
        return CpuLinear(library, module.weight, module.bias)
    return stable_activation(module) or steady_router(module) or packed_experts(module)
