"""Runs a model's program of CPU kernels: one call a step, or one a layer of a long one. Knows no modules."""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from pagebus.executor.cpu_cache import CpuCache
from pagebus.executor.cpu_linears import CpuLinear
from pagebus.executor.rotary import RotaryTable
from pagebus.kernels.cpu_library import LayerStruct, ModelStruct, PackedRows, StepStruct, aligned, pack_rows
from pagebus.kernels.paged_attention import RowSpan

_TOKENS_AT_ONCE = 64
"""A step of more tokens is a call a layer, so that whoever watches sees it get on."""

Ints = npt.NDArray[np.int32]


@dataclass(slots=True)
class Rotary:
    """Rotary factors of some layers, in float32; grown as positions ask for it."""

    table: RotaryTable
    layer_type: str | None
    layers: list[LayerStruct] = field(default_factory=list)
    _cos: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # [positions, factors]
    _sin: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def reach(self, length: int, dtype: torch.dtype) -> None:
        """Have factors for positions below `length`."""
        if length <= len(self._cos):
            return
        found = self.table.factors(torch.empty(0, dtype=dtype), self.layer_type, length)
        self._cos, self._sin = (part[0].float().contiguous() for part in found[:2])
        for layer in self.layers:
            layer.cos, layer.sin = self._cos.data_ptr(), self._sin.data_ptr()
            layer.factors = self._cos.shape[1]


@dataclass(frozen=True, slots=True)
class HeadShape:
    """What becomes of the head's product."""

    scaling: float  # it is divided by this
    softcap: float | None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        if self.scaling != 1.0:
            logits = logits / self.scaling
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


class CpuProgram:
    """A model's layers over a cache's pages."""

    def __init__(
        self, cache: CpuCache, layers: "ctypes.Array[LayerStruct]", model: ModelStruct, rotary: list[Rotary],
        head: CpuLinear, shape: HeadShape, kept: list[object],
    ) -> None:  # fmt: skip
        """`kept`: what the structures point to."""
        self._library, self._layers = cache.library, layers
        self.use(cache)
        self._model, self._rotary, self._head, self._shape, self._kept = model, rotary, head, shape, kept
        self._capacity = 0
        self._hidden = self._normed = self._scratch = torch.empty(0)
        self._is_finite = np.empty(0, dtype=np.uint8)

    def use(self, cache: CpuCache) -> None:
        """Go on with the pages of `cache`, which has the same layers."""
        self._cache = cache
        for at, layer in enumerate(self._layers):
            layer.pages = cache.layer_pages(at).struct()

    def run(
        self,
        ids: npt.NDArray[np.int64],  # [tokens]
        positions: Ints,  # [tokens]
        spans: list[list[RowSpan]],  # by KV group, then row
        beat: Callable[[], None] | None = None,  # called while a long step gets on
        wanted: Sequence[int] | None = None,  # ascending; None: all
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The hidden states after the last norm, [tokens, hidden], and which are finite, bool [tokens].

        With `wanted` the states of these flat tokens alone, [len(wanted), hidden]: of the others the last
        layer makes keys and values only. Both stand in memory that the next step writes to.
        """
        ids = np.ascontiguousarray(ids)
        step, kept = self._step(positions, spans)
        step.ids = ids.ctypes.data
        num = len(ids)
        if wanted is not None:
            places = np.array(wanted, dtype=np.int64)
            kept.append(places)
            num = step.num_wanted = len(places)
            # An address also where there is none: without one all tokens are wanted.
            step.wanted = places.ctypes.data or step.ids
        num_layers = self._model.num_layers
        at_once = num_layers if len(ids) <= _TOKENS_AT_ONCE else 1
        for first in range(0, num_layers, at_once):
            step.first_layer, step.last_layer = first, first + at_once
            step.is_from_ids = first == 0
            self._library.layers(self._model, step)
            if beat is not None:
                beat()
        del kept
        return self._normed[:num], torch.from_numpy(self._is_finite[: len(ids)] != 0)

    def one_layer(
        self, at: int, hidden: torch.Tensor, positions: Ints, spans: list[list[RowSpan]]
    ) -> torch.Tensor:
        """What layer number `at` makes of `hidden` [tokens, hidden]."""
        step, kept = self._step(positions, spans)
        self._hidden[: len(hidden)] = hidden
        step.first_layer, step.last_layer, step.is_from_ids = at, at + 1, 0
        self._library.layers(self._model, step)
        del kept
        return self._hidden[: len(hidden)].clone()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:  # [rows, hidden] -> [rows, vocabulary], float32
        """The head's logits after normed hidden states."""
        return self._shape(self._library.linear(hidden, self._head.struct, is_wide=True))

    def _step(self, positions: Ints, spans: list[list[RowSpan]]) -> tuple[StepStruct, list[object]]:
        """A step's structure, and what it points to."""
        num_tokens = len(positions)
        self._reserve(num_tokens)
        for rotary in self._rotary:
            rotary.reach(int(positions.max()) + 1, self._library.dtype)
        positions = np.ascontiguousarray(positions, dtype=np.int32)
        rows: list[PackedRows] = [pack_rows(of_group) for of_group in spans]
        tables = (ctypes.c_void_p * len(rows))(*(group.table.ctypes.data for group in rows))
        widths = (ctypes.c_int64 * len(rows))(*(group.table.shape[1] for group in rows))
        step = StepStruct(
            positions=positions.ctypes.data, rows=rows[0].struct(), tables=ctypes.addressof(tables),
            widths=ctypes.addressof(widths), num_tokens=num_tokens, hidden=self._hidden.data_ptr(),
            normed=self._normed.data_ptr(), is_finite=self._is_finite.ctypes.data,
            scratch=self._scratch.data_ptr(),
        )  # fmt: skip
        return step, [positions, rows, tables, widths]

    def _reserve(self, num_tokens: int) -> None:
        if num_tokens <= self._capacity:
            return
        self._capacity = -(-num_tokens // 64) * 64
        size, dtype = (self._capacity, self._model.hidden), self._library.dtype
        num_bytes = size[0] * size[1] * dtype.itemsize
        self._hidden = aligned(num_bytes).view(dtype).view(size)
        self._normed = aligned(num_bytes).view(dtype).view(size)
        self._is_finite = np.empty(self._capacity, dtype=np.uint8)
        self._scratch = aligned(self._library.scratch_bytes(self._model, self._capacity))
