"""Pools: nothing leaks, nothing is given back twice, what is cached can be found until it is taken."""

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagebus.bus.messages import PoolGroup
from pagebus.scheduler.blocks import BlockError, BlockPool, KvPool
from pagebus.scheduler.prefix import extend_digests, find_hit, root_digest

OPERATIONS = ("allocate", "release", "share", "register")


def test_allocate_share_release():
    pool = BlockPool(4)
    blocks = pool.allocate(3)
    assert blocks.tolist() == [0, 1, 2]
    pool.share(blocks[:1])
    pool.release(blocks)
    assert pool.num_free == 3
    assert pool.count(0) == 1
    pool.release(blocks[:1])
    assert pool.num_free == 4
    assert len(pool.allocate(0)) == 0
    assert pool.num_free == 4


def test_misuse_raises():
    pool = BlockPool(2)
    with pytest.raises(BlockError, match="3 blocks asked for, 2 of 2 can be had"):
        pool.allocate(3)
    (block,) = pool.allocate(1).tolist()
    pool.release([block])
    with pytest.raises(BlockError, match="given back twice"):
        pool.release([block])
    with pytest.raises(BlockError, match="cannot be shared"):
        pool.share([block])
    with pytest.raises(BlockError, match="block 2 of a pool of 2"):
        pool.share([2])


def test_a_cached_block_is_found_until_it_is_taken_least_recently_used_first():
    pool = BlockPool(3)
    first, second, third = pool.allocate(3).tolist()
    for block, digest in ((first, b"a"), (second, b"b")):
        pool.register(block, digest)
    pool.register(third, b"a")  # known already: this one stays unknown
    pool.release([first, second, third])
    assert (pool.num_free, pool.num_cached) == (3, 2)
    assert [pool.find(digest) for digest in (b"a", b"b", b"c")] == [first, second, -1]
    pool.share([first])
    pool.release([first])  # used again, later than the second
    assert pool.allocate(2).tolist() == [second, third]
    assert [pool.find(digest) for digest in (b"a", b"b")] == [first, -1]
    pool.clear_cache()
    assert pool.find(b"a") == -1
    assert (pool.num_free, pool.num_cached) == (1, 0)


@given(
    st.lists(
        st.tuples(st.sampled_from(["allocate", "release", "share", "register"]), st.integers(0, 5)),
        max_size=80,
    )
)
def test_free_used_and_cached_are_always_all(operations):
    pool, held, num_digests = BlockPool(12), [], 0
    for what, count in operations:
        if what == "allocate" and count <= pool.num_free:
            held.extend([block] for block in pool.allocate(count).tolist())
        elif what == "release":
            gone, held = held[:count], held[count:]
            for blocks in gone:
                pool.release(blocks)
        elif what == "share" and held:
            pool.share(held[count % len(held)])
            held.append(held[count % len(held)])
        elif what == "register" and held:
            num_digests += 1
            pool.register(held[count % len(held)][0], b"%d" % num_digests)
        used = {block for blocks in held for block in blocks}
        assert pool.num_free + len(used) == 12
        assert sorted([*pool._free, *pool._cached, *used]) == list(range(12))
        assert all(pool.find(digest) == block for block, digest in pool._digests.items())


def test_what_a_pool_holds():
    assert KvPool([PoolGroup(num_blocks=8)], 64).num_positions == 128
    assert KvPool([PoolGroup(num_blocks=8, window=32)], 64).num_positions is None
    assert KvPool([PoolGroup(num_blocks=3, window=32)], 64).num_positions == 48
    mixed = KvPool([PoolGroup(num_blocks=9, window=32), PoolGroup(num_blocks=20)], 64)
    assert mixed.num_positions == 320
    assert mixed.main.num_blocks == 20


def chain(ids, tenant="", salt=""):
    digests = []
    extend_digests(digests, root_digest(tenant, salt), array("i", ids), 16)
    return digests


def test_a_digest_covers_all_before_it_the_tenant_and_the_salt():
    ids = list(range(64))
    assert len(chain(ids)) == 4
    assert chain(ids[:40]) == chain(ids)[:2]
    assert len({*chain(ids), *chain(ids, "t"), *chain(ids, "", "t"), *chain(ids, "t", "t")}) == 16
    assert chain([9, *ids[1:]])[3] != chain(ids)[3]
    grown = chain(ids[:20])
    extend_digests(grown, root_digest("", ""), array("i", ids), 16)
    assert grown == chain(ids)


@given(
    present=st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=2, max_size=2),
    window=st.integers(1, 60),
    num_ids=st.integers(1, 110),
)
def test_a_hit_is_the_longest_prefix_that_every_group_can_go_on_from(present, window, num_ids):
    kv = KvPool([PoolGroup(num_blocks=8), PoolGroup(num_blocks=8, window=window)], 64)
    digests = chain(range(num_ids))
    for pool, is_here in zip(kv.pools, present, strict=True):
        blocks = pool.allocate(6).tolist()
        for block, digest, here in zip(blocks, digests, is_here, strict=False):
            if here:
                pool.register(block, digest)
    lengths = []
    for length in range(1, (num_ids - 1) // 16 + 1):
        seen = range(max(0, length * 16 - window + 1) // 16, length)
        if all(present[0][:length]) and all(present[1][entry] for entry in seen):
            lengths.append(length)
    hit = find_hit(kv, digests, num_ids)
    assert (hit.num_positions if hit else 0) == max(lengths, default=0) * 16
    if hit:
        for g, pool in enumerate(kv.pools):
            found = [pool._digests[block] for block in hit.blocks[g]]
            assert found == digests[hit.first[g] : hit.num_positions // 16]
