"""A model whose next id is a hash of the whole sequence, read back through the row's block tables.

A stale block, a lost token or a wrong row changes all that follows. `fake_sequence` computes the same ids
without pages, tables or steps, so that tests know what to expect. Knows no torch.
"""

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pagebus.bus.messages import PoolGroup, Sampling
from pagebus.executor.batch import BlockCopy, RowInput, RowOutput, Runner
from pagebus.executor.pulse import Pulse
from pagebus.settings.structs import ExecutorSettings

BLOCK_SIZE = 16
_MASK = (1 << 64) - 1
# Odd: multiplication by its powers is one-to-one modulo 2**64, so any one changed id changes the digest.
_BASE = 0x9E3779B97F4A7C15

_Words = npt.NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True)
class FakeModel:
    """What the ids depend on, apart from the sequence. `windows`: one a KV group, None for full attention."""

    vocab_size: int = 512
    end_id: int = 2  # made with `end_probability`, and never otherwise
    end_probability: float = 0.0
    windows: tuple[int | None, ...] = (None,)

    def next_id(
        self, digests: Iterable[int], sampling: Sampling, choice: int, index: int, history: int = 0
    ) -> int:
        """The id that follows a sequence with these digests, one a KV group. `history` is the digest of what
        penalties look at; it matters where there are any."""
        state = _mix(history) if has_penalties(sampling) else 0
        for digest in digests:
            state = _mix(state ^ digest)
        if sampling.temperature > 0:
            for part in (sampling.seed, choice, index):
                state = _mix(state ^ (part & _MASK))
        if self.end_probability > 0 and _mix(state ^ _BASE) / 2**64 < self.end_probability:
            return self.end_id
        made = state % (self.vocab_size - 1)
        return made + (made >= self.end_id)


def has_penalties(sampling: Sampling) -> bool:
    """Whether the ids so far matter to the fake model beyond what its pages hold."""
    return bool(sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1.0)


