"""What changes a row's logits before an id is chosen, in vLLM's order. Knows no probabilities and no noise.

```
allowed_token_ids ─▶ bad_words ─▶ banned ids (min_tokens) ─▶ logit_bias
    ─▶ repetition penalty ─▶ frequency penalty ─▶ presence penalty
```

Bad words and the repetition penalty see the prompt and what was generated, as in transformers (vLLM matches
bad words against generated ids alone); the other two penalties see what was generated. Ids that the model
cannot make are passed over. Every kind is one operation for all rows that ask for it.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from pagebus.bus.messages import Sampling, pack_ids, unpack_ids
from pagebus.executor.batch import RowInput
from pagebus.executor.scan import Scan

_Ids = npt.NDArray[np.int64]
_ID_BYTES = 4


def flaw_of(sampling: Sampling) -> str | None:
    """Why no logits can be changed as `sampling` asks, or None."""
    if len(sampling.allowed_token_ids) % _ID_BYTES:
        return f"allowed_token_ids of {len(sampling.allowed_token_ids)} bytes"
    if any(not word or len(word) % _ID_BYTES for word in sampling.bad_words):
        return "a bad word that is no whole number of ids"
    return None


def is_changing(row: RowInput) -> bool:
    """Whether any processor applies to this row now."""
    sampling = row.sampling
    return bool(
        row.banned_ids
        or sampling.logit_bias
        or sampling.allowed_token_ids
        or sampling.bad_words
        or sampling.presence_penalty
        or sampling.frequency_penalty
        or sampling.repetition_penalty != 1.0
    )


def processed(scanned: Scan, rows: Sequence[RowInput]) -> torch.Tensor:
    """New float32 logits [rows, vocabulary] after all processors that the rows ask for."""
    changed = torch.cat(list(scanned.whole()))
    flat = changed.view(-1)
    _mask(changed, rows)
    _add_biases(flat, rows, changed.shape[1])
    _penalize(flat, rows, changed.shape[1])
    return changed


def _mask(changed: torch.Tensor, rows: Sequence[RowInput]) -> None:
    """-inf for what must not be made."""
    num_ids, flat = changed.shape[1], changed.view(-1)
    choosy = [n for n, row in enumerate(rows) if row.sampling.allowed_token_ids]
    if choosy:
        allowed = _Pairs(num_ids)
        for n in choosy:
            allowed.add(n, np.frombuffer(rows[n].sampling.allowed_token_ids, "<i4").astype(np.int64))
        index = allowed.index(flat.device)
        kept = flat[index]
        changed[choosy] = -torch.inf
        flat[index] = kept
    masked = _Pairs(num_ids)
    for n, row in enumerate(rows):
        if row.sampling.bad_words:
            masked.add(n, last_of_bad_words(row.sampling.bad_words, row.history))
        if row.banned_ids:
            masked.add(n, row.banned_ids)
    if masked:
        flat[masked.index(flat.device)] = -torch.inf


def last_of_bad_words(words: Sequence[bytes], history: Sequence[int]) -> list[int]:
    """The last ids of those words (each int32) whose other ids `history` ends with."""
    longest = max(len(word) for word in words) // _ID_BYTES - 1
    tail = pack_ids(history[-longest:]) if longest > 0 else b""
    return [unpack_ids(word[-_ID_BYTES:])[0] for word in words if tail.endswith(word[:-_ID_BYTES])]


def _add_biases(flat: torch.Tensor, rows: Sequence[RowInput], num_ids: int) -> None:
    biased, biases = _Pairs(num_ids), list[float]()
    for n, row in enumerate(rows):
        if row.sampling.logit_bias:
            of_ids = {id: bias for id, bias in row.sampling.logit_bias.items() if 0 <= id < num_ids}
            biased.add(n, list(of_ids))
            biases.extend(of_ids.values())
    if biased:
        flat[biased.index(flat.device)] += torch.tensor(biases, dtype=torch.float32, device=flat.device)


def _penalize(flat: torch.Tensor, rows: Sequence[RowInput], num_ids: int) -> None:
    repeated, repetition = _Pairs(num_ids), list[float]()
    made, frequency, presence, counts = _Pairs(num_ids), list[float](), list[float](), list[_Ids]()
    for n, row in enumerate(rows):
        sampling = row.sampling
        is_counting = bool(sampling.frequency_penalty or sampling.presence_penalty)
        if not is_counting and sampling.repetition_penalty == 1.0:
            continue
        history = np.array(row.history, dtype=np.int64)  # a copy: an exported array cannot grow
        if sampling.repetition_penalty != 1.0:
            repetition.extend([sampling.repetition_penalty] * repeated.add(n, history))
        if is_counting:
            generated = history[row.num_prompt :]
            generated = generated[(generated >= 0) & (generated < num_ids)]
            counted = np.bincount(generated)
            num_made = made.add(n, generated)
            frequency.extend([sampling.frequency_penalty] * num_made)
            presence.extend([sampling.presence_penalty] * num_made)
            counts.append(counted[generated])
    # An id that occurs often stands often in the index: all its values are computed from the same one.
    if repeated:
        index = repeated.index(flat.device)
        values, penalties = flat[index], torch.tensor(repetition, dtype=torch.float32, device=flat.device)
        flat[index] = torch.where(values > 0, values / penalties, values * penalties)
    if made:
        index = made.index(flat.device)
        times = torch.from_numpy(np.concatenate(counts)).to(flat.device)
        values = flat[index] - torch.tensor(frequency, dtype=torch.float32, device=flat.device) * times
        flat[index] = values - torch.tensor(presence, dtype=torch.float32, device=flat.device)


class _Pairs:
    """Pairs of a row and an id, as an index into flat logits."""

    def __init__(self, num_ids: int) -> None:
        self._num_ids = num_ids
        self._parts: list[_Ids] = []

    def add(self, row: int, ids: Sequence[int] | _Ids) -> int:
        """Add ids of a row, leaving out those that the model cannot make; how many were added."""
        wanted = np.asarray(ids, dtype=np.int64)
        wanted = wanted[(wanted >= 0) & (wanted < self._num_ids)]
        if len(wanted):
            self._parts.append(wanted + row * self._num_ids)
        return len(wanted)

    def __bool__(self) -> bool:
        return bool(self._parts)

    def index(self, device: torch.device) -> torch.Tensor:
        parts = np.concatenate(self._parts) if self._parts else np.zeros(0, np.int64)
        return torch.from_numpy(parts).to(device)
