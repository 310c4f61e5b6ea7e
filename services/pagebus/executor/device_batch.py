"""Which slot of the device's state a row has, and what of it must be uploaded before a step.

The host keeps, for every slot, what the device holds once everything launched is done. A row whose input says
the same costs nothing; what differs is uploaded, a word at a time. Knows no tensors and no model.

```
launch N     row 7: position 40, index 3 ─▶ the device moves on to 41 and 4 by itself, and so does its mirror
launch N+1   row 7: start 41, index 4, follows: nothing to upload; start 12: a new row of that key, all of it
```
"""

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pagebus.bus.messages import Sampling
from pagebus.executor.batch import RowInput
from pagebus.kernels import triton_steps as steps
from pagebus.kernels.kv_write import BLOCK_SIZE
from pagebus.kernels.triton_sampling import noise_prefix
from pagebus.kernels.triton_steps import Layout

Words = npt.NDArray[np.int64]

_LEAST_TEMPERATURE, _MOST_TEMPERATURE = 1e-30, 1e30
_NO_KEY = -(1 << 62)
_IN_FLIGHT = 2  # launches, the one being made included, whose rows keep their slots


@dataclass(slots=True)
class _Held:
    """What the device holds of a row."""

    slot: int
    launch: int  # the last one with the row
    position: int = -1
    index: int = -1
    tables: Sequence[Sequence[int]] = ()
    sampling: Sampling | None = None
    choice: int = -1
    keeps: bool = False


class Changes:
    """Words of the state to be written, no address twice."""

    def __init__(self) -> None:
        self._addresses: list[Words] = []
        self._values: list[Words] = []
        self._few: dict[int, int] = {}

    def word(self, address: int, value: int) -> None:
        """One word; the last value counts."""
        self._few[address] = value

    def words(self, addresses: Words, values: Words) -> None:
        """Many, none of which is written otherwise."""
        self._addresses.append(addresses)
        self._values.append(values)

    def __len__(self) -> int:
        return len(self._few) + sum(map(len, self._addresses))

    def packed(self) -> tuple[Words, Words]:
        """Addresses and values."""
        addresses = np.fromiter(self._few.keys(), np.int64, len(self._few))
        values = np.fromiter(self._few.values(), np.int64, len(self._few))
        return np.concatenate([addresses, *self._addresses]), np.concatenate([values, *self._values])


class Parts:
    """Arrays of words that travel to the device in one copy."""

    def __init__(self) -> None:
        self._arrays: list[Words] = []
        self._size = 0

    def add(self, values: npt.ArrayLike) -> slice:
        """Where the words will lie in the copy."""
        array = np.asarray(values, np.int64)
        self._arrays.append(array)
        self._size += len(array)
        return slice(self._size - len(array), self._size)

    def add_floats(self, values: npt.ArrayLike) -> slice:
        """The same with numbers' bits; on the device a view as float64 gives the numbers."""
        return self.add(np.asarray(values, np.float64).view(np.int64))

    def joined(self) -> Words:
        """The one array."""
        return np.concatenate(self._arrays) if self._arrays else np.zeros(0, np.int64)


