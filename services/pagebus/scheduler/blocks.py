"""Who holds which KV block of one executor, and which blocks can be found again by their content.

A block is free, used (it has references), or cached (it has none, and its digest is known). Knows no rows,
plans or messages beyond the shape of a KV group.
"""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pagebus.bus.messages import PoolGroup

Ints = npt.NDArray[np.int32]


class BlockError(RuntimeError):
    """A block was taken that is not free, or given back that nobody holds: a bug, never a load condition."""


class BlockPool:
    """The blocks of one KV group: reference counts, free blocks, and cached ones by their last use."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._counts = np.zeros(num_blocks, np.int32)
        self._free = list(range(num_blocks - 1, -1, -1))  # taken from the end: low ids first
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._digests: dict[int, bytes] = {}  # of used and cached blocks
        self._blocks: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks without a reference that can be found by their digest."""
        return len(self._cached)

    def allocate(self, num: int) -> Ints:
        """Take `num` blocks, each with one reference. Raises `BlockError` when fewer are there."""
        if num > self.num_free:
            raise BlockError(f"{num} blocks asked for, {self.num_free} of {self.num_blocks} can be had")
        if num == 0:
            return np.zeros(0, np.int32)
        self.keep_free(num)
        taken = np.array(self._free[-num:][::-1], np.int32)
        del self._free[-num:]
        self._counts[taken] = 1
        return taken

    def keep_free(self, num: int) -> None:
        """Forget cached blocks, least recently used first, until `num` are free or none is left."""
        while len(self._free) < num and self._cached:
            block, _ = self._cached.popitem(last=False)
            del self._blocks[self._digests.pop(block)]
            self._free.append(block)

    def share(self, blocks: Sequence[int] | Ints) -> None:
        """Add a reference to used or cached blocks, which must differ. Raises `BlockError` for a free one."""
        for block in map(int, blocks):
            if self.count(block) == 0:
                if block not in self._cached:
                    raise BlockError(f"block {block} is free and cannot be shared")
                del self._cached[block]
            self._counts[block] += 1

    def release(self, blocks: Sequence[int] | Ints) -> None:
        """Give up one reference to each of `blocks`, which must differ: the first one is forgotten first.

        Raises `BlockError`, changing nothing, where nobody holds one.
        """
        given = np.asarray(blocks, np.int32)
        counts = self._counts[given]
        if (counts <= 0).any():
            raise BlockError(f"blocks {given[counts <= 0].tolist()} were given back twice")
        self._counts[given] = counts - 1
        for block in given[counts == 1].tolist():
            if block in self._digests:
                self._cached[block] = None
            else:
                self._free.append(block)

    def count(self, block: int) -> int:
        """References to `block`. Raises `BlockError` for an id outside the pool."""
        if not 0 <= block < self.num_blocks:
            raise BlockError(f"block {block} of a pool of {self.num_blocks}")
        return int(self._counts[block])

    def register(self, block: int, digest: bytes) -> None:
        """A used block is full, and its KV is that of `digest`. Nothing, if another is known for it."""
        if digest not in self._blocks and block not in self._digests:
            self._digests[block] = digest
            self._blocks[digest] = block

    def find(self, digest: bytes) -> int:
        """The block with this content, or -1."""
        return self._blocks.get(digest, -1)

    def is_cached(self, block: int) -> bool:
        """Whether `block` has no reference and can be found."""
        return block in self._cached

    def clear_cache(self) -> None:
        """Forget the contents of all blocks."""
        self._free.extend(self._cached)
        self._cached.clear()
        self._digests.clear()
        self._blocks.clear()


class KvPool:
    """All KV groups of one executor."""

    def __init__(self, groups: Sequence[PoolGroup], max_step_tokens: int) -> None:
        """`max_step_tokens`: longest chunk of a step; with the window it bounds what a row holds at once."""
        self.groups = tuple(groups)
        self.max_step_tokens = max_step_tokens
        self.pools = [BlockPool(group.num_blocks) for group in self.groups]
        self.sizes = [group.block_size for group in self.groups]
        self.windows = [group.window for group in self.groups]
        self.max_held = [
            None
            if group.window is None
            else min(group.num_blocks, -(-(group.window + max_step_tokens) // group.block_size) + 2)
            for group in self.groups
        ]
        """Blocks of a group that a row holds at most."""

    @property
    def has_windows(self) -> bool:
        """Whether any group is a sliding window."""
        return any(window is not None for window in self.windows)

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
    def main(self) -> BlockPool:
        """The group that bounds the context (the first one, where none does): what figures count."""
        for group, pool in zip(self.groups, self.pools, strict=True):
            if group.window is None:
                return pool
        return self.pools[0]

    def num_entries(self, group: int, target: int, num_dropped: int) -> int:
        """Table entries that positions below `target` need, `num_dropped` of which went back already."""
        entries = -(-target // self.sizes[group])
        bound = self.max_held[group]
        return entries if bound is None else min(entries, num_dropped + bound)

    def first_seen(self, group: int, position: int) -> int:
        """The first table entry that queries from `position` on can see.

        ```
        a query at p sees keys [p - window + 1, p]
        ```
        """
        window = self.windows[group]
        return 0 if window is None else max(0, position - window + 1) // self.sizes[group]
