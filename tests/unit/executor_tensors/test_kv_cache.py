"""Pages: bytes a token, whole-block copies, groups of their own sizes, and latents instead of heads."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV3Config, PreTrainedConfig

from pagebus.executor.attention import AttentionCall
from pagebus.executor.batch import BlockCopy
from pagebus.executor.kv_cache import LayerSpec, needs_of
from pagebus.executor.latent import HeadLinears, LatentTap
from pagebus.executor.loader import load_model
from pagebus.executor.torch_cache import PagedCache
from pagebus.kernels.kv_write import BLOCK_SIZE
from pagebus.kernels.paged_attention import RowSpan
from tests.support.models import CONFIGS, make_model

CPU = torch.device("cpu")
SPECS = [
    LayerSpec(0, 4, 2, 8, 8, None),
    LayerSpec(1, 4, 2, 8, 8, 21),
    LayerSpec(2, 4, 1, 12, 8, None, is_latent=True),
]


def filled() -> PagedCache:
    cache = PagedCache(SPECS, [6, 3], torch.float32, CPU)
    for layer in range(3):
        for part, pages in enumerate(cache._layer_pages(layer)):
            pages.copy_(torch.randn_like(pages) + layer + part)
    return cache


def blocks(cache: PagedCache, group: int, block: int) -> list[torch.Tensor]:
    layers = [layer for layer, owner in cache.group_of.items() if owner == group]
    return [pages[:, block].clone() for layer in layers for pages in cache._layer_pages(layer)]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_groups_have_their_own_sizes() -> None:
    cache = PagedCache(SPECS, [6, 3], torch.float32, CPU)
    assert [(group.num_blocks, group.block_size, group.window) for group in cache.pool] == [
        (6, 16, None), (3, 16, 21)
    ]  # fmt: skip
    assert [need.bytes_a_block for need in needs_of(SPECS, torch.float32)] == [(32 + 12) * 64, 32 * 64]
    with pytest.raises(ValueError, match="1 numbers of blocks for 2 KV groups"):
        PagedCache(SPECS, [6], torch.float32, CPU)


def test_copies_are_whole_blocks_of_all_layers_of_one_group_in_order() -> None:
    cache = filled()
    before = {(g, b): blocks(cache, g, b) for g, n in ((0, 6), (1, 3)) for b in range(n)}
    cache.copy([BlockCopy(0, 1, 4), BlockCopy(0, 4, 2), BlockCopy(1, 2, 0), BlockCopy(0, 3, 1)])
    moved = {(0, 4): (0, 1), (0, 2): (0, 1), (1, 0): (1, 2), (0, 1): (0, 3)}
    for (group, block), old in before.items():
        assert same(blocks(cache, group, block), before[moved.get((group, block), (group, block))])
        if (group, block) in moved:
            assert not same(blocks(cache, group, block), old)
    cache.copy([])


@pytest.mark.parametrize("copy", [(2, 0, 1), (-1, 0, 1), (0, 6, 1), (0, 0, 6), (1, 0, 3), (0, -1, 1)])
def test_a_copy_of_what_is_not_there_copies_nothing(copy: tuple[int, int, int]) -> None:
    cache = filled()
    before = blocks(cache, 0, 5)
    with pytest.raises(ValueError, match="group"):
        cache.copy([BlockCopy(0, 0, 5), BlockCopy(*copy)])
    assert same(blocks(cache, 0, 5), before)


@pytest.mark.parametrize(
    ("config", "numbers_a_layer"),
    [
        (CONFIGS["deepseek_v2"], 48 + 16),
        (CONFIGS["deepseek_v2_lite"], 48 + 16),
        (CONFIGS["deepseek_v3"], 48 + 16),
        (CONFIGS["llama"], 2 * (64 + 64)),
    ],
)
def test_bytes_a_token(tmp_path: Path, config: Callable[[], PreTrainedConfig], numbers_a_layer: int) -> None:
    """Latent attention keeps the latent and the rotary part, once, whatever the heads."""
    config().save_pretrained(tmp_path)
    loaded = load_model(tmp_path, dtype="bfloat16", load_format="dummy")
    for spec in loaded.specs:
        assert spec.bytes_a_block(loaded.dtype) == numbers_a_layer * 2 * BLOCK_SIZE
    cache = PagedCache(loaded.specs, [10], loaded.dtype, CPU)
    held = sum(pages.nbytes for layer in range(3) for pages in cache._layer_pages(layer))
    assert held == 3 * numbers_a_layer * 2 * BLOCK_SIZE * (10 + 1)


@pytest.mark.parametrize("kind", [DeepseekV2Config, DeepseekV3Config])
def test_bytes_a_token_at_the_published_sizes(kind: type[PreTrainedConfig], tmp_path: Path) -> None:
    """(512 + 64) numbers a layer, as in the papers, against 128 heads' 40,960."""
    small = {
        "num_hidden_layers": 1, "hidden_size": 128, "intermediate_size": 64, "n_routed_experts": 8,
        "n_group": 4, "topk_group": 2, "num_experts_per_tok": 2, "vocab_size": 100, "num_attention_heads": 16,
        "num_key_value_heads": 16, "moe_intermediate_size": 32, "first_k_dense_replace": 0,
        "q_lora_rank": None,
    }  # fmt: skip
    kind(**small).save_pretrained(tmp_path)
    loaded = load_model(tmp_path, dtype="bfloat16", load_format="dummy")
    assert [spec.numbers_a_token for spec in loaded.specs] == [576]
    assert [spec.bytes_a_block(torch.bfloat16) for spec in loaded.specs] == [576 * 2 * BLOCK_SIZE]


