"""Lays out the steps of a lease: decode rows first, then prompt chunks within the token budget.

Pure: rows and limits in, steps out. Knows no executors and takes no blocks: what a row's tables do not
cover is not laid out.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pagebus.bus.messages import Chunk, Step, pack_handles, pack_ids
from pagebus.scheduler.blocks import Ints
from pagebus.scheduler.requests import Row
from pagebus.scheduler.slots import Handles, SlotTable

MAX_HORIZON = 16
MIN_HORIZON = 2
MAX_CHUNK_IDS = 1 << 19
"""Ids (2 MiB) that the chunks of one plan may carry."""
LEASE_S = 0.064
"""A lease lasts about so long: half of one covers a plan's way over the bus, and plans are few."""


class Budget(NamedTuple):
    """Limits of one plan."""

    num_steps: int  # the horizon
    num_step_tokens: int  # positions computed in one step
    num_chunk_tokens: int  # ids that the chunks of all steps may carry: bounds the message


class _Span(NamedTuple):
    """A row whose prefill ends within the lease decodes in steps [first, end)."""

    handle: int
    first: int
    end: int


def choose_horizon(step_s: float) -> int:
    """Steps of a lease where a step takes `step_s` seconds (0: not known yet)."""
    if step_s <= 0.0:
        return 8
    return min(MAX_HORIZON, max(MIN_HORIZON, -(-LEASE_S // step_s).__trunc__()))


def lay_out(slots: SlotTable, prefilling: Sequence[Row], budget: Budget) -> tuple[Step, ...]:
    """The steps for all planned rows from their reported positions; sets their targets.

    A row whose prefill ends in step k decodes from step k + 1 on; rows at their last position or at the end
    of their tables sit out. The lease ends early where no row has anything left to do.
    """
    top = slots.top
    position = slots.position[:top]
    limit = np.minimum(slots.capacity[:top], slots.end[:top])
    num_decodes: Ints = limit - position
    np.minimum(num_decodes, budget.num_steps, out=num_decodes)
    np.maximum(num_decodes, 0, out=num_decodes)
    for row in prefilling:
        num_decodes[row.slot] = 0
    np.add(position, num_decodes, out=slots.target[:top])
    decoding = num_decodes.nonzero()[0]
    return _steps(slots, slots.handle[decoding], num_decodes[decoding], list(prefilling), budget)


def _steps(
    slots: SlotTable, handles: Handles, num_decodes: Ints, prefills: list[Row], budget: Budget
) -> tuple[Step, ...]:
    num_ending = np.bincount(num_decodes, minlength=budget.num_steps + 1).tolist()  # after so many steps
    spans: list[_Span] = []
    steps: list[Step] = []
    changes = {0}
    num_carried = 0
    decode = b""
    for k in range(budget.num_steps):
        if k in changes or num_ending[k]:
            decode = handles[num_decodes > k].tobytes()
            decode += pack_handles(span.handle for span in spans if span.first <= k < span.end)
        chunks: list[Chunk] = []
        left = budget.num_step_tokens - len(decode) // 4
        for row in prefills:
            chunk = _next_chunk(slots, row, min(left, budget.num_chunk_tokens - num_carried))
            if chunk is None:
                continue
            chunks.append(chunk)
            left -= chunk.end - chunk.start
            num_carried += chunk.end - chunk.start
            if chunk.end == row.num_ids:
                limit = min(int(slots.capacity[row.slot]), row.end_position)
                num_left = min(budget.num_steps - k - 1, limit - chunk.end)
                slots.target[row.slot] += num_left
                spans.append(_Span(row.handle, k + 1, k + 1 + num_left))
                changes |= {k + 1, k + 1 + num_left}
        if chunks:
            prefills = [row for row in prefills if slots.target[row.slot] < row.num_ids]
        elif not decode:
            break
        elif steps and not steps[-1].chunks and steps[-1].decode == decode:
            steps[-1] = Step(decode=decode, num_times=steps[-1].num_times + 1)
            continue
        steps.append(Step(chunks=tuple(chunks), decode=decode))
    return tuple(steps)


def _next_chunk(slots: SlotTable, row: Row, max_size: int) -> Chunk | None:
    start = int(slots.target[row.slot])
    end = min(row.num_ids, int(slots.capacity[row.slot]), start + max_size)
    if end <= start:
        return None
    slots.target[row.slot] = end
    return Chunk(handle=row.handle, start=start, end=end, ids=pack_ids(row.ids[start:end]))
