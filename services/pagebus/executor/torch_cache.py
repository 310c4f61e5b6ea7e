"""Pages that plain torch attends to: what a CPU runs. Knows no sampling and no bus."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pagebus.executor.attention import Attend, AttentionCall, FusedCall
from pagebus.executor.kv_cache import LayerSpec, Pages, slots_of
from pagebus.kernels.kv_write import write_kv
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
class GroupStep:
    """A step's view of one KV group: where new keys go, and what is attended to."""

    num_tokens: int  # of the flat batch's tokens, the first so many are real
    slots: torch.Tensor  # [num_tokens], int64
    pieces: list[Piece]


class PagedCache(Pages):
    """Head-major pages, so that gathering a row's blocks gives one matrix a head; padding is all zeros."""

    def __init__(
        self,
        specs: Sequence[LayerSpec],
        num_blocks: Sequence[int],  # of each KV group
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(specs, num_blocks, dtype, device, block_dim=1)
        self._max_items = max(1, _GATHER_BYTES // max(spec.numbers_a_token * 4 * TILE for spec in specs))
        query_bytes = max(spec.num_heads * (spec.value_dim + TILE) * 4 for spec in specs)
        self._max_partials = max(1, min(MAX_PARTIALS, _PARTIAL_BYTES // query_bytes))

    def answer(self, spans: Sequence[Sequence[RowSpan]], num_tokens: int) -> Attend:
        """What answers the layers in a step of `num_tokens` flat tokens, padding included."""
        steps = self.plan(spans)

        def attend(call: AttentionCall | FusedCall) -> torch.Tensor:
            if isinstance(call, FusedCall):
                raise TypeError("these pages take no fused calls")
            return self.attend(call, steps)

        return attend

    def plan(self, spans: Sequence[Sequence[RowSpan]]) -> list[GroupStep]:
        """What the layers share in a step; `spans[g]` are the rows' spans in group g, ordered by token."""
        return [self._plan_group(group, spans[group]) for group in range(len(self.windows))]

    def _plan_group(self, group: int, spans: Sequence[RowSpan]) -> GroupStep:
        slots = np.concatenate([slots_of(span) for span in spans])
        pieces = plan_attention(
            spans,
            window=self.windows[group],
            null_block=self.num_blocks[group],
            max_items=self._max_items,
            max_partials=self._max_partials,
            device=self.device,
        )
        return GroupStep(len(slots), torch.from_numpy(slots).to(self.device), pieces)

    def attend(self, call: AttentionCall, steps: Sequence[GroupStep]) -> torch.Tensor:
        """Write the call's keys and values, then attend: [tokens, heads, value_dim]."""
        step = steps[self.group_of[call.layer]]
        key_pages, value_pages = self.of_layer[call.layer]
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
