"""Paged attention against attention written out in float64, odd sizes, and bit for bit against itself."""

import random

import numpy as np
import pytest
import torch

from pagebus.kernels.kv_write import BLOCK_SIZE, write_kv
from pagebus.kernels.paged_attention import MAX_PARTIALS, TILE, RowSpan, paged_attention, plan_attention

NUM_BLOCKS = 200


class Pages:
    """Random sequences in pages, the blocks in random order; stale blocks hold large values."""

    def __init__(
        self, lengths: list[int], *, heads: int, kv_heads: int, dim: int, value_dim: int, seed: int
    ) -> None:
        torch.manual_seed(seed)
        rng = random.Random(seed)
        self.keys = torch.full((kv_heads, NUM_BLOCKS + 1, BLOCK_SIZE, dim), 1e4)
        self.values = torch.full((kv_heads, NUM_BLOCKS + 1, BLOCK_SIZE, value_dim), 1e4)
        self.keys[:, NUM_BLOCKS] = 0
        self.values[:, NUM_BLOCKS] = 0
        free = list(range(NUM_BLOCKS))
        rng.shuffle(free)
        self.rows: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, np.ndarray]] = []
        for length in lengths:
            table = np.array([free.pop() for _ in range(-(-length // BLOCK_SIZE))], dtype=np.int64)
            query = torch.randn(length, heads, dim)
            key, value = torch.randn(kv_heads, length, dim), torch.randn(kv_heads, length, value_dim)
            positions = np.arange(length)
            slots = torch.from_numpy(table[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE)
            write_kv(self.keys, key, slots)
            write_kv(self.values, value, slots)
            self.rows.append((query, key, value, table))

    def attend(self, parts: list[tuple[int, int, int]], **how: object) -> torch.Tensor:
        """Queries [start, end) of each part's row, in one flat batch."""
        window, max_partials = how.pop("window", None), how.pop("max_partials", MAX_PARTIALS)
        values = None if how.pop("is_latent", False) else self.values
        spans, queries, token = [], [], 0
        for row, start, end in parts:
            spans.append(RowSpan(token, end - start, start, self.rows[row][3]))
            queries.append(self.rows[row][0][start:end])
            token += end - start
        pieces = plan_attention(
            spans, window=window, null_block=NUM_BLOCKS, max_items=5, max_partials=max_partials,
            device=torch.device("cpu"),
        )  # fmt: skip
        return paged_attention(
            torch.cat(queries), self.keys, values, pieces, value_dim=self.values.shape[3], scale=0.3, **how
        )


def exact(pages: Pages, row: int, *, window: int | None, softcap: float | None, sinks: torch.Tensor | None):
    query, key, value, _ = pages.rows[row]
    share = query.shape[1] // len(key)
    key, value = (part.double().repeat_interleave(share, 0) for part in (key, value))
    scores = query.double().transpose(0, 1) @ key.transpose(1, 2) * 0.3
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    at = torch.arange(len(query))
    hidden = at[None, :] > at[:, None]
    if window is not None:
        hidden |= at[None, :] <= at[:, None] - window
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks.double().view(-1, 1, 1).expand(-1, len(query), 1)), -1)
    weights = scores.softmax(-1)[..., : len(query)]
    return (weights @ value).transpose(0, 1)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "value_dim"), [(4, 2, 64, 64), (3, 3, 16, 16), (8, 1, 24, 40), (6, 2, 33, 7)]
)
@pytest.mark.parametrize(
    ("window", "softcap", "has_sinks"),
    [(None, None, False), (21, None, True), (150, 2.0, False), (1, None, False)],
)
def test_equals_exact_attention(
    heads: int,
    kv_heads: int,
    dim: int,
    value_dim: int,
    window: int | None,
    softcap: float | None,
    has_sinks: bool,
) -> None:
    lengths = [1, 2, 16, 17, 127, 128, 129, 300, 513]
    pages = Pages(lengths, heads=heads, kv_heads=kv_heads, dim=dim, value_dim=value_dim, seed=1)
    sinks = torch.randn(heads) if has_sinks else None
    decode = [(row, length - 1, length) for row, length in enumerate(lengths)]
    prefill = [(row, length // 3, length) for row, length in enumerate(lengths) if length > 2]
    parts = decode + prefill
    found = pages.attend(parts, window=window, softcap=softcap, sinks=sinks)
    token = 0
    for row, start, end in parts:
        wanted = exact(pages, row, window=window, softcap=softcap, sinks=sinks)[start:end]
        torch.testing.assert_close(found[token : token + end - start].double(), wanted, rtol=1e-4, atol=1e-4)
        token += end - start


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (2, 1), (3, 3), (4, 2), (12, 2)])
@pytest.mark.parametrize("window", [None, 40])
def test_bits_do_not_depend_on_chunks_or_batch(heads: int, kv_heads: int, window: int | None) -> None:
    lengths = [3, 20, 130, 290, 5, 128]
    pages = Pages(lengths, heads=heads, kv_heads=kv_heads, dim=64, value_dim=64, seed=2)
    whole = [pages.attend([(row, 0, length)], window=window) for row, length in enumerate(lengths)]
    rng = random.Random(3)
    for _ in range(25):
        parts = []
        for row in rng.sample(range(len(lengths)), rng.randint(1, len(lengths))):
            start = rng.randrange(lengths[row])
            parts.append((row, start, rng.choice([start + 1, rng.randint(start + 1, lengths[row])])))
        parts.sort(key=lambda part: part[2] - part[1] > 1)
        found, token = pages.attend(parts, window=window), 0
        for row, start, end in parts:
            assert torch.equal(found[token : token + end - start], whole[row][start:end])
            token += end - start


LATENT = {"heads": 16, "kv_heads": 1, "dim": 576, "value_dim": 512}  # as in DeepSeek V2 Lite


def latent_pages(lengths: list[int], **sizes: int) -> Pages:
    """Pages whose values are the first part of the keys."""
    pages = Pages(lengths, **sizes, seed=6)
    dim = sizes["value_dim"]
    pages.values.copy_(pages.keys[..., :dim])
    pages.rows = [(query, key, key[..., :dim], table) for query, key, _, table in pages.rows]
    return pages


def test_latent_pages_are_keys_and_values_at_once() -> None:
    lengths = [1, 17, 128, 200]
    pages = latent_pages(lengths, heads=6, kv_heads=1, dim=40, value_dim=24)
    token, parts = 0, [(row, 0, length) for row, length in enumerate(lengths)]
    found = pages.attend(parts, is_latent=True)
    assert found.shape == (sum(lengths), 6, 24)
    for row, _, length in parts:
        wanted = exact(pages, row, window=None, softcap=None, sinks=None)
        torch.testing.assert_close(found[token : token + length].double(), wanted, rtol=1e-4, atol=1e-4)
        token += length


@pytest.mark.parametrize("num_threads", [1, 2])
def test_bits_of_latent_attention_do_not_depend_on_chunks_or_batch(num_threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        lengths = [3, 130, 290, 128]
        pages = latent_pages(lengths, **LATENT)
        whole = [pages.attend([(row, 0, length)], is_latent=True) for row, length in enumerate(lengths)]
        alone = [pages.attend([(row, n - 1, n)], is_latent=True)[0] for row, n in enumerate(lengths)]
        assert all(torch.equal(one, all_of[-1]) for one, all_of in zip(alone, whole, strict=True))
        for size, max_partials in ((2, 16_384), (4, 16_384), (4, 40)):
            parts = [(row, lengths[row] - 3, lengths[row]) for row in range(size)]
            found = pages.attend(parts, is_latent=True, max_partials=max_partials)
            for place, row in enumerate(range(size)):
                assert torch.equal(found[3 * place : 3 * place + 3], whole[row][-3:])
    finally:
        torch.set_num_threads(before)


def test_freed_blocks_of_a_window_are_not_read() -> None:
    pages = Pages([400], heads=2, kv_heads=1, dim=32, value_dim=32, seed=4)
    whole = pages.attend([(0, 399, 400)], window=30)
    table = pages.rows[0][3]
    first = (400 - 30) // BLOCK_SIZE
    for block in table[:first]:
        pages.values[:, block] = float("nan")
    table[:first] = -1
    assert torch.equal(pages.attend([(0, 399, 400)], window=30), whole)


def test_tokens_in_no_piece_get_zeros() -> None:
    pages = Pages([5], heads=2, kv_heads=1, dim=8, value_dim=8, seed=5)
    pieces = plan_attention(
        [RowSpan(0, 1, 4, pages.rows[0][3])], window=None, null_block=NUM_BLOCKS, max_items=4,
        device=torch.device("cpu"),
    )  # fmt: skip
    out = paged_attention(torch.randn(3, 2, 8), pages.keys, pages.values, pieces, value_dim=8, scale=1.0)
    assert out[0].abs().sum() > 0
    assert out[1:].abs().sum() == 0


def test_rows_are_cut_into_pieces_of_bounded_size() -> None:
    table = np.arange(100, dtype=np.int64)
    spans = [RowSpan(i, 1, 4 * TILE, table) for i in range(7)] + [RowSpan(7, 300, 0, table)]
    pieces = plan_attention(spans, window=None, null_block=100, max_items=10, device=torch.device("cpu"))
    covered = [
        t for piece in pieces for t in range(piece.token, piece.token + piece.num_rows * piece.num_queries)
    ]
    assert sorted(covered) == list(range(307))
    assert all(len(piece.item_rows) <= 10 for piece in pieces)
    few = plan_attention(
        spans, window=None, null_block=100, max_items=10, max_partials=30, device=torch.device("cpu")
    )
    prompt = [piece for piece in few if piece.num_queries > 1]
    assert all(len(piece.item_rows) * piece.num_queries <= 30 for piece in prompt)
    assert sum(piece.num_queries for piece in prompt) == 300
