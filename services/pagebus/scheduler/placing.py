"""Who gets blocks: running rows before new ones, earlier arrivals before later ones. Sends nothing."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pagebus.scheduler.blocks import Tables
from pagebus.scheduler.executors import ExecutorState
from pagebus.scheduler.requests import Row

WATERMARK_SHARE = 100
"""One block in this many stays free for running rows when a new row is placed."""


def wanted_position(row: Row, num_ahead: int) -> int:
    """Positions that a row should have slots for, so that it can go on for `num_ahead` decode steps."""
    return min(row.end_position, max(row.position, row.num_ids) + num_ahead)


def give_blocks(executor: ExecutorState, horizon: int) -> list[Row]:
    """Give the running rows what the next plan needs. Returns the rows to preempt so that others can go on.

    `num_ahead` covers the plan's steps and those that the executor may do before it has the plan. When
    blocks are short, earlier arrivals get theirs and later ones sit out. Rows are preempted, latest first,
    only where a row cannot do a single step and what is coming back does not cover that.
    """
    num_ahead = horizon + min(horizon, executor.num_steps_left)
    kv = executor.kv
    short: list[Row] = []
    has_windows = any(group.window is not None for group in kv.groups)
    for row in executor.rows.values():
        if has_windows:
            kv.drop_unseen(row.tables, row.position)
        wanted = wanted_position(row, num_ahead)
        if row.tables.capacity < wanted:
            short.append(row)
    short.sort(key=_age)
    for row in short:
        executor.grow(row, wanted_position(row, num_ahead))
    stalled = [row for row in short if row.tables.capacity <= row.position]
    executor.is_short = bool(stalled)
    return _victims(executor, stalled) if stalled else []


def _victims(executor: ExecutorState, stalled: list[Row]) -> list[Row]:
    """Rows whose blocks must come back: as few as possible, latest arrival first, never the earliest."""
    coming = executor.num_returning_blocks
    candidates = sorted(executor.rows.values(), key=_age)
    victims: list[Row] = []
    while stalled and len(candidates) > 1:
        needed = [0] * len(coming)
        for row in stalled:
            for g, missing in enumerate(executor.kv.num_missing(row.tables, row.position + 1)):
                needed[g] += missing
        if all(
            count <= back + pool.num_free
            for count, back, pool in zip(needed, coming, executor.kv.pools, strict=True)
        ):
            break
        victim = candidates.pop()
        victims.append(victim)
        stalled = [row for row in stalled if row is not victim]
        for g, blocks in enumerate(victim.tables.held()):
            coming[g] += len(blocks)
    return victims


def _age(row: Row) -> tuple[float, int]:
    return row.age


class _Choice(NamedTuple):
    spare: float  # share of the pool that stays free
    num_rows: int
    executor: ExecutorState


def choose_executor(executors: Iterable[ExecutorState], row: Row, max_num_seqs: int) -> ExecutorState | None:
    """Where a row starts: where its ids and one more block fit and most blocks are free; None: nowhere now.

    A small share of the blocks stays free for rows that run, so that a new one does not have to be preempted
    at once; where nothing runs there is nothing to keep them for.
    """
    best: _Choice | None = None
    for executor in executors:
        if not executor.is_ready or executor.is_short:
            continue
        if (
            len(executor.rows) >= min(max_num_seqs, executor.max_num_seqs)
            or row.end_position > executor.max_len
        ):
            continue
        spare = watermark(executor)
        needed = num_needed(executor, row)
        if not executor.kv.has_free(needed, spare):
            continue
        free = min(
            (pool.num_free - count) / pool.num_blocks
            for pool, count in zip(executor.kv.pools, needed, strict=True)
        )
        choice = _Choice(free, len(executor.rows), executor)
        if best is None or (choice.spare, -choice.num_rows) > (best.spare, -best.num_rows):
            best = choice
    return best.executor if best else None


def watermark(executor: ExecutorState) -> int:
    """Blocks of each group that a new row must leave free."""
    smallest = min(pool.num_blocks for pool in executor.kv.pools)
    return min(len(executor.rows), max(1, smallest // WATERMARK_SHARE))


def start_position(executor: ExecutorState, row: Row) -> int:
    """Positions that a row needs slots for at its start: its ids' and one more block's."""
    return min(row.end_position, len(row.ids) + executor.kv.groups[0].block_size)


def num_needed(executor: ExecutorState, row: Row) -> Sequence[int]:
    """Blocks, by group, that a row which waits needs at its start."""
    return executor.kv.num_missing(Tables(len(executor.kv.groups)), start_position(executor, row))
