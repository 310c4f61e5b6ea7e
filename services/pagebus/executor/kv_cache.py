"""The KV pages of all layers, in KV groups. Knows neither how they are attended to, nor the bus."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from pagebus.bus.messages import PoolGroup
from pagebus.executor.attention import Attend
from pagebus.executor.batch import BlockCopy
from pagebus.executor.memory import GroupNeed
from pagebus.kernels.kv_write import BLOCK_SIZE
from pagebus.kernels.paged_attention import RowSpan


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What one attention layer stores for a token."""

    layer: int
    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None
    is_latent: bool = False  # the values are the first value_dim of the keys, and stored once

    @property
    def numbers_a_token(self) -> int:
        return self.num_kv_heads * (self.key_dim + (0 if self.is_latent else self.value_dim))

    def bytes_a_block(self, dtype: torch.dtype) -> int:
        """Pages of `dtype`, and where that is fp8 or int8 the float32 that goes with each vector."""
        size = self.numbers_a_token * dtype.itemsize
        if has_peaks(dtype):
            size += self.num_kv_heads * (1 if self.is_latent else 2) * torch.float32.itemsize
        return size * BLOCK_SIZE


def has_peaks(dtype: torch.dtype) -> bool:
    """Whether pages of this type need each vector's largest magnitude beside them."""
    return dtype in {torch.float8_e4m3fn, torch.int8}


def windows_of(specs: Sequence[LayerSpec]) -> list[int | None]:
    """The KV groups' windows: full attention first, then growing windows."""
    windows = {spec.window for spec in specs}
    return sorted(windows, key=lambda window: 0 if window is None else window)


def needs_of(specs: Sequence[LayerSpec], dtype: torch.dtype) -> list[GroupNeed]:
    """What a block of each KV group takes in all of the group's layers."""
    return [
        GroupNeed(sum(spec.bytes_a_block(dtype) for spec in specs if spec.window == window), window)
        for window in windows_of(specs)
    ]


class Cache(Protocol):
    """What a model runner needs of its pages."""

    @property
    def num_blocks(self) -> tuple[int, ...]:
        """Blocks of each KV group."""

    @property
    def windows(self) -> list[int | None]:
        """The groups' windows."""

    @property
    def pool(self) -> tuple[PoolGroup, ...]:
        """The groups as the scheduler knows them."""

    def answer(self, spans: Sequence[Sequence[RowSpan]], num_tokens: int) -> Attend:
        """What answers the layers in a step of `num_tokens` flat tokens, padding included; `spans[g]` are the
        rows' spans in group g, ordered by token and without gaps."""

    def clear(self, blocks: Sequence[Sequence[int]]) -> None:
        """Zero `blocks[g]` in group g."""

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """Copy whole blocks, one after the other."""


class Pages:
    """Pages of every layer, in groups; the last block of each is no row's (padding).

    A latent layer has one page a block, [latent | rotary key] for each token, instead of keys and values.
    fp8 pages hold each vector (a token's key or value in one head) divided by a 448th of its largest
    magnitude, its peak, which stands beside them in float32; int8 pages (on a CPU) by a 127th:

        pages   [blocks, kv_heads, BLOCK_SIZE, dim]    1 byte a number
        peaks   [blocks, kv_heads, BLOCK_SIZE]         4 bytes a vector: 3.1 % more at 128 numbers
    """

    def __init__(
        self,
        specs: Sequence[LayerSpec],
        num_blocks: Sequence[int],  # of each KV group
        dtype: torch.dtype,
        device: torch.device,
        *,
        block_dim: int,
    ) -> None:
        """`block_dim`: where blocks + 1 stands in [kv_heads, BLOCK_SIZE, dim]; 0 or 1."""
        self.num_blocks = tuple(num_blocks)
        self.windows = windows_of(specs)
        if len(self.num_blocks) != len(self.windows):
            raise ValueError(f"{len(self.num_blocks)} numbers of blocks for {len(self.windows)} KV groups")
        self.device = device
        self.group_of = {spec.layer: self.windows.index(spec.window) for spec in specs}
        self.block_dim = block_dim
        self.of_layer: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}
        self.peaks_of_layer: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # of fp8 and int8 pages only
        for spec in specs:
            sizes = [spec.num_kv_heads, BLOCK_SIZE]
            sizes.insert(block_dim, self.num_blocks[self.group_of[spec.layer]] + 1)
            self.of_layer[spec.layer] = (
                _zeros((*sizes, spec.key_dim), dtype, device),
                None if spec.is_latent else _zeros((*sizes, spec.value_dim), dtype, device),
            )
            if has_peaks(dtype):
                peaks = _zeros(tuple(sizes), torch.float32, device)
                self.peaks_of_layer[spec.layer] = (
                    peaks,
                    peaks if spec.is_latent else _zeros(tuple(sizes), torch.float32, device),
                )

    @property
    def pool(self) -> tuple[PoolGroup, ...]:
        """The groups as the scheduler knows them."""
        return tuple(
            PoolGroup(num_blocks=num_blocks, block_size=BLOCK_SIZE, window=window)
            for num_blocks, window in zip(self.num_blocks, self.windows, strict=True)
        )

    def clear(self, blocks: Sequence[Sequence[int]]) -> None:
        """Zero `blocks[g]` in group g: a masked key weighs 0, but 0 times a NaN would be a NaN."""
        for layer, group in self.group_of.items():
            wanted = torch.tensor([block for block in blocks[group] if block >= 0], device=self.device)
            for pages in self._layer_pages(layer):
                pages.index_fill_(self.block_dim, wanted.long(), 0)

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """Copy whole blocks in all layers of their group, one after the other: a later copy sees an earlier.

        Raises `ValueError` where a group or block does not exist; nothing is copied then.
        """
        for copy in copies:
            if not 0 <= copy.group < len(self.windows):
                raise ValueError(f"there is no KV group {copy.group}")
            num_blocks = self.num_blocks[copy.group]
            if not (0 <= copy.source < num_blocks and 0 <= copy.target < num_blocks):
                raise ValueError(f"{copy} names a block outside the group's {num_blocks}")
        for layer, group in self.group_of.items():
            for pages in self._layer_pages(layer):
                for copy in copies:
                    if copy.group == group:
                        target = pages.select(self.block_dim, copy.target)
                        target.copy_(pages.select(self.block_dim, copy.source))

    def _layer_pages(self, layer: int) -> list[torch.Tensor]:
        """All tensors that hold a layer's blocks; fp8 as bytes, as torch does not fill it everywhere."""
        found = [pages for pages in self.of_layer[layer] if pages is not None]
        found = [pages.view(torch.uint8) if pages.dtype.itemsize == 1 else pages for pages in found]
        keys, values = self.peaks_of_layer.get(layer, (None, None))
        return found + [peaks for peaks in (keys, None if values is keys else values) if peaks is not None]


def slots_of(span: RowSpan) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """Where the span's tokens lie in a group's pages: block * BLOCK_SIZE + place."""
    positions = np.arange(span.start, span.start + span.num_tokens)
    slots: np.ndarray[tuple[int], np.dtype[np.int64]] = (
        span.table[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    )
    return slots


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros that, on a CPU, take no memory and no time before they are written (calloc's untouched pages)."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = dtype.itemsize
    for dim in shape:
        size *= dim
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(shape)
