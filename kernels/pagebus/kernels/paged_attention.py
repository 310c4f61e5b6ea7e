"""Paged attention of a mixed batch, in plain torch. Knows block tables and positions, no model and no bus.

One idea: a row's keys are cut into tiles of TILE positions, counted from position 0. Each (query, tile)
gives a partial result (maximum, sum, weighted values), and the partial results are added in the order of
the tiles. Neither the batch nor the way in which the tokens came changes a tile or the order, so on a CPU a
query's result has the same bits alone, in any batch, by prefill and by decode. What the matrix library
needs for that (measured with MKL: see MIN_QUERIES and MIN_BATCH) is given to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pagebus.kernels.kv_write import BLOCK_SIZE

TILE_BLOCKS = 8
TILE = TILE_BLOCKS * BLOCK_SIZE
"""Keys a tile."""

MIN_QUERIES = 4
MIN_BATCH = 2
"""Below four rows, or as a lone product, MKL's matrix product takes kernels that add in another order."""

_QUERY_TILE = 128  # queries of a prompt that are computed together
MAX_PARTIALS = 16_384
"""Bound on (query, tile) pairs of a prompt computed together; `plan_attention` takes a lower one."""

_LOWEST = -1e30  # instead of -inf, so that a tile without a visible key gives exp(-inf) = 0 and no NaN

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RowSpan:
    """Tokens [token, token + num_tokens) of the flat batch: positions from `start` on of one row."""

    token: int
    num_tokens: int
    start: int
    table: Ints  # [blocks]; -1 where a windowed group has freed the block


@dataclass(frozen=True, slots=True)
class Piece:
    """Queries [token, token + num_rows * num_queries) of the flat batch, and the tiles that they see.

    rows      0        0        1        2        2        2      num_queries queries each
    tiles     0        1        0        3        4        5      = num_items (row, tile) pairs
    """

    token: int
    num_rows: int
    num_queries: int
    item_rows: torch.Tensor  # [items], int64
    blocks: torch.Tensor  # [items * TILE_BLOCKS], int64
    is_hidden: torch.Tensor  # [items, num_queries, TILE], bool: the query must not see the key
    order: torch.Tensor  # [tiles, num_rows], int64: the t-th item of each row, 0 where it has none
    is_absent: torch.Tensor  # [tiles, num_rows], bool


def plan_attention(
    spans: Sequence[RowSpan],
    *,
    window: int | None,
    null_block: int,
    max_items: int,
    device: torch.device,
    max_partials: int = MAX_PARTIALS,
) -> list[Piece]:
    """Cut a step's spans, ordered by token, into pieces; one plan serves all layers of a KV group.

    `null_block` is a block of zeros that stands where a table ends or holds -1. At most `max_items` tiles
    are gathered at once (a row that needs more is a piece of its own), and a piece of a prompt has at most
    `max_partials` (query, tile) pairs, or one query.
    """
    pieces: list[Piece] = []
    decode: list[RowSpan] = []
    num_items = 0
    for span in spans:
        if span.num_tokens > 1:
            for part in _parts(span, window, max_partials):
                pieces.append(_piece([part], window, null_block, device))
            continue
        num_tiles = _num_tiles(span, window)
        if decode and (num_items + num_tiles > max_items or decode[-1].token + 1 != span.token):
            pieces.append(_piece(decode, window, null_block, device))
            decode, num_items = [], 0
        decode.append(span)
        num_items += num_tiles
    if decode:
        pieces.append(_piece(decode, window, null_block, device))
    return pieces


def _first_tile(position: int, window: int | None) -> int:
    return 0 if window is None else max(0, position - window + 1) // TILE


def _num_tiles(span: RowSpan, window: int | None) -> int:
    return (span.start + span.num_tokens - 1) // TILE - _first_tile(span.start, window) + 1


