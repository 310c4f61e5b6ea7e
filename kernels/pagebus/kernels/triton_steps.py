"""A step's inputs from rows' state that lives on the device, and what the step does to it. Knows no model.

One tensor of int64 holds all state, so that one scatter of (address, value) pairs changes whatever changed:

```
state    [slots + 1, FIELDS]           last id, position, index of the next id, sampling parameters
tables   [groups, slots + 1, width]    block ids
order    [rows]                        the slot of each row of a decoding step
```

The last slot is the padding's: it keeps nothing, writes to no row's blocks, and no key is read for it. A
float is kept as its bits.
"""
# ruff: noqa: ANN001, ANN202, N803 - kernels: arguments without types, constants in capitals

from dataclasses import dataclass
from typing import no_type_check

import torch

from pagebus.kernels.jit import cdiv, kernel, kernel_with, tl

LAST_ID, POSITION, INDEX, PREFIX, TOP_K, KEEPS, TEMPERATURE, LEAST, TOP_P = range(9)
FIELDS = 9

_FIELDS = tl.constexpr(FIELDS)
_LAST_ID, _POSITION, _INDEX = tl.constexpr(LAST_ID), tl.constexpr(POSITION), tl.constexpr(INDEX)
_PREFIX, _TOP_K, _KEEPS = tl.constexpr(PREFIX), tl.constexpr(TOP_K), tl.constexpr(KEEPS)
_TEMPERATURE, _LEAST, _TOP_P = tl.constexpr(TEMPERATURE), tl.constexpr(LEAST), tl.constexpr(TOP_P)
_BLOCK = 256
_TILE = 4096

RESULTS = 4
"""Numbers that a step tells of a row, float64: its id (-1: none), the largest logit, the sum of the hidden
state (no number where one is not finite), and the largest logit after what changed the logits."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything lies in the one tensor."""

    num_slots: int  # the padding's not counted
    num_groups: int
    width: int  # of a block table
    num_rows: int  # of a decoding step at most

    @property
    def tables(self) -> int:
        """Where the first group's tables begin."""
        return (self.num_slots + 1) * FIELDS

    @property
    def order(self) -> int:
        """Where the order of the rows begins."""
        return self.tables + self.num_groups * (self.num_slots + 1) * self.width

    @property
    def size(self) -> int:
        """Numbers in all."""
        return self.order + self.num_rows

    def table(self, group: int, slot: int) -> int:
        """Where a slot's table begins."""
        return self.tables + (group * (self.num_slots + 1) + slot) * self.width


