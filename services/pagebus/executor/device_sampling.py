"""Choosing ids on a device without waiting for it: the choice of all rows, and what few rows want besides.

Every row gets an id from the model's own logits in one go, which a CUDA graph can hold. Rows with penalties,
biases or forbidden ids then get another one from changed logits, and log-probabilities are looked up, both by
work that is launched behind. The semantics are `sampling.py`'s. Knows no rows' state and no pages.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pagebus.bus.messages import Logprobs
from pagebus.executor.batch import RowInput
from pagebus.executor.device import Device
from pagebus.executor.device_batch import Parts
from pagebus.executor.logits_processors import is_changing, last_of_bad_words
from pagebus.executor.scan import largest, scan
from pagebus.kernels.triton_filters import triton_limits
from pagebus.kernels.triton_penalties import triton_penalize
from pagebus.kernels.triton_sampling import Scanned, triton_sample, triton_scan
from pagebus.kernels.triton_steps import FIELDS, LAST_ID, StepBuffers

_Ids = npt.NDArray[np.int64]
_ALLOWED_BIAS, _BANNED_BIAS = 0.0, float("-inf")


@dataclass(frozen=True, slots=True)
class Chosen:
    """Of each row the id (-1: none can be chosen) and its largest logit (NaN where one is not finite)."""

    ids: torch.Tensor  # [rows], int64
    tops: torch.Tensor  # [rows], float32


def choose(logits: torch.Tensor, buffers: StepBuffers, places: torch.Tensor | None = None) -> Chosen:
    """An id for each row of `logits` [rows, vocabulary]; row r has the parameters number `places[r]`."""

    def of_rows(values: torch.Tensor) -> torch.Tensor:
        return values if places is None else values.index_select(0, places)

    temperatures = of_rows(buffers.temperatures)
    scanned: Scanned = triton_scan(logits)
    limits = triton_limits(
        logits, scanned.tops, temperatures, of_rows(buffers.least), of_rows(buffers.top_ks),
        of_rows(buffers.top_ps),
    )  # fmt: skip
    ids, _ = triton_sample(
        logits, scanned, temperatures, limits, of_rows(buffers.prefixes), of_rows(buffers.indices)
    )
    return Chosen(ids, scanned.tops)


@dataclass(frozen=True, slots=True)
class _Choosy:
    """Rows that may make some ids only: places in flat logits [changing rows * vocabulary]."""

    is_choosy: slice  # [changing rows]
    allowed: slice  # [pairs]


@dataclass(frozen=True, slots=True)
class Changing:
    """What changes some rows' logits, by its place among a step's words."""

    rows: list[int]  # numbers in the step
    places: slice  # the same as words
    offsets: slice  # [rows + 1]
    ids: slice  # [entries]
    biases: slice
    counts: slice
    is_seen: slice
    penalties: slice  # [3 * rows]: repetition, frequency, presence
    choosy: _Choosy | None


def changing_of(rows: Sequence[RowInput], vocabulary: int, parts: Parts) -> Changing | None:
    """What `logits_processors.py` does to the rows' logits, as words for the device; None: nothing."""
    places = [n for n, row in enumerate(rows) if row.is_sampled and is_changing(row)]
    if not places:
        return None
    chosen = [rows[n] for n in places]
    entries = [_entries(row, vocabulary) for row in chosen]
    offsets = np.zeros(len(places) + 1, np.int64)
    offsets[1:] = np.cumsum([len(ids) for ids, _, _, _ in entries])
    ids, biases, counts, is_seen = (np.concatenate(columns) for columns in zip(*entries, strict=True))
    samplings = [row.sampling for row in chosen]
    penalties = [s.repetition_penalty for s in samplings]
    penalties += [s.frequency_penalty for s in samplings] + [s.presence_penalty for s in samplings]
    return Changing(
        rows=places,
        places=parts.add(places),
        offsets=parts.add(offsets),
        ids=parts.add(ids),
        biases=parts.add_floats(biases),
        counts=parts.add(counts),
        is_seen=parts.add(is_seen),
        penalties=parts.add_floats(penalties),
        choosy=_choosy(chosen, vocabulary, parts),
    )


def _choosy(rows: Sequence[RowInput], vocabulary: int, parts: Parts) -> _Choosy | None:
    is_choosy = [bool(row.sampling.allowed_token_ids) for row in rows]
    if not any(is_choosy):
        return None
    allowed = []
    for n, row in enumerate(rows):
        ids = np.frombuffer(row.sampling.allowed_token_ids, "<i4").astype(np.int64)
        allowed.append(n * vocabulary + np.unique(ids[(ids >= 0) & (ids < vocabulary)]))
    return _Choosy(parts.add(is_choosy), parts.add(np.concatenate(allowed)))


def _entries(row: RowInput, vocabulary: int) -> tuple[_Ids, npt.NDArray[np.float64], _Ids, _Ids]:
    """One row's (ids, biases, times generated, occurs in prompt or output), each id once."""
    sampling = row.sampling
    biases = {id: float(bias) for id, bias in sampling.logit_bias.items() if 0 <= id < vocabulary}
    banned = list(row.banned_ids)
    if sampling.bad_words:
        banned += last_of_bad_words(sampling.bad_words, row.history)
    for id in banned:
        if 0 <= id < vocabulary:
            biases[id] = biases.get(id, _ALLOWED_BIAS) + _BANNED_BIAS
    has_penalty = bool(sampling.frequency_penalty or sampling.presence_penalty)
    history = np.zeros(0, np.int64)
    if has_penalty or sampling.repetition_penalty != 1.0:
        history = np.array(row.history, np.int64)  # a copy: an exported array cannot grow
    inside = (history >= 0) & (history < vocabulary)
    seen = np.unique(history[inside])
    made, times = np.unique(history[row.num_prompt :][inside[row.num_prompt :]], return_counts=True)
    ids = np.union1d(seen, np.fromiter(biases, np.int64, len(biases)))
    counts = np.zeros(len(ids), np.int64)
    counts[np.searchsorted(ids, made)] = times
    is_seen = np.zeros(len(ids), np.int64)
    is_seen[np.searchsorted(ids, seen)] = 1
    return ids, np.array([biases.get(int(id), _ALLOWED_BIAS) for id in ids], np.float64), counts, is_seen


