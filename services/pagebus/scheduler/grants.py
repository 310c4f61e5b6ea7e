"""Table entries that rows were given and that no plan has carried yet."""

import numpy as np
import numpy.typing as npt

from pagebus.scheduler.blocks import Ints

Heads = npt.NDArray[np.uint32]


class GrantLog:
    """Grants in their order; the columns of a head are those of `Plan.grants`."""

    def __init__(self) -> None:
        self._heads: list[Heads] = []
        self._blocks: list[Ints] = []

    def add(self, handle: int, group: int, first: int, blocks: Ints) -> None:
        """`blocks` became a row's table entries from `first` on."""
        if len(blocks):
            self._heads.append(np.array([[handle, group, first, len(blocks)]], np.uint32))
            self._blocks.append(blocks)

    def add_all(self, handles: Heads, group: int, first: Ints, counts: Ints, blocks: Ints) -> None:
        """The same for many rows: `counts[i]` of the `blocks`, one after the other, are row i's."""
        heads = np.empty((len(handles), 4), np.uint32)
        heads[:, 0] = handles
        heads[:, 1] = group
        heads[:, 2] = first
        heads[:, 3] = counts
        self._heads.append(heads if counts.all() else heads[counts > 0])
        self._blocks.append(blocks)

    def take(self) -> tuple[bytes, bytes]:
        """`Plan.grants` and `Plan.granted`; the log is empty then."""
        if not self._heads:
            return b"", b""
        heads = self._heads[0] if len(self._heads) == 1 else np.concatenate(self._heads)
        blocks = self._blocks[0] if len(self._blocks) == 1 else np.concatenate(self._blocks)
        self._heads.clear()
        self._blocks.clear()
        return heads.astype("<u4", copy=False).tobytes(), blocks.astype("<i4", copy=False).tobytes()