@dataclass(frozen=True, slots=True)
class StepBuffers:
    """What `triton_prepare` writes: everything that a forward pass and sampling need."""

    ids: torch.Tensor  # [tokens], int64
    positions: torch.Tensor  # [tokens], int64
    slots: torch.Tensor  # [groups, tokens], int64: where new keys go; -1 for padding
    blocks: torch.Tensor  # [groups, tokens], int64: the slots' blocks
    places: torch.Tensor  # [groups, tokens], int64: slot within the block
    tables: torch.Tensor  # [groups, rows, width], int32
    contexts: torch.Tensor  # [rows], int32
    temperatures: torch.Tensor  # [rows], float32
    least: torch.Tensor  # [rows], float32
    top_ks: torch.Tensor  # [rows], int32
    top_ps: torch.Tensor  # [rows], float64
    prefixes: torch.Tensor  # [rows], int64
    indices: torch.Tensor  # [rows], int64

    @staticmethod
    def make(num_rows: int, num_tokens: int, layout: Layout, device: torch.device) -> "StepBuffers":
        """Unwritten ones."""

        def empty(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        groups = layout.num_groups
        return StepBuffers(
            ids=empty(num_tokens),
            positions=empty(num_tokens),
            slots=empty(groups, num_tokens),
            blocks=empty(groups, num_tokens),
            places=empty(groups, num_tokens),
            tables=empty(groups, num_rows, layout.width, dtype=torch.int32),
            contexts=empty(num_rows, dtype=torch.int32),
            temperatures=empty(num_rows, dtype=torch.float32),
            least=empty(num_rows, dtype=torch.float32),
            top_ks=empty(num_rows, dtype=torch.int32),
            top_ps=empty(num_rows, dtype=torch.float64),
            prefixes=empty(num_rows),
            indices=empty(num_rows),
        )

    def first(self, num_rows: int) -> "StepBuffers":
        """The part of a step of `num_rows` rows of one token."""
        return StepBuffers(
            self.ids[:num_rows], self.positions[:num_rows], self.slots[:, :num_rows],
            self.blocks[:, :num_rows], self.places[:, :num_rows], self.tables[:, :num_rows],
            self.contexts[:num_rows], self.temperatures[:num_rows], self.least[:num_rows],
            self.top_ks[:num_rows], self.top_ps[:num_rows], self.prefixes[:num_rows], self.indices[:num_rows],
        )  # fmt: skip


@kernel
@no_type_check
def _as_float32(word):
    return word.to(tl.int32).to(tl.float32, bitcast=True)


@kernel_with(
    counts=("group_stride", "table_stride"), loose=("state_tables", "order", "cu_seqlens", "given_ids")
)
@no_type_check
def _prepare(
    state, state_tables, order, cu_seqlens, given_ids,
    ids, positions, slots, blocks, places, tables, contexts,
    temperatures, least, top_ks, top_ps, prefixes, indices, group_stride, table_stride,
    SLOTS: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(order + row)
    own = state + slot * _FIELDS
    first = tl.load(cu_seqlens + row)
    count = tl.load(cu_seqlens + row + 1) - first
    position = tl.load(own + _POSITION)
    table = state_tables + (group * (SLOTS + 1) + slot) * WIDTH

    # 1. Where each token stands, and where its keys go.
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        is_there = at < count
        place = position + at
        block = tl.load(table + place // PAGE, mask=is_there, other=0)
        to = group * group_stride + first + at
        tl.store(slots + to, tl.where(slot < SLOTS, block * PAGE + place % PAGE, -1), mask=is_there)
        tl.store(blocks + to, block, mask=is_there)
        tl.store(places + to, place % PAGE, mask=is_there)
        if group == 0:
            tl.store(positions + first + at, place, mask=is_there)
            if given_ids is not None:
                given = tl.load(given_ids + first + at, mask=is_there, other=0)
                tl.store(ids + first + at, given, mask=is_there)
    if group == 0:
        if count == 1:  # the last id is known here, and nowhere else perhaps
            tl.store(ids + first, tl.load(own + _LAST_ID))
        # 2. What the row is sampled with.
        tl.store(contexts + row, tl.where(slot < SLOTS, position + count, 0).to(tl.int32))
        tl.store(temperatures + row, _as_float32(tl.load(own + _TEMPERATURE)))
        tl.store(least + row, _as_float32(tl.load(own + _LEAST)))
        tl.store(top_ks + row, tl.load(own + _TOP_K).to(tl.int32))
        tl.store(top_ps + row, tl.load(own + _TOP_P).to(tl.float64, bitcast=True))
        tl.store(prefixes + row, tl.load(own + _PREFIX))
        tl.store(indices + row, tl.load(own + _INDEX))

    # 3. Its table, as far as it is read.
    needed = (position + count + PAGE - 1) // PAGE
    for start in range(0, needed, BLOCK):
        at = start + tl.arange(0, BLOCK)
        entries = tl.load(table + at, mask=at < needed, other=0)
        tl.store(tables + group * table_stride + row * WIDTH + at, entries.to(tl.int32), mask=at < needed)


@kernel_with(loose=("order", "cu_seqlens", "is_sampled"))
@no_type_check
def _finish(
    state, order, cu_seqlens, is_sampled, ids, tops, sums, results, SLOTS: tl.constexpr, RESULTS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(order + row)
    id, top = tl.load(ids + row), tl.load(tops + row).to(tl.float64)
    if slot < SLOTS:
        own = state + slot * _FIELDS
        count = tl.load(cu_seqlens + row + 1) - tl.load(cu_seqlens + row)
        tl.store(own + _POSITION, tl.load(own + _POSITION) + count)
        if tl.load(is_sampled + row) > 0:
            tl.store(own + _LAST_ID, tl.maximum(id, 0))  # of a row that failed any id that exists will do
            tl.store(own + _INDEX, tl.load(own + _INDEX) + 1)
    out = results + row * RESULTS
    tl.store(out, id.to(tl.float64))
    tl.store(out + 1, top)
    tl.store(out + 2, tl.load(sums + row).to(tl.float64))
    tl.store(out + 3, top)


@kernel_with(loose=("order",))
@no_type_check
def _keep(state, order, logits, kept, stride, kept_stride, WIDTH: tl.constexpr, TILE: tl.constexpr):
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(state + tl.load(order + row) * _FIELDS + _KEEPS) > 0:
        at = tile * TILE + tl.arange(0, TILE)
        values = tl.load(logits + row * stride + at, mask=at < WIDTH)
        tl.store(kept + row * kept_stride + at, values, mask=at < WIDTH)


def triton_prepare(
    state: torch.Tensor,  # [layout.size], int64
    layout: Layout,
    order: torch.Tensor,  # [rows], int64: slots, none twice but the padding's
    cu_seqlens: torch.Tensor,  # [rows + 1], int64
    given_ids: torch.Tensor | None,  # [tokens], int64; of rows of one token the state's last ids are taken
    buffers: StepBuffers,  # written
    block_size: int,
) -> None:
    """Spread the rows' state over the step's inputs: one launch, whatever there is of rows and groups."""
    _prepare[(len(order), layout.num_groups)](
        state, state[layout.tables :], order, cu_seqlens, given_ids, buffers.ids, buffers.positions,
        buffers.slots, buffers.blocks, buffers.places, buffers.tables, buffers.contexts,
        buffers.temperatures, buffers.least, buffers.top_ks, buffers.top_ps, buffers.prefixes,
        buffers.indices, buffers.slots.stride(0), buffers.tables.stride(0),
        SLOTS=layout.num_slots, WIDTH=layout.width, PAGE=block_size, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip


def triton_finish(
    state: torch.Tensor,  # [layout.size], int64, changed
    layout: Layout,
    order: torch.Tensor,  # [rows], int64
    cu_seqlens: torch.Tensor,  # [rows + 1], int64
    is_sampled: torch.Tensor,  # [rows], int64
    ids: torch.Tensor,  # [rows], int64; -1: none could be chosen
    tops: torch.Tensor,  # [rows], float32
    sums: torch.Tensor,  # [rows], float32: of the hidden states
    results: torch.Tensor,  # [rows, RESULTS], float64, written
) -> None:
    """The rows move on: positions, counters, last ids; and what is to be told of them."""
    _finish[(len(order),)](
        state, order, cu_seqlens, is_sampled, ids, tops, sums, results,
        SLOTS=layout.num_slots, RESULTS=RESULTS, num_warps=1,
    )  # fmt: skip


def triton_keep(
    state: torch.Tensor,  # [layout.size], int64
    order: torch.Tensor,  # [rows], int64
    logits: torch.Tensor,  # [rows, vocabulary]
    kept: torch.Tensor,  # [at least rows, vocabulary], written
) -> None:
    """Copy the logits of the rows whose state asks for it; the others cost next to nothing."""
    num_rows, width = logits.shape
    _keep[(num_rows, cdiv(width, _TILE))](
        state, order, logits, kept, logits.stride(0), kept.stride(0), WIDTH=width, TILE=_TILE, num_warps=8
    )