class DeviceBatch:
    """The mirror of the device's state."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._held: dict[int, _Held] = {}
        self._free = list(range(layout.num_slots - 1, -1, -1))
        self._num_launches = 0
        self._keys: list[int] = []  # of the last launch's rows
        self._numbered: list[int] = []  # the same by their number in the step, those that failed included
        self._num_nameless = 0
        self._tables = np.full((layout.num_groups, layout.num_slots, layout.width), -1, np.int64)
        self._order = np.full(layout.num_rows, layout.num_slots, np.int64)  # of the newest decoding step

    @property
    def padding(self) -> int:
        """The slot of rows that are none."""
        return self._layout.num_slots

    def forget(self) -> None:
        """The device may hold anything: upload all of it again."""
        for held in self._held.values():
            self._free.append(held.slot)
        self._held.clear()
        self._keys, self._numbered = [], []
        self._tables.fill(-1)
        self._order.fill(-1)

    def is_known(self, row: RowInput) -> bool:
        """Whether the device holds exactly what the row's input says, and has room for its one token.

        Such a row was checked when it came; only its position is new.
        """
        held = self._held.get(row.key)
        if held is None or row.follows is None or held.launch != self._num_launches:
            return False
        if held.position != row.start or held.index != row.index or held.sampling is not row.sampling:
            return False
        if held.choice != row.choice or held.keeps != keeps_logits(row):
            return False
        at = row.start // BLOCK_SIZE
        for table, known in zip(row.tables, held.tables, strict=True):
            if table is not known or at >= len(table) or table[at] < 0:
                return False
        return True

    def can_follow(self, row: RowInput) -> bool:
        """Whether the id that the row follows was launched, and is the row's next one."""
        if row.follows is None or not 0 <= row.follows < len(self._numbered):
            return False
        held = self._held.get(self._numbered[row.follows] if row.key < 0 else row.key)
        if held is None or held.launch != self._num_launches:
            return False
        return held.position == row.start and held.index == row.index

    def place(
        self, rows: Sequence[RowInput], numbers: Sequence[int], num_all: int, changes: Changes
    ) -> list[int]:
        """The rows' slots in this launch; what the device does not know of them is added to `changes`.

        `numbers` are the rows' numbers among all `num_all` that were to be launched: by these they are
        followed. Raises `ValueError` where the rows are no step.
        """
        keys = [self._key(row) for row in rows]
        self._num_launches += 1
        if len(set(keys)) != len(keys):
            raise ValueError("a row stands twice in a step")
        if len(rows) > self._layout.num_slots // _IN_FLIGHT:
            raise ValueError(f"{len(rows)} rows in a step, where {self._layout.num_slots // _IN_FLIGHT} fit")
        for key in keys:
            if key in self._held:
                self._held[key].launch = self._num_launches
        slots = []
        for key, row in zip(keys, rows, strict=True):
            held = self._held.get(key) or self._take_slot(key)
            self._tell(held, row, changes)
            slots.append(held.slot)
        self._keys = keys
        self._numbered = [_NO_KEY] * num_all
        for number, key in zip(numbers, keys, strict=True):
            self._numbered[number] = key
        return slots

    def arrange(self, slots: Sequence[int], num_padded: int, changes: Changes) -> None:
        """The order of a decoding step, `num_padded` rows with its padding."""
        wanted = np.full(num_padded, self.padding, np.int64)
        wanted[: len(slots)] = slots
        differ = np.flatnonzero(wanted != self._order[:num_padded])
        if len(differ):
            changes.words(differ + self._layout.order, wanted[differ])
            self._order[:num_padded] = wanted

    def advance(self, rows: Sequence[RowInput]) -> None:
        """The launch with these rows, the last one placed, was made."""
        for key, row in zip(self._keys, rows, strict=True):
            held = self._held[key]
            held.position += len(row.ids)
            held.index += row.is_sampled

    def _key(self, row: RowInput) -> int:
        """The row's, or one made up: of a row that follows another the same again."""
        if row.follows is not None:
            followed = self._numbered[row.follows]
            if row.key >= 0 and followed != row.key:
                raise ValueError(f"row {row.key} follows row {followed}")
            return followed
        if row.key >= 0:
            return row.key
        self._num_nameless += 1
        return -self._num_nameless

    def _take_slot(self, key: int) -> _Held:
        if not self._free:
            oldest = min(self._held, key=lambda key: self._held[key].launch)
            if self._held[oldest].launch == self._num_launches:
                raise RuntimeError("every slot is in use")
            self._free.append(self._held.pop(oldest).slot)
        held = _Held(self._free.pop(), self._num_launches)
        self._held[key] = held
        return held

    def _tell(self, held: _Held, row: RowInput, changes: Changes) -> None:
        """Whatever differs."""
        base = held.slot * steps.FIELDS
        if held.position != row.start:
            changes.word(base + steps.POSITION, row.start)
            held.position = row.start
        if held.index != row.index:
            changes.word(base + steps.INDEX, row.index)
            held.index = row.index
        if row.follows is None and len(row.ids) == 1:
            changes.word(base + steps.LAST_ID, row.ids[0])
        if held.choice != row.choice or (held.sampling is not row.sampling and held.sampling != row.sampling):
            for field, value in sampling_words(row.sampling, row.choice).items():
                changes.word(base + field, value)
        held.sampling, held.choice = row.sampling, row.choice
        keeps = keeps_logits(row)
        if held.keeps != keeps or not held.tables:
            changes.word(base + steps.KEEPS, keeps)
            held.keeps = keeps
        known = held.tables or [()] * len(row.tables)
        for group, (table, before) in enumerate(zip(row.tables, known, strict=True)):
            if table is not before:
                self._tell_table(group, held.slot, table, changes)
        held.tables = list(row.tables)

    def _tell_table(self, group: int, slot: int, table: Sequence[int], changes: Changes) -> None:
        wanted = np.frombuffer(table, np.int32) if isinstance(table, array) else np.asarray(table, np.int64)
        wanted = wanted[: self._layout.width]
        mirror = self._tables[group, slot, : len(wanted)]
        differ = np.flatnonzero(mirror != wanted)
        if len(differ):
            values = wanted[differ].astype(np.int64)
            changes.words(differ + self._layout.table(group, slot), values)
            mirror[differ] = values


def keeps_logits(row: RowInput) -> bool:
    """Whether the row's logits are needed after the step's own choice: changed ones, log-probabilities."""
    sampling = row.sampling
    return row.is_sampled and bool(
        row.banned_ids
        or sampling.num_logprobs is not None
        or sampling.logit_bias
        or sampling.allowed_token_ids
        or sampling.bad_words
        or sampling.presence_penalty
        or sampling.frequency_penalty
        or sampling.repetition_penalty != 1.0
    )


def sampling_words(sampling: Sampling, choice: int) -> dict[int, int]:
    """By field, the parameters that the kernels take. A temperature of 0 stays one: greedy."""
    temperature = sampling.temperature
    if temperature > 0:
        temperature = min(max(temperature, _LEAST_TEMPERATURE), _MOST_TEMPERATURE)
    least = math.log(min(sampling.min_p, 1.0)) if sampling.min_p > 0 else -math.inf
    return {
        steps.PREFIX: noise_prefix(sampling.seed, choice),
        steps.TOP_K: min(sampling.top_k, (1 << 31) - 1),
        steps.TEMPERATURE: _float32_bits(temperature),
        steps.LEAST: _float32_bits(least),
        steps.TOP_P: _float64_bits(sampling.top_p),
    }


def _float32_bits(value: float) -> int:
    return int(np.array(value, np.float32).view(np.int32))


def _float64_bits(value: float) -> int:
    return int(np.array(value, np.float64).view(np.int64))
