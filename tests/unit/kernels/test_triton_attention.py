"""Paged attention's kernels against float64, in Triton's interpreter: no GPU and no bfloat16."""

import pytest

pytest.importorskip("triton")

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pagebus.kernels.jit import IS_INTERPRETED
from pagebus.kernels.triton_attention import TileConfig, num_segments, tile_config
from tests.support.kernel_checks import AttentionCase, check_attention, poison_empty

pytestmark = pytest.mark.skipif(
    not IS_INTERPRETED, reason="triton was imported before TRITON_INTERPRET was set"
)
SMALL = TileConfig(16, 16, 4, 1)
MIXED = [(1, 40), (19, 19), (7, 53), (1, 1), (33, 70), (0, 0), (1, 16)]


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    poison_empty(monkeypatch)


@pytest.mark.parametrize("window", [None, 1, 9, 32])
@pytest.mark.parametrize("config", [None, SMALL, TileConfig(32, 32, 4, 1)])
def test_mixed_batch(window, config) -> None:
    out = check_attention(AttentionCase(MIXED, window=window, config=config, num_tail_tokens=5))
    assert not out[-5:].any()


@pytest.mark.parametrize(
    ("k_dim", "v_dim"), [(8, 8), (16, 16), (80, 80), (96, 96), (192, 128), (64, 24), (24, 64), (72, 40)]
)
@pytest.mark.parametrize("is_decode", [False, True])
def test_head_sizes(k_dim, v_dim, is_decode) -> None:
    rows = [(1, 37), (1, 5)] if is_decode else [(3, 37), (5, 5)]
    check_attention(
        AttentionCase(rows, k_dim=k_dim, v_dim=v_dim, is_decode=is_decode, segments=1 + is_decode)
    )


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 6), (7, 1), (14, 2), (20, 1), (32, 2), (9, 3)])
@pytest.mark.parametrize("is_decode", [False, True])
def test_groups_of_heads(heads, kv_heads, is_decode) -> None:
    rows = [(1, 37), (1, 0), (1, 5)] if is_decode else [(3, 37), (1, 20), (5, 5)]
    check_attention(AttentionCase(rows, heads=heads, kv_heads=kv_heads, is_decode=is_decode))


@pytest.mark.parametrize("segments", [1, 2, 8])
@pytest.mark.parametrize("window", [None, 20])
def test_split_decode(segments, window) -> None:
    rows = [(1, 150), (1, 1), (1, 0), (1, 17), (1, 0)]
    out = check_attention(
        AttentionCase(rows, is_decode=True, segments=segments, window=window, config=SMALL, has_sinks=True)
    )
    assert not out[[2, 4]].any()


@pytest.mark.parametrize("is_decode", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_softcap_sinks_and_pages_head_major(is_decode, dtype) -> None:
    rows = [(1, 50), (1, 0), (1, 33)] if is_decode else MIXED
    check_attention(
        AttentionCase(
            rows, softcap=3.0, has_sinks=True, window=30, is_decode=is_decode, is_head_major=True,
            dtype=dtype, segments=2 if is_decode else 1, config=SMALL, scales=(0.5, 1.7),
            tolerance=3e-5 if dtype == torch.float32 else 4e-3,
        )
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("is_decode", [False, True])
@pytest.mark.parametrize("segments", [1, 4])
def test_fp8_pages_with_a_peak_for_each_vector(dtype, is_decode, segments) -> None:
    """Vectors' sizes differ by five orders of magnitude."""
    rows = [(1, 90), (1, 0), (1, 33), (1, 1)] if is_decode else MIXED
    check_attention(
        AttentionCase(
            rows, k_dim=40, v_dim=24, dtype=dtype, is_decode=is_decode, segments=segments if is_decode else 1,
            has_peaks=True, has_sinks=True, softcap=20.0, window=None if is_decode else 30, config=SMALL,
            is_head_major=segments == 4, tolerance=2e-3 if dtype == torch.float32 else 0.2,
        )
    )  # fmt: skip


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 40)), min_size=1, max_size=4),
    group=st.integers(1, 9),
    window=st.none() | st.integers(1, 50),
    seed=st.integers(0, 2**31),
    block_m=st.sampled_from([16, 32]),
    tile=st.sampled_from([16, 32]),
    tail=st.integers(0, 9),
)
def test_any_mixed_batch(lengths, group, window, seed, block_m, tile, tail) -> None:
    rows = [(queries, queries + before) for queries, before in lengths]
    if not tail + sum(queries for queries, _ in rows):
        return
    check_attention(
        AttentionCase(
            rows, heads=2 * group, window=window, seed=seed, num_tail_tokens=tail,
            config=TileConfig(block_m, tile, 4, 1), k_dim=16, v_dim=16,
        )
    )  # fmt: skip


def test_a_row_has_the_same_bits_alone_and_in_a_batch() -> None:
    """The last row's random numbers do not depend on padding rows before it."""
    alone = check_attention(AttentionCase([(5, 61)], config=SMALL))
    batch = check_attention(AttentionCase([(0, 0), (5, 61), (0, 0)], config=SMALL, num_tail_tokens=0))
    assert torch.equal(alone, batch)


def test_segments_are_a_function_of_the_launch_and_bounded() -> None:
    assert num_segments(256, 8, 4096, 64, 132) == 1
    assert num_segments(1, 8, 131072, 64, 132) == 32
    assert num_segments(1, 8, 1024, 64, 132) == 4
    assert num_segments(1, 8, 16, 64, 132) == 1
    for group in (1, 7, 16, 71):
        assert tile_config(128, 128, torch.bfloat16, group, is_decode=True).block_m >= group
