"""Pools and tables: nothing leaks, nothing is given back twice, windows let go of what they cannot see."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagebus.bus.messages import PoolGroup
from pagebus.scheduler.blocks import BlockError, BlockPool, KvPool, Tables


def test_allocate_share_release():
    pool = BlockPool(4)
    blocks = pool.allocate(3)
    assert sorted(blocks) == [0, 1, 2]
    pool.share(blocks[:1])
    pool.release(blocks)
    assert pool.num_free == 3
    assert pool.count(blocks[0]) == 1
    pool.release(blocks[:1])
    assert pool.num_free == 4
    assert pool.allocate(0) == []
    assert pool.num_free == 4


def test_misuse_raises():
    pool = BlockPool(2)
    with pytest.raises(BlockError, match="3 blocks asked for, 2 of 2 are free"):
        pool.allocate(3)
    (block,) = pool.allocate(1)
    pool.release([block])
    with pytest.raises(BlockError, match="given back twice"):
        pool.release([block])
    with pytest.raises(BlockError, match="cannot be shared"):
        pool.share([block])
    with pytest.raises(BlockError, match="block 2 of a pool of 2"):
        pool.release([2])
    with pytest.raises(BlockError):
        pool.release([-1])


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=80))
def test_free_and_held_are_always_all(operations):
    pool, held = BlockPool(12), []
    for is_allocation, count in operations:
        if is_allocation and count <= pool.num_free:
            held.extend(pool.allocate(count))
        elif not is_allocation:
            gone, held = held[:count], held[count:]
            pool.release(gone)
        assert len(set(held)) == len(held)
        assert pool.num_free + len(held) == 12


@given(
    window=st.integers(1, 70),
    num_blocks=st.integers(7, 30),
    jumps=st.lists(st.integers(1, 40), max_size=40),
)
def test_a_windowed_row_always_gets_on_and_sees_its_window(window, num_blocks, jumps):
    kv = KvPool([PoolGroup(num_blocks=num_blocks, window=window)], max_step_tokens=40)
    tables, position = Tables(1), 0
    for jump in jumps:
        kv.drop_unseen(tables, position)
        kv.grow(tables, position + jump)
        assert tables.capacity > position
        seen = range(max(0, position - window + 1) // 16, tables.capacity // 16)
        assert all(tables.blocks[0][entry] >= 0 for entry in seen)
        assert kv.num_free + len(tables.held()[0]) == num_blocks
        position = min(position + jump, tables.capacity)
    kv.release(tables.held())
    assert kv.num_free == num_blocks


def test_what_a_pool_holds():
    assert KvPool([PoolGroup(num_blocks=8)], 64).num_positions == 128
    assert KvPool([PoolGroup(num_blocks=8, window=32)], 64).num_positions is None
    assert KvPool([PoolGroup(num_blocks=3, window=32)], 64).num_positions == 48
    mixed = KvPool([PoolGroup(num_blocks=9, window=32), PoolGroup(num_blocks=20)], 64)
    assert mixed.num_positions == 320
    assert mixed.num_blocks == 20