def _mix(word: int) -> int:
    """A bijection of 64-bit words: every input bit matters to every output bit (the end of splitmix64)."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
    return word ^ (word >> 31)


DEFAULT_MODEL = FakeModel()
GREEDY = Sampling(temperature=0.0)


def fake_sequence(
    prompt: Sequence[int],
    num_ids: int,
    *,
    model: FakeModel = DEFAULT_MODEL,
    sampling: Sampling = GREEDY,
    choice: int = 0,
    received: Sequence[int] = (),
    stop_token_ids: Iterable[int] = (),
    min_tokens: int = 0,
) -> list[int]:
    """The `num_ids` ids made after `prompt` and `received` ones; fewer where a stop id (kept) ends them."""
    stops = frozenset(stop_token_ids)
    ids = [*prompt, *received]
    powers = [1]
    for _ in range(len(ids) + num_ids):
        powers.append(powers[-1] * _BASE & _MASK)
    terms = [(token + 1) * power & _MASK for token, power in zip(ids, powers, strict=False)]
    digests = [sum(terms if w is None else terms[-w:]) & _MASK for w in model.windows]
    history = sum(terms) & _MASK
    made: list[int] = []
    while len(made) < num_ids:
        index = len(received) + len(made)
        made.append(model.next_id(digests, sampling, choice, index, history))
        if made[-1] in stops and index + 1 >= min_tokens:
            break
        terms.append((made[-1] + 1) * powers[len(terms)] & _MASK)
        history = (history + terms[-1]) & _MASK
        for group, window in enumerate(model.windows):
            gone = terms[-window - 1] if window is not None and len(terms) > window else 0
            digests[group] = (digests[group] + terms[-1] - gone) & _MASK
    return made


class FakeRunner:
    """A `Runner` over integer pages: `pages[g][block, slot]` holds a position's id + 1 (0: never written)."""

    def __init__(
        self,
        model: FakeModel = DEFAULT_MODEL,
        *,
        num_blocks: int = 16384,
        max_model_len: int = 32768,
        step_time_s: float = 0.0,
    ) -> None:
        self.model = model
        self.step_time_s = step_time_s
        self.num_steps = 0
        self.pulse = Pulse()
        self._max_model_len = max_model_len
        self._pool = tuple(
            PoolGroup(num_blocks=num_blocks, block_size=BLOCK_SIZE, window=w) for w in self.model.windows
        )
        self.pages: list[_Words] = [np.zeros((num_blocks, BLOCK_SIZE), np.uint64) for _ in self._pool]
        powers = np.full(max_model_len + BLOCK_SIZE, _BASE, np.uint64)
        powers[0] = 1
        self._powers: _Words = np.cumprod(powers, dtype=np.uint64)  # wraps modulo 2**64

    @property
    def pool(self) -> tuple[PoolGroup, ...]:
        """The KV groups: one a window."""
        return self._pool

    @property
    def max_model_len(self) -> int:
        """As configured."""
        return self._max_model_len

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Copy whole blocks, in order."""
        for group, source, target in copies:
            self.pages[group][target] = self.pages[group][source]

    def step(self, rows: Sequence[RowInput]) -> list[RowOutput]:
        """Write all rows' ids into the pages, then read every sampled row's sequence back and hash it."""
        if self.step_time_s > 0:
            time.sleep(self.step_time_s)
        self.num_steps += 1
        outputs = [RowOutput(error=self._flaw_of(row)) for row in rows]
        for row, output in zip(rows, outputs, strict=True):
            if output.error is None:
                self._write(row)
        for row, output in zip(rows, outputs, strict=True):
            if output.error is None and row.is_sampled:
                digests = [self._digest(row, group) for group in range(len(self._pool))]
                output.id = self.model.next_id(
                    digests, row.sampling, row.choice, row.index, self._history_of(row)
                )
        return outputs

    def _flaw_of(self, row: RowInput) -> str | None:
        end = row.start + len(row.ids)
        if end > self._max_model_len:
            return f"position {end - 1} is beyond the model's {self._max_model_len}"
        for table, group in zip(row.tables, self._pool, strict=True):
            first = 0 if group.window is None else max(0, min(row.start, end - group.window)) // BLOCK_SIZE
            needed = table[first : (end - 1) // BLOCK_SIZE + 1]
            if len(table) * BLOCK_SIZE < end or min(needed) < 0:
                return f"the block table has no slot for a position of [{row.start}, {end})"
        return None

    def _write(self, row: RowInput) -> None:
        if len(row.ids) == 1:
            entry, slot = divmod(row.start, BLOCK_SIZE)
            for pages, table in zip(self.pages, row.tables, strict=True):
                pages[table[entry], slot] = row.ids[0] + 1
            return
        positions = np.arange(row.start, row.start + len(row.ids))
        ids = np.asarray(row.ids, np.uint64) + np.uint64(1)
        for pages, table in zip(self.pages, row.tables, strict=True):
            blocks = np.asarray(table)[positions // BLOCK_SIZE]
            pages[blocks, positions % BLOCK_SIZE] = ids

    def _history_of(self, row: RowInput) -> int:
        if not has_penalties(row.sampling):
            return 0
        words = np.asarray(row.history).astype(np.uint64) + np.uint64(1)
        return int(np.dot(words, self._powers[: len(words)]))

    def _digest(self, row: RowInput, group: int) -> int:
        window = self._pool[group].window
        end = row.start + len(row.ids)
        begin = 0 if window is None else max(0, end - window)
        first = begin // BLOCK_SIZE
        blocks = np.asarray(row.tables[group])[first : (end - 1) // BLOCK_SIZE + 1]
        words = self.pages[group][blocks].reshape(-1)[begin - first * BLOCK_SIZE : end - first * BLOCK_SIZE]
        return int(np.dot(words, self._powers[begin:end]))


def build_fake_runner(settings: ExecutorSettings) -> Runner:
    """The fake model as `--fake` serves it; with faults and a device where the environment says so."""
    from pagebus.executor.fake_device import on_device  # which build on this module
    from pagebus.executor.fake_faults import faulty_runner

    max_model_len = settings.max_model_len or 32768
    model = faulty_runner(max_model_len, os.environ) or FakeRunner(max_model_len=max_model_len)
    return on_device(model, os.environ)