def test_absorbed_heads_are_the_expanded_ones() -> None:
    """q . W_k c = (W_k^T q) . c, and W_v of the weighted latents is the weighted values."""
    torch.manual_seed(0)
    heads, key_dim, value_dim, rank, rope, tokens = 3, 10, 7, 12, 4, 19
    linear = torch.nn.Linear(rank, heads * (key_dim + value_dim), bias=False)
    tap = LatentTap(linear.weight, heads, key_dim)
    latents, query = torch.randn(1, tokens, rank), torch.randn(heads, tokens, key_dim + rope)
    turned = torch.randn(tokens, rope)
    expanded = linear(latents)[0].view(tokens, heads, -1).transpose(0, 1)
    keys = torch.cat((expanded[..., :key_dim], turned.expand(heads, -1, -1)), -1)
    empty = torch.cat((torch.zeros(heads, tokens, key_dim), turned.expand(heads, -1, -1)), -1)
    assert tap(latents).shape == (1, tokens, heads * (key_dim + value_dim))
    moved, key = tap.absorb(query, empty)
    torch.testing.assert_close(moved @ key.transpose(1, 2), query @ keys.transpose(1, 2))
    weights = torch.rand(heads, tokens, tokens)
    found = tap.expand((weights @ latents).transpose(0, 1))
    torch.testing.assert_close(found.transpose(0, 1), weights @ expanded[..., key_dim:])
    with pytest.raises(RuntimeError, match="before the latents"):
        tap.absorb(query, empty)
    for strange in (empty.flip(-1), empty + torch.arange(heads)[:, None, None] * (empty != 0)):
        other = LatentTap(linear.weight, heads, key_dim)
        other(latents)
        with pytest.raises(TypeError, match="another way"):
            other.absorb(query, strange)


@pytest.mark.parametrize("sizes", [(16, 128, 512), (16, 512, 128), (3, 10, 7)])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_linears_of_heads_are_row_invariant(sizes: tuple[int, int, int], num_threads: int) -> None:
    heads, dim, out = sizes
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        linears = HeadLinears(torch.randn(heads, dim, out) / dim**0.5)
        inputs = torch.randn(heads, 70, dim)
        alone = torch.cat([linears(inputs[:, i : i + 1]) for i in range(70)], 1)
        for size in (2, 7, 16, 17, 32, 70):
            for start in {0, 70 - size}:
                assert torch.equal(linears(inputs[:, start : start + size]), alone[:, start : start + size])
    finally:
        torch.set_num_threads(before)


def test_attention_never_reads_what_a_window_has_freed(tmp_path: Path) -> None:
    """Freed blocks hold NaN, and the rows that go on do not see it; a block that is not freed would show."""
    loaded = load_model(make_model("mistral", tmp_path, has_tokenizer=False), dtype="float32")
    cache = PagedCache(loaded.specs, [40], loaded.dtype, CPU)
    torch.manual_seed(1)
    key, value = torch.randn(2, 300, 64), torch.randn(2, 300, 64)
    query = torch.randn(4, 300, 64)

    def attend(start: int, stop: int, table: list[int]) -> torch.Tensor:
        span = RowSpan(0, stop - start, start, torch.tensor(table).numpy())
        at = slice(start, stop)
        call = AttentionCall(0, query[:, at], key[:, at], value[:, at], 0.125, 37, None, None)
        return cache.attend(call, cache.plan([[span]]))

    table = list(range(19, 0, -1))
    whole = attend(0, 300, table)
    for start in (290, 200, 64, 299):
        first = (start - 37 + 1) // BLOCK_SIZE
        freed = [-1] * first + table[first:]
        clean = {block: blocks(cache, 0, block) for block in table[: first + 1]}
        for block in table[:first]:
            for pages in cache._layer_pages(0):
                pages[:, block] = float("nan")
        assert torch.equal(attend(start, 300, freed), whole[start:])
        for pages in cache._layer_pages(0):
            pages[:, table[first]] = float("nan")
        assert not torch.isfinite(attend(start, 300, freed)).all()
        for block, parts in clean.items():
            for pages, part in zip(cache._layer_pages(0), parts[:2], strict=True):
                pages[:, block] = part
