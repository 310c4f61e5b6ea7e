"""How many blocks there are, and what sizes mean."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pagebus.executor import memory
from pagebus.executor.errors import ModelError
from pagebus.executor.linears import padded_size
from pagebus.executor.memory import GroupNeed, blocks_of_groups, num_physical_cores, parse_bytes, share_blocks

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512MiB", 512 << 20),
        ("4GiB", 4 << 30),
        ("1.5 GB", 1_500_000_000),
        ("4g", 4 * 10**9),
        ("1048576", 1 << 20),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "lots", "-1GiB", "4GiBs", "1e9", "4 4GiB"])
def test_wrong_sizes_are_named(text: str) -> None:
    with pytest.raises(ModelError, match="--kv-cache-memory"):
        parse_bytes(text)


def blocks(groups: list[GroupNeed], max_model_len: int, asked: str) -> list[int]:
    return blocks_of_groups(
        groups, max_model_len=max_model_len, device=CPU, kv_cache_memory=asked, gpu_memory_utilization=0.9
    )


@pytest.mark.parametrize(
    ("free", "max_model_len", "asked", "wanted"),
    [
        (32 << 30, 1 << 15, "auto", 4096),  # at most 4 GiB
        (4 << 30, 1 << 13, "auto", 1024),  # a quarter
        (4 << 30, 32_000, "auto", 2000),  # one full sequence, at most half of it
        (4 << 30, 1 << 20, "auto", 2048),
        (64 << 30, 32, "auto", 512),  # 256 full sequences are enough
        (4 << 30, 1 << 20, "3MiB", 3),
        (4 << 30, 16, "3MiB", 3),
    ],
)
def test_blocks(
    monkeypatch: pytest.MonkeyPatch, free: int, max_model_len: int, asked: str, wanted: int
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: free)
    assert blocks([GroupNeed(1 << 20, None)], max_model_len, asked) == [wanted]


def test_no_block_fits() -> None:
    with pytest.raises(ModelError, match="does not hold one block"):
        blocks([GroupNeed(1 << 20, None)], 64, "1000")
    with pytest.raises(ModelError, match="does not hold one block"):
        blocks([GroupNeed(1 << 20, None), GroupNeed(1 << 20, 64)], 64, "1MiB")


def test_a_window_gets_fewer_blocks_by_the_formula() -> None:
    longest, window = 32_768, 1024
    full, windowed = blocks([GroupNeed(4 << 10, None), GroupNeed(22 << 10, window)], longest, "256MiB")
    s, h, chunk = 2048, 66, 128
    ratio = (h - 1 + h * math.log(s / h)) / (s - 1)
    assert windowed == pytest.approx(full * ratio + chunk, abs=8)
    assert windowed < full / 5
    assert full * (4 << 10) + windowed * (22 << 10) <= 256 << 20
    assert full > 1.9 * ((256 << 20) // (26 << 10)), "equal shares would hold far less"


def test_the_longest_sequence_fits_where_it_can() -> None:
    """By the formula the full group would get 1,500 of the 2,048 blocks that the context takes."""
    groups = [GroupNeed(4 << 10, None), GroupNeed(22 << 10, 1024)]
    budget = 2048 * (4 << 10) + 300 * (22 << 10)
    full, windowed = blocks(groups, 32_768, str(budget))
    assert 2048 <= full < 2048 + 6
    assert 299 <= windowed <= 300


@settings(max_examples=300, deadline=None)
@given(
    needs=st.lists(
        st.tuples(st.integers(1, 1 << 20), st.none() | st.integers(1, 1 << 16)), min_size=1, max_size=3
    ),
    budget=st.integers(0, 1 << 34),
    max_model_len=st.integers(1, 1 << 18),
)
def test_shares_never_exceed_the_budget(
    needs: list[tuple[int, int | None]], budget: int, max_model_len: int
) -> None:
    groups = [GroupNeed(size, window) for size, window in needs]
    longest = -(-max_model_len // 16)
    held = [longest if window is None else min(longest, -(-window // 16) + 2) for _, window in needs]
    try:
        shares = share_blocks(groups, budget, max_model_len)
    except ModelError:
        assert budget < sum(size for size, _ in needs)
        return
    assert min(shares) >= 1
    assert sum(n * size for n, (size, _) in zip(shares, needs, strict=True)) <= budget
    assert all(n <= 256 * h + 128 for n, h in zip(shares, held, strict=True))
    chunks = sum(128 * size for size, window in needs if window is not None)
    if budget >= chunks + sum((h + 1) * size for h, (size, _) in zip(held, needs, strict=True)):
        assert all(n >= h for n, h in zip(shares, held, strict=True)), "the longest sequence must fit"


def test_machine() -> None:
    assert memory.free_memory() > 0
    assert num_physical_cores() >= 1


def test_padded_sizes_are_few_and_close() -> None:
    sizes = [padded_size(n) for n in range(1, 2049)]
    assert all(size >= max(n, 2) for n, size in enumerate(sizes, 1))
    assert all(size <= 1.13 * n + 2 for n, size in enumerate(sizes, 1))
    assert sizes == sorted(sizes)
    assert len(set(sizes)) < 80
