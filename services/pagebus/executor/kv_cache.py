"""The KV pages of all layers, in KV groups, and what a step needs to use them. Knows no sampling, no bus."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pagebus.bus.messages import PoolGroup
from pagebus.executor.attention import AttentionCall
from pagebus.kernels.kv_write import BLOCK_SIZE, write_kv
from pagebus.kernels.paged_attention import TILE, Piece, RowSpan, paged_attention, plan_attention

_GATHER_BYTES = 8 << 20  # keys and values gathered at once for decoding rows: what caches hold, roughly


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What one attention layer stores for a token."""

    layer: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None

    def bytes_a_block(self, dtype: torch.dtype) -> int:
        return self.num_kv_heads * (self.key_dim + self.value_dim) * BLOCK_SIZE * dtype.itemsize


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


class PagedCache:
    """Pages of every layer, [kv_heads, blocks + 1, BLOCK_SIZE, dim]; the last block stays zero (padding)."""

    def __init__(
        self, specs: Sequence[LayerSpec], num_blocks: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_blocks = num_blocks
        self.windows = windows_of(specs)
        self._device = device
        self._group_of = {spec.layer: self.windows.index(spec.window) for spec in specs}
        self._pages: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for spec in specs:
            shape = (spec.num_kv_heads, num_blocks + 1, BLOCK_SIZE)
            self._pages[spec.layer] = (
                _zeros((*shape, spec.key_dim), dtype, device),
                _zeros((*shape, spec.value_dim), dtype, device),
            )
        tile_bytes = max(spec.num_kv_heads * (spec.key_dim + spec.value_dim) * 4 * TILE for spec in specs)
        self._max_items = max(1, _GATHER_BYTES // tile_bytes)

    @property
    def pool(self) -> tuple[PoolGroup, ...]:
        """The groups as the scheduler knows them."""
        return tuple(
            PoolGroup(num_blocks=self.num_blocks, block_size=BLOCK_SIZE, window=window)
            for window in self.windows
        )

    def plan(self, spans: Sequence[Sequence[RowSpan]]) -> list[GroupStep]:
        """What the layers share in a step; `spans[g]` are the rows' spans in group g, ordered by token."""
        return [self._plan_group(window, spans[g]) for g, window in enumerate(self.windows)]

    def _plan_group(self, window: int | None, spans: Sequence[RowSpan]) -> GroupStep:
        slots = np.concatenate([_slots(span) for span in spans])
        pieces = plan_attention(
            spans,
            window=window,
            null_block=self.num_blocks,
            max_items=self._max_items,
            device=self._device,
        )
        return GroupStep(len(slots), torch.from_numpy(slots).to(self._device), pieces)

    def attend(self, call: AttentionCall, steps: Sequence[GroupStep]) -> torch.Tensor:
        """Write the call's keys and values, then attend: [tokens, heads, value_dim]."""
        step = steps[self._group_of[call.layer]]
        key_pages, value_pages = self._pages[call.layer]
        real = slice(0, step.num_tokens)
        write_kv(key_pages, value_pages, call.key[:, real], call.value[:, real], step.slots)
        return paged_attention(
            call.query.transpose(0, 1),
            key_pages,
            value_pages,
            step.pieces,
            scale=call.scale,
            softcap=call.softcap,
            sinks=call.sinks,
        )

    def clear(self, blocks: Sequence[Sequence[int]]) -> None:
        """Zero `blocks[g]` in group g: a masked key weighs 0, but 0 times a NaN would be a NaN."""
        for layer, group in self._group_of.items():
            wanted = torch.tensor([block for block in blocks[group] if block >= 0], device=self._device)
            for pages in self._pages[layer]:
                pages.index_fill_(1, wanted.long(), 0)


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
