"""The compiled CPU kernels behind Python functions over tensors. Knows the structures of `cpu/step.cpp`.

Every call runs in a pool of as many threads as torch has, without Python's lock.
"""

import ctypes
import os
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pagebus.kernels import cpu_compile
from pagebus.kernels.kv_write import BLOCK_SIZE
from pagebus.kernels.paged_attention import RowSpan

MAX_DIM = 576
"""Numbers of a key or a value at most."""

_KINDS: dict[torch.dtype, cpu_compile.Kind] = {torch.bfloat16: "bf16", torch.float32: "float"}
_PAGE_KINDS = {torch.int8: 1, torch.float8_e4m3fn: 2}
"""The kernels' numbers of pages that have peaks."""

_PATIENCE_VARIABLE = "PAGEBUS_COMPILE_WAIT_S"
_PATIENCE_S = "1"
"""What a start waits for the compiler, which began before torch was imported. Then models go without."""


class LinearStruct(ctypes.Structure):
    """A packed weight."""

    _fields_ = (("weight", c_void_p), ("bias", c_void_p), ("num_in", c_int64), ("num_out", c_int64))


class NormStruct(ctypes.Structure):
    """A norm; without a weight there is none."""

    _fields_ = (("weight", c_void_p), ("bias", c_void_p), ("eps", c_float), ("is_centered", c_int32))


class PagesStruct(ctypes.Structure):
    """A layer's keys and values."""

    _fields_ = (
        *((name, c_void_p) for name in ("keys", "values", "key_peaks", "value_peaks")),
        ("num_blocks", c_int64),
        *((name, c_int32) for name in ("kind", "kv_heads", "key_dim", "value_dim")),
    )


class LayerStruct(ctypes.Structure):
    """A decoder layer."""

    _fields_ = (
        *((name, LinearStruct) for name in ("qkv", "out", "up", "down")),
        *((name, NormStruct) for name in ("before_attention", "after_attention", "before_mlp", "after_mlp")),
        *((name, NormStruct) for name in ("query", "key")),
        ("pages", PagesStruct),
        *((name, c_void_p) for name in ("cos", "sin", "sinks")),
        ("factors", c_int64),
        ("heads", c_int32),
        *((name, c_int32) for name in ("num_turned", "is_interleaved", "is_norm_over_heads")),
        *((name, c_int32) for name in ("window", "group", "activation", "is_gated")),
        *((name, c_float) for name in ("scale", "softcap")),
    )


class ModelStruct(ctypes.Structure):
    """A model's layers and what stands around them."""

    _fields_ = (
        ("layers", c_void_p),
        ("embedding", c_void_p),
        ("last", NormStruct),
        ("num_layers", c_int64),
        ("hidden", c_int64),
        ("embedding_scale", c_float),
        ("residual_scale", c_float),
    )


class RowsStruct(ctypes.Structure):
    """The rows of a step."""

    _fields_ = (("num_rows", c_int32), *((name, c_void_p) for name in ("first", "count", "start")))


class StepStruct(ctypes.Structure):
    """What a step computes, and where."""

    _fields_ = (
        ("ids", c_void_p),
        ("positions", c_void_p),
        ("rows", RowsStruct),
        ("tables", c_void_p),
        ("widths", c_void_p),
        ("num_tokens", c_int64),
        *((name, c_void_p) for name in ("hidden", "normed", "is_finite", "scratch")),
        *((name, c_int64) for name in ("first_layer", "last_layer", "is_from_ids")),
        ("wanted", c_void_p),
        ("num_wanted", c_int64),
    )


class _AttentionStruct(ctypes.Structure):
    _fields_ = (
        ("query", c_void_p),
        ("out", c_void_p),
        ("query_stride", c_int64),
        ("out_stride", c_int64),
        ("pages", PagesStruct),
        *((name, c_void_p) for name in ("tables", "sinks")),
        ("width", c_int64),
        *((name, c_int32) for name in ("heads", "window")),
        *((name, c_float) for name in ("scale", "softcap")),
    )


