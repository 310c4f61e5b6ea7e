"""Contiguous memory for the systems before paging: one extent a request, by buddies or by best fit.

Sizes and addresses are in tokens. Knows no requests and no policy.
"""

import bisect
from typing import NamedTuple, Protocol


class Extent(NamedTuple):
    """Positions [start, start + size) of the pool. `size` is what was taken, at least what was asked for."""

    start: int
    size: int


class ExtentError(RuntimeError):
    """An extent was given back that nobody holds."""


class ContiguousAllocator(Protocol):
    """Hands out extents of one pool."""

    num_slots: int

    @property
    def num_free(self) -> int:
        """Positions that no extent holds, whether or not anything fits there."""

    def allocate(self, size: int) -> Extent | None:
        """An extent of at least `size` positions, or None where no hole is large enough."""

    def free(self, extent: Extent) -> None:
        """Give an extent back. Raises `ExtentError` where it is not held."""


class BuddyAllocator:
    """Powers of two, split in halves and joined again with their other half; the paper assumes it of Orca.

    A pool that is no power of two is a row of ever smaller ones:

    ```
    15,728 = | 8,192 | 4,096 | 2,048 | 1,024 | 256 | 64 | 32 | 16 |
    ```
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free: list[set[int]] = [set() for _ in range(num_slots.bit_length())]  # by log2 of the size
        self._held: dict[int, int] = {}  # start -> log2 of the size
        self._arenas: list[int] = []  # where each begins, ascending
        start = 0
        for order in reversed(range(num_slots.bit_length())):
            if num_slots >> order & 1:
                self._free[order].add(start)
                self._arenas.append(start)
                start += 1 << order

    @property
    def num_free(self) -> int:
        """Positions that no extent holds."""
        return self.num_slots - sum(1 << order for order in self._held.values())

    def allocate(self, size: int) -> Extent | None:
        """The lowest of the smallest holes, halved until it just holds `size`; None where there is none."""
        if size < 1:
            raise ValueError(f"an extent of {size} positions")
        wanted = (size - 1).bit_length()
        found = next((order for order in range(wanted, len(self._free)) if self._free[order]), None)
        if found is None:
            return None
        start = min(self._free[found])
        self._free[found].remove(start)
        for order in range(wanted, found):
            self._free[order].add(start + (1 << order))  # the upper half of each split
        self._held[start] = wanted
        return Extent(start, 1 << wanted)

    def free(self, extent: Extent) -> None:
        """Give an extent back and join it with its buddy for as long as that is free too."""
        order = self._held.get(extent.start)
        if order is None or extent.size != 1 << order:
            raise ExtentError(f"{extent} is not held")
        del self._held[extent.start]
        start = extent.start
        base = self._arenas[bisect.bisect_right(self._arenas, start) - 1]
        while True:
            buddy = base + ((start - base) ^ (1 << order))
            if buddy not in self._free[order]:
                break  # the buddy is in use or split, or this is a whole arena
            self._free[order].remove(buddy)
            start = min(start, buddy)
            order += 1
        self._free[order].add(start)


class BestFitAllocator:
    """Exact sizes, each from the smallest hole that holds it; neighbouring holes are joined."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._holes: list[Extent] = [Extent(0, num_slots)] if num_slots else []  # by start, never adjacent
        self._held: dict[int, int] = {}  # start -> size

    @property
    def num_free(self) -> int:
        """Positions that no extent holds."""
        return sum(hole.size for hole in self._holes)

    def allocate(self, size: int) -> Extent | None:
        """The beginning of the smallest hole that holds `size`; None where there is none."""
        if size < 1:
            raise ValueError(f"an extent of {size} positions")
        fitting = [(hole.size, i) for i, hole in enumerate(self._holes) if hole.size >= size]
        if not fitting:
            return None
        _, i = min(fitting)
        hole = self._holes[i]
        if hole.size == size:
            del self._holes[i]
        else:
            self._holes[i] = Extent(hole.start + size, hole.size - size)
        self._held[hole.start] = size
        return Extent(hole.start, size)

    def free(self, extent: Extent) -> None:
        """Give an extent back and join it with the holes beside it."""
        if self._held.get(extent.start) != extent.size:
            raise ExtentError(f"{extent} is not held")
        del self._held[extent.start]
        start, end = extent.start, extent.start + extent.size
        i = bisect.bisect_left(self._holes, extent)
        if i < len(self._holes) and self._holes[i].start == end:
            end += self._holes.pop(i).size
        if i > 0 and self._holes[i - 1].start + self._holes[i - 1].size == start:
            i -= 1
            start = self._holes.pop(i).start
        self._holes.insert(i, Extent(start, end - start))
