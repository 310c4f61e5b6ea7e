"""Logit bias and the three penalties, applied to the few ids that they touch. Knows no text.

A row has a list of (id, bias, times generated, occurs in prompt or output), each id once:

```
offsets [0, 3, 3, 7]   row 0: entries 0 .. 2 | row 1: none | row 2: entries 3 .. 6
```

The order is the project's: bias, repetition, frequency, presence. A bias of -inf bans an id.
"""
# ruff: noqa: ANN001, ANN202, N803 - kernels: arguments without types, constants in capitals

from typing import no_type_check

import torch

from pagebus.kernels.jit import kernel_with, tl

_BLOCK = 256


@kernel_with(loose=("repetitions", "frequencies", "presences"))
@no_type_check
def _penalize(
    logits, stride, offsets, ids, biases, counts, is_seen, repetitions, frequencies, presences,
    VOCABULARY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    repetition, frequency = tl.load(repetitions + row), tl.load(frequencies + row)
    presence = tl.load(presences + row)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        id = tl.load(ids + at, mask=at < end, other=-1)
        is_there = (at < end) & (id >= 0) & (id < VOCABULARY)
        values = tl.load(logits + row * stride + id, mask=is_there, other=0.0)
        values += tl.load(biases + at, mask=is_there, other=0.0)
        factors = tl.where(tl.load(is_seen + at, mask=is_there, other=0) != 0, repetition, 1.0)
        values = tl.where(values > 0, tl.div_rn(values, factors), values * factors)
        times = tl.load(counts + at, mask=is_there, other=0)
        values -= frequency * times.to(tl.float32)
        values = tl.where(times > 0, values - presence, values)
        tl.store(logits + row * stride + id, values, mask=is_there)


def triton_penalize(
    logits: torch.Tensor,  # [rows, vocabulary], float32, changed in place; any row stride
    offsets: torch.Tensor,  # [rows + 1], int32
    ids: torch.Tensor,  # [entries], int32; no id twice in a row; outside the vocabulary: passed over
    biases: torch.Tensor,  # [entries], float32
    counts: torch.Tensor,  # [entries], int32: times generated
    is_seen: torch.Tensor,  # [entries], int8: stands in the prompt or the output
    repetitions: torch.Tensor,  # [rows], float32; 1: none
    frequencies: torch.Tensor,  # [rows], float32; 0: none
    presences: torch.Tensor,  # [rows], float32; 0: none
) -> None:
    """Change the entries' logits. All rows' lists live on the device; the grid is one program a row."""
    if logits.dtype != torch.float32:
        raise ValueError(f"penalties are added to float32 logits, not {logits.dtype}")
    _penalize[(len(logits),)](
        logits, logits.stride(0), offsets, ids, biases, counts, is_seen, repetitions, frequencies, presences,
        VOCABULARY=logits.shape[1], BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip


def reference_penalize(
    logits: torch.Tensor,
    offsets: torch.Tensor,
    ids: torch.Tensor,
    biases: torch.Tensor,
    counts: torch.Tensor,
    is_seen: torch.Tensor,
    repetitions: torch.Tensor,
    frequencies: torch.Tensor,
    presences: torch.Tensor,
) -> torch.Tensor:
    """New logits, float64, an entry at a time."""
    changed = logits.double()
    for row in range(len(logits)):
        for entry in range(int(offsets[row]), int(offsets[row + 1])):
            id = int(ids[entry])
            if not 0 <= id < logits.shape[1]:
                continue
            value = changed[row, id] + biases[entry].double()
            if is_seen[entry]:
                penalty = repetitions[row].double()
                value = value / penalty if value > 0 else value * penalty
            if counts[entry] > 0:
                value = value - frequencies[row].double() * counts[entry] - presences[row].double()
            changed[row, id] = value
    return changed