@dataclass(frozen=True, slots=True)
class LayerPages:
    """A layer's pages in the kernels' order of numbers inside a block.

    Pages of the library's type hold numbers as they are; int8 and float8_e4m3fn pages hold vectors divided by
    their peaks (`executor/kv_cache.py`), which stand beside them.
    """

    keys: torch.Tensor  # [kv_heads, blocks, BLOCK_SIZE, key_dim]; the last block is no row's
    values: torch.Tensor  # [kv_heads, blocks, BLOCK_SIZE, value_dim]
    peaks: tuple[torch.Tensor, torch.Tensor] | None = (
        None  # of keys and values, [kv_heads, blocks, BLOCK_SIZE]
    )

    def struct(self) -> PagesStruct:
        """For a call; valid as long as the tensors are. Raises `ValueError`."""
        kv_heads, num_blocks, _, key_dim = self.keys.shape
        kind = _PAGE_KINDS.get(self.keys.dtype, 0)
        if (kind != 0) != (self.peaks is not None):
            raise ValueError(f"pages in {self.keys.dtype} with{'out' if self.peaks is None else ''} peaks")
        peaks = (None, None) if self.peaks is None else tuple(part.data_ptr() for part in self.peaks)
        return PagesStruct(
            self.keys.data_ptr(), self.values.data_ptr(), *peaks, num_blocks, kind, kv_heads, key_dim,
            self.values.shape[-1],
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class PackedRows:
    """A step's rows as the kernels read them, in one KV group."""

    first: npt.NDArray[np.int32]  # [rows]: the first flat token
    count: npt.NDArray[np.int32]
    start: npt.NDArray[np.int32]  # its position
    table: npt.NDArray[np.int32]  # [rows, width]

    def struct(self) -> RowsStruct:
        """For a call; valid as long as the arrays are."""
        return RowsStruct(
            len(self.first), self.first.ctypes.data, self.count.ctypes.data, self.start.ctypes.data
        )


def pack_rows(spans: list[RowSpan]) -> PackedRows:
    """Lay out the spans of one KV group; tables are cut to the blocks that the rows reach."""
    ends = [span.start + span.num_tokens for span in spans]
    width = max(-(-end // BLOCK_SIZE) for end in ends)
    table = np.full((len(spans), width), -1, dtype=np.int32)
    for row, (span, end) in enumerate(zip(spans, ends, strict=True)):
        num = -(-end // BLOCK_SIZE)
        table[row, :num] = span.table[:num]
    numbers = np.array([(span.token, span.num_tokens, span.start) for span in spans], dtype=np.int32)
    first, count, start = np.ascontiguousarray(numbers.T)
    return PackedRows(first, count, start, table)


class CpuLibrary:
    """The kernels for one type of weights and pages."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._library = library
        library.pb_pool.restype = c_void_p
        library.pb_packed_bytes.restype = c_int64
        library.pb_scratch_bytes.restype = c_int64
        self._pool = c_void_p()
        self._num_threads = 0

    @property
    def pool(self) -> c_void_p:
        """As many threads as torch has now."""
        if self._num_threads != torch.get_num_threads():
            if self._pool:
                self._library.pb_pool_free(self._pool)
            self._num_threads = torch.get_num_threads()
            self._pool = c_void_p(self._library.pb_pool(self._num_threads))
        return self._pool

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight [out, in] in the kernels' layout; an opaque 1-D tensor."""
        num_out, num_in = weight.shape
        if weight.dtype != self.dtype or num_in % 2:
            raise ValueError(f"no kernel packs {list(weight.shape)} in {weight.dtype}")
        weight = weight.detach().contiguous()
        size = self._library.pb_packed_bytes(c_int64(num_in), c_int64(num_out))
        packed = aligned(size).view(self.dtype)
        self._library.pb_pack(self.pool, _at(weight), c_int64(num_in), c_int64(num_out), _at(packed))
        return packed

    def linear(self, inputs: torch.Tensor, linear: LinearStruct, *, is_wide: bool = False) -> torch.Tensor:
        """inputs [rows, in] times a packed weight: [rows, out], in float32 where `is_wide`."""
        if inputs.dtype != self.dtype or inputs.shape[1] != linear.num_in:
            raise ValueError(f"inputs {list(inputs.shape)} in {inputs.dtype} do not fit the weight")
        if inputs.stride(1) != 1:
            inputs = inputs.contiguous()
        out = torch.empty(len(inputs), linear.num_out, dtype=torch.float32 if is_wide else self.dtype)
        self._library.pb_linear(
            self.pool, _at(inputs), c_int64(inputs.stride(0)), c_int64(len(inputs)), ctypes.byref(linear),
            c_int32(is_wide), _at(out), c_int64(linear.num_out),
        )  # fmt: skip
        return out

    def attend(
        self,
        query: torch.Tensor,  # [tokens, heads, key_dim]
        pages: LayerPages,
        rows: PackedRows,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,  # [heads], float32
        new: tuple[torch.Tensor, torch.Tensor] | None = None,  # [kv_heads, tokens, dim]: written first
    ) -> torch.Tensor:
        """Attention of the rows' tokens, [tokens, heads, value_dim]; tokens of no row come out as zeros."""
        query = query.contiguous()
        num_tokens, num_heads, key_dim = query.shape
        value_dim = pages.values.shape[-1]
        out = torch.zeros(num_tokens, num_heads, value_dim, dtype=self.dtype)
        call = _AttentionStruct(
            query=query.data_ptr(), out=out.data_ptr(), query_stride=num_heads * key_dim,
            out_stride=num_heads * value_dim, pages=pages.struct(), tables=rows.table.ctypes.data,
            sinks=None if sinks is None else sinks.data_ptr(), width=rows.table.shape[1], heads=num_heads,
            window=window or 0, scale=scale, softcap=softcap or 0.0,
        )  # fmt: skip
        of_rows = rows.struct()
        if new is not None:
            new_keys, new_values = (part.contiguous() for part in new)
            self._library.pb_write(
                self.pool, ctypes.byref(call), ctypes.byref(of_rows), _at(new_keys), _at(new_values),
                c_int64(new_keys.shape[1]),
            )  # fmt: skip
        self._library.pb_attend(self.pool, ctypes.byref(call), ctypes.byref(of_rows))
        return out

    def scratch_bytes(self, model: ModelStruct, num_tokens: int) -> int:
        """Memory that a step of so many tokens works in."""
        return int(self._library.pb_scratch_bytes(ctypes.byref(model), c_int64(num_tokens)))

    def layers(self, model: ModelStruct, step: StepStruct) -> None:
        """Run a step's layers."""
        self._library.pb_layers(self.pool, ctypes.byref(model), ctypes.byref(step))


def aligned(num_bytes: int) -> torch.Tensor:
    """Memory that begins with a cache line, uint8."""
    whole = torch.empty(num_bytes + 64, dtype=torch.uint8)
    skip = -whole.data_ptr() % 64
    return whole[skip : skip + num_bytes]


def _at(tensor: torch.Tensor) -> c_void_p:
    return c_void_p(tensor.data_ptr())


_libraries: dict[torch.dtype, CpuLibrary] = {}


def library_for(dtype: torch.dtype, *, patience_s: float | None = None) -> CpuLibrary | None:
    """This machine's kernels for `dtype`, compiled if need be; None where there are none.

    The first call waits for the compiler for `patience_s`, by default about as long as torch's import takes.
    """
    if dtype not in _KINDS or not cpu_compile.is_supported():
        return None
    if dtype not in _libraries:
        if patience_s is None:
            patience_s = float(os.environ.get(_PATIENCE_VARIABLE, _PATIENCE_S))
        found = cpu_compile.load(_KINDS[dtype], patience_s)
        if found is None:
            return None
        _libraries[dtype] = CpuLibrary(found, dtype)
    return _libraries[dtype]
