"""Who holds which KV block of one executor. Knows no rows, plans or messages beyond the shape of a KV group.

The prefix cache belongs here, between `release` and the free list: a block whose count falls to zero may stay
findable by its hash until `allocate` takes it.
"""

from array import array
from collections.abc import Sequence

from pagebus.bus.messages import PoolGroup


class BlockError(RuntimeError):
    """A block was taken that is not free, or given back that nobody holds: a bug, never a load condition."""


class BlockPool:
    """The blocks of one KV group with reference counts; every operation is O(1) a block."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._counts = array("i", bytes(4 * num_blocks))
        self._free = list(range(num_blocks - 1, -1, -1))  # taken from the end: low ids first

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def allocate(self, num: int) -> list[int]:
        """Take `num` blocks, each with one reference. Raises `BlockError` when fewer are free."""
        if num > len(self._free):
            raise BlockError(f"{num} blocks asked for, {len(self._free)} of {self.num_blocks} are free")
        if num == 0:
            return []
        taken = self._free[-num:][::-1]
        del self._free[-num:]
        for block in taken:
            self._counts[block] = 1
        return taken

    def share(self, blocks: Sequence[int]) -> None:
        """Add a reference to blocks that are held. Raises `BlockError` for a free one."""
        for block in blocks:
            if self.count(block) == 0:
                raise BlockError(f"block {block} is free and cannot be shared")
            self._counts[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Give up one reference to each block. Raises `BlockError` for one that nobody holds."""
        for block in blocks:
            if self.count(block) == 0:
                raise BlockError(f"block {block} was given back twice")
            self._counts[block] -= 1
            if self._counts[block] == 0:
                self._free.append(block)

    def count(self, block: int) -> int:
        """References to `block`. Raises `BlockError` for an id outside the pool."""
        if not 0 <= block < self.num_blocks:
            raise BlockError(f"block {block} of a pool of {self.num_blocks}")
        return self._counts[block]


class Tables:
    """A row's block tables, one a KV group. Entries are absolute: entry e holds positions [16 e, 16 e + 16).

    ```
    group with a window     | -1 | -1 | 17 | 4 | 9 |
    num_dropped = 2 ---------^^^^^^^^^   no position can see these any more: their blocks went back
    num_told = 4 -----------------------------^     entries that a plan has carried to the executor
    ```
    """

    __slots__ = ("blocks", "capacity", "num_dropped", "num_told")

    def __init__(self, num_groups: int) -> None:
        self.blocks: list[array[int]] = [array("i") for _ in range(num_groups)]
        self.num_dropped = [0] * num_groups
        self.num_told = [0] * num_groups
        self.capacity = 0  # positions that all groups have a slot for

    def held(self) -> list[list[int]]:
        """The blocks held now, by group."""
        return [list(blocks[dropped:]) for blocks, dropped in zip(self.blocks, self.num_dropped, strict=True)]


class KvPool:
    """All KV groups of one executor."""

    def __init__(self, groups: Sequence[PoolGroup], max_step_tokens: int) -> None:
        """`max_step_tokens`: longest chunk of a step; with the window it bounds what a row holds at once."""
        self.groups = tuple(groups)
        self.max_step_tokens = max_step_tokens
        self.pools = [BlockPool(group.num_blocks) for group in self.groups]
        self._sizes = [group.block_size for group in self.groups]
        self._max_held = [
            None
            if group.window is None
            else min(group.num_blocks, -(-(group.window + max_step_tokens) // group.block_size) + 2)
            for group in self.groups
        ]

    @property
    def num_positions(self) -> int | None:
        """Longest sequence that a row alone can have here; None: any (all groups are windows)."""
        bounds = [
            group.num_blocks * group.block_size
            for group in self.groups
            if group.window is None or group.num_blocks < -(-group.window // group.block_size) + 2
        ]
        return min(bounds, default=None)

    @property
    def num_blocks(self) -> int:
        """Blocks of the first group that bounds the context (of the first group, where none does)."""
        return self._main.num_blocks

    @property
    def num_free(self) -> int:
        """Free blocks of the group that `num_blocks` counts."""
        return self._main.num_free

    @property
    def _main(self) -> BlockPool:
        for group, pool in zip(self.groups, self.pools, strict=True):
            if group.window is None:
                return pool
        return self.pools[0]

    def num_missing(self, tables: Tables, target: int) -> list[int]:
        """Blocks, by group, that `tables` lack for positions below `target` (a window bounds them)."""
        missing = []
        for g, size in enumerate(self._sizes):
            entries = -(-target // size)
            bound = self._max_held[g]
            if bound is not None:
                entries = min(entries, tables.num_dropped[g] + bound)
            missing.append(max(0, entries - len(tables.blocks[g])))
        return missing

    def has_free(self, counts: Sequence[int], spare: int = 0) -> bool:
        """Whether `counts` blocks, by group, can be taken so that `spare` stay free in each group."""
        return all(
            count == 0 or pool.num_free >= count + spare
            for count, pool in zip(counts, self.pools, strict=True)
        )

    def grow(self, tables: Tables, target: int) -> bool:
        """Give `tables` the blocks for positions below `target`, or as many as are free; whether any."""
        has_grown = False
        for g, missing in enumerate(self.num_missing(tables, target)):
            count = min(missing, self.pools[g].num_free)
            if count:
                tables.blocks[g].extend(self.pools[g].allocate(count))
                has_grown = True
        if has_grown:
            tables.capacity = min(
                len(blocks) * size for blocks, size in zip(tables.blocks, self._sizes, strict=True)
            )
        return has_grown

    def drop_unseen(self, tables: Tables, position: int) -> bool:
        """Give back blocks of windowed groups that no query from `position` on can see. Whether any was.

        ```
        a query at p sees keys [p - window + 1, p]; the next query is at `position`:
        entries below floor((position - window + 1) / 16) are unseen
        ```
        """
        has_dropped = False
        for g, group in enumerate(self.groups):
            if group.window is None:
                continue
            num_unseen = min((position - group.window + 1) // group.block_size, len(tables.blocks[g]))
            for entry in range(tables.num_dropped[g], num_unseen):
                self.pools[g].release((tables.blocks[g][entry],))
                tables.blocks[g][entry] = -1
                has_dropped = True
            tables.num_dropped[g] = max(tables.num_dropped[g], num_unseen)
        return has_dropped

    def release(self, held: Sequence[Sequence[int]]) -> None:
        """Give back blocks, by group. Raises `BlockError` where nobody holds one."""
        for pool, blocks in zip(self.pools, held, strict=True):
            pool.release(blocks)
