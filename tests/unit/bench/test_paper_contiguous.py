"""Contiguous allocators: extents never overlap, everything is accounted for, holes are joined again."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagebus.bench.paper_contiguous import (
    BestFitAllocator,
    BuddyAllocator,
    ContiguousAllocator,
    Extent,
    ExtentError,
)

KINDS = [BuddyAllocator, BestFitAllocator]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
steps = st.lists(st.tuples(st.booleans(), st.integers(1, 700), st.integers(0, 1 << 16)), max_size=60)


def check(allocator: ContiguousAllocator, held: list[Extent]) -> None:
    ordered = sorted(held)
    assert all(a.start + a.size <= b.start for a, b in pairwise(ordered))
    assert all(extent.start >= 0 and extent.start + extent.size <= allocator.num_slots for extent in held)
    assert allocator.num_free + sum(extent.size for extent in held) == allocator.num_slots


@kinds
@given(num_slots=st.integers(1, 5000), steps=steps)
def test_no_overlap_and_all_accounted_for(
    kind: type[BuddyAllocator | BestFitAllocator], num_slots: int, steps: list[tuple[bool, int, int]]
) -> None:
    allocator = kind(num_slots)
    largest = 1 << (num_slots.bit_length() - 1)  # what a new pool can give in one piece, by either kind
    held: list[Extent] = []
    for is_taken, size, pick in steps:
        if is_taken or not held:
            extent = allocator.allocate(size)
            if extent is not None:
                assert extent.size >= size
                held.append(extent)
        else:
            allocator.free(held.pop(pick % len(held)))
        check(allocator, held)
    for extent in held:
        allocator.free(extent)
    assert allocator.num_free == num_slots
    whole = allocator.allocate(largest)
    assert whole is not None
    assert whole.size == largest


@given(sizes=st.lists(st.integers(1, 600), max_size=40))
def test_buddies_are_powers_of_two_and_less_than_twice_what_was_asked(sizes: list[int]) -> None:
    allocator = BuddyAllocator(4096)
    for size in sizes:
        extent = allocator.allocate(size)
        if extent is not None:
            assert extent.size & (extent.size - 1) == 0
            assert size <= extent.size < 2 * size
            assert extent.start % extent.size == 0


def test_the_papers_pool_holds_seven_longest_requests() -> None:
    allocator = BuddyAllocator(15_728)
    extents = [allocator.allocate(2048) for _ in range(8)]
    assert sum(extent is not None for extent in extents) == 7
    assert allocator.num_free == 15_728 - 7 * 2048


def test_best_fit_takes_the_smallest_hole_that_is_large_enough() -> None:
    allocator = BestFitAllocator(100)
    first, _, third, _ = (allocator.allocate(size) for size in (30, 10, 15, 10))  # 35 are left at the end
    assert first is not None
    assert third is not None
    allocator.free(first)
    allocator.free(third)
    assert allocator.allocate(12) == Extent(40, 12)
    assert allocator.allocate(31) == Extent(65, 31)
    assert allocator.num_free == 100 - 20 - 12 - 31
    assert allocator.allocate(31) is None  # 37 are free, in three holes


@kinds
def test_what_is_not_held_cannot_be_freed(kind: type[BuddyAllocator | BestFitAllocator]) -> None:
    allocator = kind(64)
    extent = allocator.allocate(16)
    assert extent is not None
    with pytest.raises(ExtentError):
        allocator.free(Extent(extent.start, 8))
    allocator.free(extent)
    with pytest.raises(ExtentError):
        allocator.free(extent)
    with pytest.raises(ValueError, match="0 positions"):
        allocator.allocate(0)
