"""How many blocks there are, and what sizes mean."""

import pytest
import torch

from pagebus.executor import memory
from pagebus.executor.errors import ModelError
from pagebus.executor.memory import num_kv_blocks, num_physical_cores, parse_bytes
from pagebus.executor.model_runner import padded_size

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


@pytest.mark.parametrize(
    ("free", "max_model_len", "asked", "blocks"),
    [
        (32 << 30, 1 << 15, "auto", 4096),  # at most 4 GiB
        (4 << 30, 1 << 13, "auto", 1024),  # a quarter
        (4 << 30, 32_000, "auto", 2000),  # one full sequence, at most half of it
        (4 << 30, 1 << 20, "auto", 2048),
        (64 << 30, 32, "auto", 512),  # 256 full sequences are enough
        (4 << 30, 1 << 20, "3MiB", 3),
    ],
)
def test_blocks(
    monkeypatch: pytest.MonkeyPatch, free: int, max_model_len: int, asked: str, blocks: int
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: free)
    found = num_kv_blocks(
        bytes_a_block=1 << 20, max_model_len=max_model_len, device=CPU, kv_cache_memory=asked,
        gpu_memory_utilization=0.9,
    )  # fmt: skip
    assert found == blocks


def test_no_block_fits() -> None:
    with pytest.raises(ModelError, match="does not hold one block"):
        num_kv_blocks(
            bytes_a_block=1 << 20,
            max_model_len=64,
            device=CPU,
            kv_cache_memory="1000",
            gpu_memory_utilization=0.9,
        )


def test_machine() -> None:
    assert memory.free_memory() > 0
    assert num_physical_cores() >= 1


def test_padded_sizes_are_few_and_close() -> None:
    sizes = [padded_size(n) for n in range(1, 2049)]
    assert all(size >= max(n, 2) for n, size in enumerate(sizes, 1))
    assert all(size <= 1.13 * n + 2 for n, size in enumerate(sizes, 1))
    assert sizes == sorted(sizes)
    assert len(set(sizes)) < 80
