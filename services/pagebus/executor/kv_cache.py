"""The KV pages of all layers, in KV groups, and what a step needs to use them. Knows no sampling, no bus."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pagebus.bus.messages import PoolGroup
from pagebus.executor.attention import AttentionCall
from pagebus.executor.batch import BlockCopy
from pagebus.executor.memory import GroupNeed
from pagebus.kernels.kv_write import BLOCK_SIZE, write_kv
from pagebus.kernels.paged_attention import (
    MAX_PARTIALS,
    TILE,
    Piece,
    RowSpan,
    paged_attention,
    plan_attention,
)

_GATHER_BYTES = 8 << 20  # keys and values gathered at once for decoding rows: what caches hold, roughly
_PARTIAL_BYTES = 256 << 20  # partial results of a prompt's queries computed together


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
        return self.numbers_a_token * BLOCK_SIZE * dtype.itemsize


@dataclass(frozen=True, slots=True)
class GroupStep:
    """A step's view of one KV group: where new keys go, and what is attended to."""

    num_tokens: int  # of the flat batch's tokens, the first so many are real
    slots: torch.Tensor  # [num_tokens], int64
    pieces: list[Piece]


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


class PagedCache:
    """Pages of every layer, [kv_heads, blocks + 1, BLOCK_SIZE, dim]; the last block stays zero (padding).

    A latent layer has one page a block, [latent | rotary key] for each token, instead of keys and values.
    """

    def __init__(
        self,
        specs: Sequence[LayerSpec],
        num_blocks: Sequence[int],  # of each KV group
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks = tuple(num_blocks)
        self.windows = windows_of(specs)
        if len(self.num_blocks) != len(self.windows):
            raise ValueError(f"{len(self.num_blocks)} numbers of blocks for {len(self.windows)} KV groups")
        self._device = device
        self._group_of = {spec.layer: self.windows.index(spec.window) for spec in specs}
        self._pages: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}
        for spec in specs:
            shape = (spec.num_kv_heads, self.num_blocks[self._group_of[spec.layer]] + 1, BLOCK_SIZE)
            self._pages[spec.layer] = (
                _zeros((*shape, spec.key_dim), dtype, device),
                None if spec.is_latent else _zeros((*shape, spec.value_dim), dtype, device),
            )
        self._max_items = max(1, _GATHER_BYTES // max(spec.numbers_a_token * 4 * TILE for spec in specs))
        query_bytes = max(spec.num_heads * (spec.value_dim + TILE) * 4 for spec in specs)
        self._max_partials = max(1, min(MAX_PARTIALS, _PARTIAL_BYTES // query_bytes))

    @property
    def pool(self) -> tuple[PoolGroup, ...]:
        """The groups as the scheduler knows them."""
        return tuple(
            PoolGroup(num_blocks=num_blocks, block_size=BLOCK_SIZE, window=window)
            for num_blocks, window in zip(self.num_blocks, self.windows, strict=True)
        )

    def plan(self, spans: Sequence[Sequence[RowSpan]]) -> list[GroupStep]:
        """What the layers share in a step; `spans[g]` are the rows' spans in group g, ordered by token."""
        return [self._plan_group(group, spans[group]) for group in range(len(self.windows))]

    def _plan_group(self, group: int, spans: Sequence[RowSpan]) -> GroupStep:
        slots = np.concatenate([_slots(span) for span in spans])
        pieces = plan_attention(
            spans,
            window=self.windows[group],
            null_block=self.num_blocks[group],
            max_items=self._max_items,
            max_partials=self._max_partials,
            device=self._device,
        )
        return GroupStep(len(slots), torch.from_numpy(slots).to(self._device), pieces)

    def attend(self, call: AttentionCall, steps: Sequence[GroupStep]) -> torch.Tensor:
        """Write the call's keys and values, then attend: [tokens, heads, value_dim]."""
        step = steps[self._group_of[call.layer]]
        key_pages, value_pages = self._pages[call.layer]
        real = slice(0, step.num_tokens)
        write_kv(key_pages, call.key[:, real], step.slots)
        if value_pages is not None:
            write_kv(value_pages, call.value[:, real], step.slots)
        return paged_attention(
            call.query.transpose(0, 1),
            key_pages,
            value_pages,
            step.pieces,
            value_dim=call.value.shape[-1],
            scale=call.scale,
            softcap=call.softcap,
            sinks=call.sinks,
        )

    def clear(self, blocks: Sequence[Sequence[int]]) -> None:
        """Zero `blocks[g]` in group g: a masked key weighs 0, but 0 times a NaN would be a NaN."""
        for layer, group in self._group_of.items():
            wanted = torch.tensor([block for block in blocks[group] if block >= 0], device=self._device)
            for pages in self._layer_pages(layer):
                pages.index_fill_(1, wanted.long(), 0)

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
        for layer, group in self._group_of.items():
            for pages in self._layer_pages(layer):
                for copy in copies:
                    if copy.group == group:
                        pages[:, copy.target].copy_(pages[:, copy.source])

    def _layer_pages(self, layer: int) -> list[torch.Tensor]:
        return [pages for pages in self._pages[layer] if pages is not None]


def _slots(span: RowSpan) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
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
