"""Lays out the steps of a lease: decode rows first, then prompt chunks within the token budget.

Pure: rows and limits in, steps out. Knows no executors and takes no blocks: what a row's tables do not
cover is not laid out.
"""

from collections.abc import Iterable
from typing import NamedTuple

from pagebus.bus.messages import Chunk, Step, pack_handles, pack_ids
from pagebus.scheduler.requests import Row


class Budget(NamedTuple):
    """Limits of one plan."""

    num_steps: int  # the horizon
    num_step_tokens: int  # positions computed in one step
    num_chunk_tokens: int  # ids that the chunks of all steps may carry: bounds the message


class _Span(NamedTuple):
    """A row decodes in steps [first, end)."""

    handle: int
    first: int
    end: int


def lay_out(rows: Iterable[Row], budget: Budget) -> tuple[Step, ...]:
    """The steps for `rows` (first come first) from their confirmed positions; sets each row's `target`.

    A row whose prefill ends in step k decodes from step k + 1 on; rows at their last position or at the end
    of their tables sit out. The lease ends early where no row has anything left to do.
    """
    spans: list[_Span] = []
    prefills: list[Row] = []
    for row in rows:
        limit = min(row.tables.capacity, row.end_position)
        row.target = row.position
        if row.position < row.num_ids:
            prefills.append(row)
        elif row.position < limit:
            row.target = min(limit, row.position + budget.num_steps)
            spans.append(_Span(row.handle, 0, row.target - row.position))
    return _steps(spans, prefills, budget)


def _steps(spans: list[_Span], prefills: list[Row], budget: Budget) -> tuple[Step, ...]:
    steps: list[Step] = []
    changes = {span.end for span in spans} | {0}  # steps in which other rows decode than in the one before
    num_carried = 0
    decode, num_decode = b"", 0
    for k in range(budget.num_steps):
        if k in changes:
            handles = [span.handle for span in spans if span.first <= k < span.end]
            decode, num_decode = pack_handles(handles), len(handles)
        chunks: list[Chunk] = []
        left = budget.num_step_tokens - num_decode
        for row in prefills:
            size = min(left, budget.num_chunk_tokens - num_carried)
            chunk = _next_chunk(row, size)
            if chunk is None:
                continue
            chunks.append(chunk)
            left -= chunk.end - chunk.start
            num_carried += chunk.end - chunk.start
            if row.target == row.num_ids:
                limit = min(row.tables.capacity, row.end_position)
                num_left = min(budget.num_steps - k - 1, limit - row.target)
                row.target += num_left
                spans.append(_Span(row.handle, k + 1, k + 1 + num_left))
                changes |= {k + 1, k + 1 + num_left}
        prefills = [row for row in prefills if row.target < row.num_ids]
        if not chunks and not num_decode:
            break
        steps.append(Step(chunks=tuple(chunks), decode=decode))
    return tuple(steps)


def _next_chunk(row: Row, max_size: int) -> Chunk | None:
    end = min(row.num_ids, row.tables.capacity, row.target + max_size)
    if end <= row.target:
        return None
    chunk = Chunk(handle=row.handle, start=row.target, end=end, ids=pack_ids(row.ids[row.target : end]))
    row.target = end
    return chunk
