"""What reports said of ids, to be settled when no plan waits: rows' ids, digests of full blocks, service.

Knows the slots and the prefix cache, no plans and no requests.
"""

from typing import NamedTuple

import numpy as np

from pagebus.scheduler.blocks import Ints
from pagebus.scheduler.prefix import extend_digests
from pagebus.scheduler.requests import Row
from pagebus.scheduler.slots import Slots, SlotTable


class _Made(NamedTuple):
    """Ids that a step made: `ids[i]` stands at position `positions[i]` of the row in `slots[i]`."""

    slots: Slots
    positions: Ints
    ids: Ints
    now_s: float


class Journal:
    """Between two settlements a step costs one entry here, however many rows it had."""

    def __init__(self, slots: SlotTable, *, is_caching: bool) -> None:
        self._slots = slots
        self._is_caching = is_caching
        self._made: list[_Made] = []
        self._prefilled: dict[int, Row] = {}
        self._service: dict[int, int] = {}

    @property
    def has_entries(self) -> bool:
        """Whether there is anything to settle or to be paid for."""
        return bool(self._made or self._prefilled or self._service)

    def note_ids(self, slots: Slots, positions: Ints, ids: Ints, now_s: float) -> None:
        """A step made `ids`, which stand at `positions` of the rows in `slots`."""
        self._made.append(_Made(slots, positions, ids, now_s))

    def note_prefill(self, rows: dict[int, Row]) -> None:
        """These rows, by handle, had prompt blocks computed, perhaps."""
        self._prefilled.update(rows)

    def settle(self) -> None:
        """Bring the rows' ids up to the last full block, and make full blocks findable."""
        slots, size = self._slots, self._slots.kv.sizes[0]
        for made in self._made:
            offsets = made.positions % size
            slots.tail[made.slots, offsets] = made.ids
            slots.num_known[made.slots] = made.positions + 1
            slots.made_s[made.slots] = made.now_s
            self._note_service(slots.tenant[made.slots])
            for slot in made.slots[offsets == size - 1].tolist():
                self.complete_ids(slot)
            if self._is_caching:
                for slot in made.slots[offsets == 0].tolist():
                    self._register(slot)
        self._made = []
        if self._is_caching:
            for row in self._prefilled.values():
                if row.slot >= 0:
                    self._register(row.slot)
        self._prefilled = {}

    def take_service(self) -> dict[int, int]:
        """How many ids were made since the last time, by the tenants' numbers."""
        service, self._service = self._service, {}
        return service

    def complete_ids(self, slot: int) -> None:
        """Bring a row's `ids` up to what is settled; `tail` holds the rest, which is less than a block."""
        row = self._slots.rows[slot]
        if row is None:
            return
        size = self._slots.kv.sizes[0]
        while (num := len(row.ids)) < (known := int(self._slots.num_known[slot])):
            end = min(known, num - num % size + size)
            row.ids.extend(self._slots.tail[slot, num % size : (end - 1) % size + 1].tolist())

    def _note_service(self, tenants: Ints) -> None:
        lowest, highest = int(tenants.min()), int(tenants.max())
        if lowest == highest:
            self._service[lowest] = self._service.get(lowest, 0) + len(tenants)
            return
        for number, num_ids in enumerate(np.bincount(tenants).tolist()):
            if num_ids:
                self._service[number] = self._service.get(number, 0) + num_ids

    def _register(self, slot: int) -> None:
        """Make a row's full blocks findable, as far as they are computed."""
        row, slots, size = self._slots.rows[slot], self._slots, self._slots.kv.sizes[0]
        if row is None:
            return
        num_full = min(int(slots.position[slot]), len(row.ids)) // size
        first = int(slots.num_registered[slot])
        if num_full <= first:
            return
        extend_digests(row.digests, row.request.root, row.ids, size)
        slots.num_registered[slot] = num_full
        for g, pool in enumerate(slots.kv.pools):
            begin = max(first, int(slots.num_dropped[g, slot]))
            blocks = slots.tables[g][slot, begin:num_full].tolist()
            for block, digest in zip(blocks, row.digests[begin:num_full], strict=True):
                pool.register(block, digest)