def choose_again(
    logits: torch.Tensor,  # [at least the step's rows, vocabulary]; those of changing rows are read
    words: torch.Tensor,  # what was uploaded
    changing: Changing,
    buffers: StepBuffers,
) -> tuple[torch.Tensor, Chosen]:
    """Ids from changed logits, and the rows' numbers in the step."""
    places = words[changing.places]
    changed = logits.index_select(0, places).float()
    if changing.choosy is not None:
        whole = changed
        is_choosy = words[changing.choosy.is_choosy].bool()[:, None]
        changed = whole.masked_fill(is_choosy, float("-inf"))
        allowed = words[changing.choosy.allowed]
        changed.view(-1).index_copy_(0, allowed, whole.view(-1).index_select(0, allowed))
    repetition, frequency, presence = words[changing.penalties].view(torch.float64).float().view(3, -1)
    triton_penalize(
        changed,
        words[changing.offsets].int(),
        words[changing.ids].int(),
        words[changing.biases].view(torch.float64).float(),
        words[changing.counts].int(),
        words[changing.is_seen].to(torch.int8),
        repetition,
        frequency,
        presence,
    )
    return places, choose(changed, buffers, places)


@dataclass(frozen=True, slots=True)
class Told:
    """Log-probabilities on their way to the host."""

    rows: list[int]  # numbers in the step
    nums_top: list[int]
    ids: torch.Tensor  # [rows, 1 + most], int64: the id made, then the best
    values: torch.Tensor  # [rows, 1 + most], float32
    ranks: torch.Tensor  # [rows], int64


def look_up(
    logits: torch.Tensor,  # [at least the step's rows, vocabulary]; those of `places` are read
    places: torch.Tensor,  # [rows], int64
    ids: torch.Tensor,  # [rows], int64: made; -1 gives garbage
    num_top: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`Told`'s ids, values and ranks, of the model's own distribution as `logprobs.py` has it."""
    own = logits.index_select(0, places).float()
    wanted = ids.clamp(min=0)[:, None]
    values = own.gather(1, wanted)
    ranks = (own >= values).sum(-1)
    if num_top > 0:
        wanted = torch.cat((wanted, largest(scan(own), num_top)), 1)
    return wanted, own.log_softmax(-1).gather(1, wanted), ranks


def logprobs_of(told: Told) -> dict[int, Logprobs]:
    """By the row's number, once the tensors have arrived."""
    ids, values, ranks = told.ids.numpy(), told.values.numpy(), told.ranks.numpy()
    found = {}
    for at, (row, num_top) in enumerate(zip(told.rows, told.nums_top, strict=True)):
        width = 1 + min(num_top, ids.shape[1] - 1)
        found[row] = Logprobs(
            num_top=width - 1,
            ids=ids[at, :width].astype("<i4").tobytes(),
            values=values[at, :width].astype("<f4").tobytes(),
            ranks=ranks[at : at + 1].astype("<i4").tobytes(),
        )
    return found


@dataclass(frozen=True, slots=True)
class Extras:
    """What rows of a launch want beyond an id, by its place among the launch's words."""

    changing: Changing | None
    changed: list[int]  # numbers of the rows whose logits are changed
    last_ids: slice  # addresses of their last ids
    asking: list[int]  # numbers of the rows that ask for log-probabilities
    nums_top: list[int]
    places: slice  # `asking` as words


def extras_of(rows: Sequence[RowInput], slots: Sequence[int], vocabulary: int, parts: Parts) -> Extras | None:
    """What the rows, which have these slots, want; None: nothing."""
    asking = [n for n, row in enumerate(rows) if row.is_sampled and row.sampling.num_logprobs is not None]
    changing = changing_of(rows, vocabulary, parts)
    if changing is None and not asking:
        return None
    changed = [] if changing is None else changing.rows
    return Extras(
        changing=changing,
        changed=changed,
        last_ids=parts.add([slots[n] * FIELDS + LAST_ID for n in changed]),
        asking=asking,
        nums_top=[rows[n].sampling.num_logprobs or 0 for n in asking],
        places=parts.add(asking),
    )


def launch_extras(
    extras: Extras,
    words: torch.Tensor,  # what was uploaded
    logits: torch.Tensor,  # [at least the step's rows, vocabulary]
    buffers: StepBuffers,
    results: torch.Tensor,  # [rows, RESULTS], float64, changed
    state: torch.Tensor,  # changed
    device: Device,
) -> Told | None:
    """Behind the step itself, before the next one."""
    if extras.changing is not None:
        places, again = choose_again(logits, words, extras.changing, buffers)
        results[:, 0].index_copy_(0, places, again.ids.double())
        results[:, 3].index_copy_(0, places, again.tops.double())
        state.index_copy_(0, words[extras.last_ids], again.ids.clamp(min=0))
    if not extras.asking:
        return None
    places = words[extras.places]
    ids = results[:, 0].index_select(0, places).long()
    found = look_up(logits, places, ids, max(extras.nums_top))
    return Told(extras.asking, extras.nums_top, *(device.fetch(part) for part in found))
