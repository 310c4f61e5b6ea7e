"""Pages that Triton's kernels attend to: what a GPU runs. Knows no sampling and no bus."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pagebus.executor.attention import Attend, AttentionCall, FusedCall
from pagebus.executor.kv_cache import LayerSpec, Pages, slots_of
from pagebus.kernels.fp8 import quantize
from pagebus.kernels.jit import power_of_2
from pagebus.kernels.kv_write import BLOCK_SIZE
from pagebus.kernels.paged_attention import RowSpan
from pagebus.kernels.triton_attention import tile_config, triton_paged_attention
from pagebus.kernels.triton_rope_kv import triton_rope_kv

_LEAST_TABLE = 16
"""Blocks. Tables grow by powers of two from there on: few shapes, so that few kernels are compiled."""


@dataclass(frozen=True, slots=True)
class GroupStep:
    """A step's view of one KV group, on the device."""

    slots: torch.Tensor  # [tokens], int64: where new keys go; -1 for padding
    blocks: torch.Tensor  # [tokens], int64: the slots' blocks; of padding the last one, which is no row's
    places: torch.Tensor  # [tokens], int64: slot within the block
    tokens: torch.Tensor  # [tokens], int64: 0, 1, 2, ...
    tables: torch.Tensor  # [rows, blocks], int32; -1 where nothing may be read
    contexts: torch.Tensor  # [rows], int32: keys of each row, its new ones included
    cu_seqlens: torch.Tensor | None  # [rows + 1], int32; None: every row has one token


class TritonCache(Pages):
    """Block-major pages: one block's keys of one head lie in one piece."""

    def __init__(
        self,
        specs: Sequence[LayerSpec],
        num_blocks: Sequence[int],  # of each KV group
        dtype: torch.dtype,  # of the pages; float8_e4m3fn: with a peak for each vector
        device: torch.device,
        *,
        is_batch_invariant: bool = False,
    ) -> None:
        """`is_batch_invariant`: one cut of the keys for prompts and decoding alike, so that a row has the
        same bits in every batch."""
        super().__init__(specs, num_blocks, dtype, device, block_dim=0)
        self._is_batch_invariant = is_batch_invariant

    def answer(self, spans: Sequence[Sequence[RowSpan]], num_tokens: int) -> Attend:
        """What answers the layers in a step of `num_tokens` flat tokens, padding included."""
        steps = [self._plan_group(group, spans[group], num_tokens) for group in range(len(self.windows))]
        return lambda call: self.attend(call, steps)

    def _plan_group(self, group: int, spans: Sequence[RowSpan], num_tokens: int) -> GroupStep:
        """`spans`: those of the rows in the group, ordered by token and without a gap."""
        slots = np.full(num_tokens, -1, np.int64)
        num_real = spans[-1].token + spans[-1].num_tokens
        slots[:num_real] = np.concatenate([slots_of(span) for span in spans])
        needed = [-(-(span.start + span.num_tokens) // BLOCK_SIZE) for span in spans]
        tables = np.full((len(spans), max(_LEAST_TABLE, power_of_2(max(needed)))), -1, np.int32)
        for row, (span, count) in enumerate(zip(spans, needed, strict=True)):
            tables[row, :count] = span.table[:count]
        contexts = np.array([span.start + span.num_tokens for span in spans], np.int32)
        starts = np.array([span.token for span in spans] + [num_real], np.int32)
        is_decode = len(spans) == num_tokens and not self._is_batch_invariant
        return GroupStep(
            slots=self._on_device(slots),
            blocks=self._on_device(np.where(slots < 0, self.num_blocks[group], slots // BLOCK_SIZE)),
            places=self._on_device(slots % BLOCK_SIZE),
            tokens=self._on_device(np.arange(num_tokens)),
            tables=self._on_device(tables),
            contexts=self._on_device(contexts),
            cu_seqlens=None if is_decode else self._on_device(starts),
        )

    def _on_device(self, values: npt.NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)

    def attend(self, call: AttentionCall | FusedCall, steps: Sequence[GroupStep]) -> torch.Tensor:
        """Write the call's keys and values, then attend: [tokens, heads, value_dim]."""
        step = steps[self.group_of[call.layer]]
        key_pages, value_pages = self.of_layer[call.layer]
        key_peaks, value_peaks = self.peaks_of_layer.get(call.layer, (None, None))
        if isinstance(call, FusedCall):
            if value_pages is None:
                raise TypeError("a latent layer is not fused")
            query = triton_rope_kv(
                call.qkv, key_pages, value_pages, step.tokens, step.slots, call.cos, call.sin,
                num_heads=call.num_heads, is_interleaved=call.is_interleaved, norm=call.norm,
                key_peaks=key_peaks, value_peaks=value_peaks,
            )  # fmt: skip
        else:
            _write(key_pages, key_peaks, call.key, step)
            if value_pages is None:
                value_pages = key_pages[..., : call.value.shape[-1]]
            else:
                _write(value_pages, value_peaks, call.value, step)
            query = call.query.transpose(0, 1)
        num_heads, key_dim = query.shape[1:]
        config = None
        if self._is_batch_invariant:
            group = num_heads // key_pages.shape[1]
            config = tile_config(key_dim, value_pages.shape[-1], query.dtype, group, is_decode=False)
        return triton_paged_attention(
            query if query.stride(-1) == 1 else query.contiguous(),
            key_pages,
            value_pages,
            step.tables,
            step.contexts,
            step.cu_seqlens,
            scale=call.scale,
            window=self.windows[self.group_of[call.layer]],
            softcap=call.softcap,
            sinks=call.sinks,
            key_peaks=key_peaks,
            value_peaks=value_peaks,
            segments=1 if self._is_batch_invariant else None,
            config=config,
        )


def _write(pages: torch.Tensor, peaks: torch.Tensor | None, new: torch.Tensor, step: GroupStep) -> None:
    """Store new keys or values [kv_heads, tokens, dim] in their slots."""
    vectors = new.transpose(0, 1)
    if peaks is None:
        pages[step.blocks, :, step.places] = vectors.to(pages.dtype)
        return
    stored, found = quantize(vectors)
    pages.view(torch.uint8)[step.blocks, :, step.places] = stored.view(torch.uint8)
    peaks[step.blocks, :, step.places] = found