def _parts(span: RowSpan, window: int | None, max_partials: int) -> list[RowSpan]:
    """A prompt's chunk cut into spans of so few queries that their partial results fit the bound."""
    size = max(1, min(_QUERY_TILE, max_partials // _num_tiles(span, window)))
    return [
        RowSpan(span.token + at, min(size, span.num_tokens - at), span.start + at, span.table)
        for at in range(0, span.num_tokens, size)
    ]


def _piece(spans: list[RowSpan], window: int | None, null_block: int, device: torch.device) -> Piece:
    """Spans of equal length, consecutive in the batch."""
    num_queries = spans[0].num_tokens
    starts = np.array([span.start for span in spans], dtype=np.int64)
    tables = np.full((len(spans), max(len(span.table) for span in spans)), -1, dtype=np.int64)
    for row, span in enumerate(spans):
        tables[row, : len(span.table)] = span.table
    first = np.array([_first_tile(span.start, window) for span in spans], dtype=np.int64)
    counts = (starts + num_queries - 1) // TILE - first + 1

    # 1. Items: the rows' tiles one after the other.
    item_rows = np.repeat(np.arange(len(spans)), counts)
    begins = np.cumsum(counts) - counts
    tiles = np.arange(len(item_rows)) - begins[item_rows] + first[item_rows]

    # 2. Their blocks, the null block beyond a table's end and where a block was freed.
    entries = tiles[:, None] * TILE_BLOCKS + np.arange(TILE_BLOCKS)
    inside = entries < tables.shape[1]
    blocks = np.where(inside, tables[item_rows[:, None], np.where(inside, entries, 0)], -1)
    blocks = np.where(blocks < 0, null_block, blocks)

    # 3. What each query must not see: later keys, keys before its window.
    keys = tiles[:, None, None] * TILE + np.arange(TILE)
    queries = (starts[item_rows, None] + np.arange(num_queries))[:, :, None]
    is_hidden = keys > queries
    if window is not None:
        is_hidden |= keys <= queries - window

    # 4. The order in which a row's partial results are added.
    at = np.arange(counts.max())[:, None]
    is_absent = at >= counts[None, :]
    order = np.where(is_absent, 0, begins[None, :] + at)
    return Piece(
        token=spans[0].token,
        num_rows=len(spans),
        num_queries=num_queries,
        item_rows=_tensor(item_rows, device),
        blocks=_tensor(blocks.reshape(-1), device),
        is_hidden=_tensor(is_hidden, device),
        order=_tensor(order, device),
        is_absent=_tensor(is_absent, device),
    )


def _tensor(values: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(device)


def paged_attention(
    query: torch.Tensor,  # [tokens, heads, key_dim]
    key_pages: torch.Tensor,  # [kv_heads, blocks, BLOCK_SIZE, key_dim]
    value_pages: torch.Tensor | None,  # [kv_heads, blocks, BLOCK_SIZE, value_dim]
    pieces: Sequence[Piece],
    *,
    value_dim: int,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,  # [heads]: a logit without a value that each query also sees
) -> torch.Tensor:  # [tokens, heads, value_dim]
    """Causal attention of every query over its row's pages; computed in float32.

    The keys and values of the batch's own tokens must be in the pages already. Tokens in no piece get zeros.
    Without `value_pages` a key's first `value_dim` numbers are its value (latent attention).
    """
    num_tokens, num_heads, _ = query.shape
    out = query.new_zeros(num_tokens, num_heads, value_dim)
    query = query.float() * scale
    for piece in pieces:
        stop = piece.token + piece.num_rows * piece.num_queries
        out[piece.token : stop] = _attend(
            query[piece.token : stop], key_pages, value_pages, value_dim, piece, softcap, sinks
        )
    return out


def _attend(
    query: torch.Tensor,  # [rows * queries, heads, key_dim], scaled
    key_pages: torch.Tensor,
    value_pages: torch.Tensor | None,
    value_dim: int,
    piece: Piece,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:  # [rows * queries, heads, value_dim]
    kv_heads, num_rows, num_queries = key_pages.shape[0], piece.num_rows, piece.num_queries
    num_items, share = len(piece.item_rows), query.shape[1] // kv_heads
    keys = key_pages.index_select(1, piece.blocks).float().view(kv_heads * num_items, TILE, -1)
    if value_pages is None:
        values = keys[..., :value_dim]
    else:
        values = value_pages.index_select(1, piece.blocks).float().view(kv_heads * num_items, TILE, -1)

    # Queries of the heads that share a KV head lie side by side: [kv_heads * items, copies * queries * share]
    copies = -(-MIN_QUERIES // (num_queries * share))
    grouped = query.view(num_rows, num_queries, kv_heads, share, -1).permute(2, 0, 1, 3, 4)
    if num_items != num_rows:
        grouped = grouped[:, piece.item_rows]
    if copies > 1:
        grouped = grouped.unsqueeze(2).expand(-1, -1, copies, -1, -1, -1)
    grouped = grouped.reshape(kv_heads * num_items, copies * num_queries * share, -1)

    scores = _product(grouped, keys.transpose(1, 2))
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    by_query = scores.view(kv_heads, num_items, copies, num_queries, share, TILE)
    by_query.masked_fill_(piece.is_hidden[None, :, None, :, None, :], float("-inf"))
    maxima = scores.amax(-1, keepdim=True).clamp_(min=_LOWEST)
    weights = scores.sub_(maxima).exp_()
    sums = weights.sum(-1, keepdim=True)
    partial = _product(weights, values)

    shape = (kv_heads, num_items, copies, num_queries, share, -1)
    merged = _merge(
        maxima.view(shape)[:, :, 0], sums.view(shape)[:, :, 0], partial.view(shape)[:, :, 0], piece, sinks
    )
    return merged.permute(1, 2, 0, 3, 4).reshape(num_rows * num_queries, kv_heads * share, -1)


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Batched matrix product whose rows do not depend on the batch (see MIN_BATCH)."""
    if len(left) >= MIN_BATCH:
        return torch.bmm(left, right)
    return torch.bmm(left.expand(MIN_BATCH, -1, -1), right.expand(MIN_BATCH, -1, -1))[:1]


def _merge(
    maxima: torch.Tensor,  # [kv_heads, items, queries, share, 1], as are the sums
    sums: torch.Tensor,
    partial: torch.Tensor,  # [kv_heads, items, queries, share, value_dim]
    piece: Piece,
    sinks: torch.Tensor | None,
) -> torch.Tensor:  # [kv_heads, rows, queries, share, value_dim]
    """Add each row's partial results in the order of its tiles; an absent tile adds an exact zero."""
    num_tiles = len(piece.order)
    if num_tiles == 1:  # one tile a row, in the rows' order: its weight is exp(0) = 1
        highest, total, result = maxima, sums, partial
    else:
        absent = piece.is_absent.view(1, num_tiles, -1, 1, 1, 1)
        ordered = maxima[:, piece.order].masked_fill_(absent, _LOWEST)
        highest = ordered.amax(1)
        factors = (ordered - highest[:, None]).exp_().masked_fill_(absent, 0.0)
        total = factors[:, 0] * sums[:, piece.order[0]]
        result = factors[:, 0] * partial[:, piece.order[0]]
        for tile in range(1, num_tiles):
            total += factors[:, tile] * sums[:, piece.order[tile]]
            result += factors[:, tile] * partial[:, piece.order[tile]]
    if sinks is not None:
        sink = sinks.float().view(maxima.shape[0], 1, 1, -1, 1)
        top = torch.maximum(highest, sink)
        shrink = (highest - top).exp_()
        total = total * shrink + (sink - top).exp_()
        result = result * shrink
    return result / total
