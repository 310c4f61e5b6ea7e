"""The rows of one executor as flat arrays, so that a step costs a few array operations and no work a row.

A row that has a handle has a slot. Knows neither plans nor policy.
"""

import heapq
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pagebus.scheduler.blocks import Ints, KvPool
from pagebus.scheduler.grants import GrantLog
from pagebus.scheduler.requests import Row

Handles = npt.NDArray[np.uint32]
Slots = npt.NDArray[np.intp]


class Found(NamedTuple):
    """Slots of handles, in their order; -1 for those that are not in use, unless it `is_whole`."""

    slots: Slots
    is_whole: bool


class SlotTable:
    """One entry a slot in each array; `[:top]` covers every slot in use.

    ```
    ids        | prompt, received | made ... |
    num_ids    what the prefill covers        num_known   ids that are known here, `tail` holds the last ones
    position   KV computed, as reported       target      ... when the newest plan is done
    capacity   positions with a block in every group
    end        positions that the row ever needs; 0 where it is not planned any more
    ```
    """

    def __init__(self, kv: KvPool, num_slots: int, max_len: int) -> None:
        self.kv = kv
        self.num_slots = num_slots
        self.top = 0
        self.rows: list[Row | None] = [None] * num_slots
        self.handle = np.zeros(num_slots, np.uint32)
        self.position = np.zeros(num_slots, np.int32)
        self.num_ids = np.zeros(num_slots, np.int32)
        self.num_known = np.zeros(num_slots, np.int32)
        self.target = np.zeros(num_slots, np.int32)
        self.capacity = np.zeros(num_slots, np.int32)
        self.end = np.zeros(num_slots, np.int32)
        self.num_registered = np.zeros(num_slots, np.int32)  # blocks that the prefix cache knows
        self.tenant = np.zeros(num_slots, np.int32)
        self.made_s = np.zeros(num_slots, np.float64)
        self.tail = np.zeros((num_slots, kv.sizes[0]), np.int32)  # id p stands at p % block size
        # Untouched memory costs nothing: pages of zeros are not there before they are written.
        self.tables = [np.zeros((num_slots, -(-max_len // size) + 1), np.int32) for size in kv.sizes]
        self.num_entries = np.zeros((len(kv.sizes), num_slots), np.int32)
        self.num_dropped = np.zeros((len(kv.sizes), num_slots), np.int32)
        self.grants = GrantLog()
        self._free = list(range(num_slots))
        bits = max(10, (4 * num_slots).bit_length())
        self._mask = (1 << bits) - 1
        self._slot_of = np.full(1 << bits, -1, np.int32)
        self._handle_bytes = b""  # those of the last lookup, and what it found
        self._found = Found(np.zeros(0, np.intp), is_whole=True)

    @property
    def has_free(self) -> bool:
        """Whether a row can have a slot."""
        return bool(self._free)

    def take(self, row: Row, handles: Iterator[int]) -> None:
        """Give a row a slot and one of the `handles`, which were never used before."""
        slot = heapq.heappop(self._free)
        handle = next(number for number in handles if self._slot_of[number & self._mask] < 0)
        self._slot_of[handle & self._mask] = slot
        self._handle_bytes = b""
        row.handle, row.slot = handle, slot
        self.rows[slot] = row
        self.handle[slot] = handle
        self.num_ids[slot] = self.num_known[slot] = len(row.ids)
        self.position[slot] = self.target[slot] = 0
        self.capacity[slot] = self.end[slot] = self.num_registered[slot] = 0
        self.num_entries[:, slot] = self.num_dropped[:, slot] = 0
        tail = row.ids[len(row.ids) // self.tail.shape[1] * self.tail.shape[1] :]
        self.tail[slot, : len(tail)] = tail
        self.top = max(self.top, slot + 1)

    def stop(self, slot: int) -> None:
        """The row is not planned any more; what is reported of it is still noted."""
        self.end[slot] = self.num_ids[slot] = 0
        self.target[slot] = self.capacity[slot] = 0

    def give_back(self, slot: int) -> None:
        """The slot is free; its blocks must have been released."""
        self.stop(slot)
        self.rows[slot] = None
        self.position[slot] = 0
        self._slot_of[int(self.handle[slot]) & self._mask] = -1
        self._handle_bytes = b""
        heapq.heappush(self._free, slot)
        while self.top and self.rows[self.top - 1] is None:
            self.top -= 1

    def slot_of(self, handle: int) -> int | None:
        """The slot of a handle that is in use."""
        slot = int(self._slot_of[handle & self._mask])
        return slot if slot >= 0 and int(self.handle[slot]) == handle else None

    def find(self, handles: bytes) -> Found:
        """The slots of packed handles. What was asked last is found at once."""
        if handles == self._handle_bytes:
            return self._found
        wanted = np.frombuffer(handles, "<u4")
        slots = self._slot_of[wanted & self._mask]
        slots[self.handle[slots] != wanted] = -1
        self._handle_bytes = handles
        self._found = Found(slots.astype(np.intp), is_whole=bool((slots >= 0).all()))
        return self._found

    def held(self, slot: int) -> list[Ints]:
        """The blocks that a slot holds, by group."""
        return [
            table[slot, self.num_dropped[g, slot] : self.num_entries[g, slot]].copy()
            for g, table in enumerate(self.tables)
        ]

    def put(self, slot: int, group: int, first: int, blocks: Ints) -> None:
        """Blocks become the slot's table entries from `first` on, after what is there."""
        self.tables[group][slot, first : first + len(blocks)] = blocks
        self.num_entries[group, slot] = first + len(blocks)
        self.grants.add(int(self.handle[slot]), group, first, blocks)

    def grow(self, slot: int, target: int) -> None:
        """Give a row blocks for positions below `target`, or as many as can be had."""
        for g, pool in enumerate(self.kv.pools):
            have = int(self.num_entries[g, slot])
            wanted = self.kv.num_entries(g, target, int(self.num_dropped[g, slot])) - have
            count = min(wanted, pool.num_free)
            if count > 0:
                self.put(slot, g, have, pool.allocate(count))
        self.fit_capacity(slot)

    def grow_all(self, short: Slots, wanted: Ints) -> bool:
        """Give the slots blocks for positions below `wanted[i]`; nothing unless all can have them."""
        parts = []
        for g, (pool, size, bound) in enumerate(
            zip(self.kv.pools, self.kv.sizes, self.kv.max_held, strict=True)
        ):
            have = self.num_entries[g, short]
            entries = -(-wanted // size)
            if bound is not None:
                entries = np.minimum(entries, self.num_dropped[g, short] + bound)
            missing = np.maximum(entries - have, 0)
            total = int(missing.sum())
            if total > pool.num_free:
                return False
            parts.append((have, missing, total))
        for g, (have, missing, total) in enumerate(parts):
            if total == 0:
                continue
            blocks = self.kv.pools[g].allocate(total)
            if total == len(short) and missing.min() == 1:
                self.tables[g][short, have] = blocks
            else:
                of_row = np.repeat(np.arange(len(short)), missing)
                offset = np.arange(total) - np.repeat(np.cumsum(missing) - missing, missing)
                self.tables[g][short[of_row], have[of_row] + offset] = blocks
            self.num_entries[g, short] = have + missing
            self.grants.add_all(self.handle[short], g, have, missing, blocks)
        self.fit_capacity(short)
        return True

    def drop_unseen(self) -> bool:
        """Give back blocks of windowed groups that no query from the positions on can see. Whether any."""
        has_dropped = False
        for g, window in enumerate(self.kv.windows):
            if window is None:
                continue
            unseen = (self.position[: self.top] - window + 1) // self.kv.sizes[g]
            unseen = np.minimum(unseen, self.num_entries[g, : self.top])
            is_planned = self.end[: self.top] > 0
            for slot in ((unseen > self.num_dropped[g, : self.top]) & is_planned).nonzero()[0].tolist():
                first, last = int(self.num_dropped[g, slot]), int(unseen[slot])
                self.kv.pools[g].release(self.tables[g][slot, first:last])
                self.num_dropped[g, slot] = last
                has_dropped = True
        return has_dropped

    def fit_capacity(self, slots: int | Slots) -> None:
        """Note how many positions the tables cover now."""
        covered = [self.num_entries[g, slots] * size for g, size in enumerate(self.kv.sizes)]
        self.capacity[slots] = covered[0] if len(covered) == 1 else np.minimum.reduce(covered)
