"""Who gets blocks: running rows before new ones, better ranks before worse ones. Sends nothing."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from pagebus.scheduler.blocks import Ints, KvPool
from pagebus.scheduler.executors import ExecutorState
from pagebus.scheduler.prefix import Hit, extend_digests, find_hit
from pagebus.scheduler.requests import Row, RowState

WATERMARK_SHARE = 100
"""One block in this many stays free for running rows when a new row is placed."""
MAX_START_BYTES = 2 << 20
"""Rough bytes of new rows' descriptors and tables in one plan."""
_ROW_COST = 16
"""Tokens of prefill that a row more on an executor counts as, when a place is chosen."""


def give_blocks(executor: ExecutorState, horizon: int, now_s: float, quantum_s: float) -> list[Row]:
    """Give the running rows what the next plan needs. Returns the rows to preempt so that others can go on.

    Blocks are given for the plan's steps and for those that the executor may do before it has the plan. When
    they are short, better ranks get theirs and others sit out. Rows are preempted only where a row cannot do
    a single step and what is coming back does not cover that.
    """
    num_ahead = horizon + min(horizon, executor.num_steps_left)
    slots = executor.slots
    if executor.kv.has_windows:
        executor.num_changes += slots.drop_unseen()
    top = slots.top
    wanted: Ints = np.maximum(slots.position[:top], slots.num_ids[:top]) + np.int32(num_ahead)
    np.minimum(wanted, slots.end[:top], out=wanted)
    short = (slots.capacity[:top] < wanted).nonzero()[0]
    executor.note_short(False)
    if len(short) == 0 or slots.grow_all(short, wanted[short]):
        return []
    rows = [row for slot in short.tolist() if (row := slots.rows[slot]) is not None]
    rows.sort(key=_rank)
    for row in rows:
        slots.grow(row.slot, int(wanted[row.slot]))
    stalled = [row for row in rows if slots.capacity[row.slot] <= slots.position[row.slot]]
    executor.note_short(bool(stalled))
    return _victims(executor, stalled, now_s, quantum_s) if stalled else []


def _victims(executor: ExecutorState, stalled: list[Row], now_s: float, quantum_s: float) -> list[Row]:
    """Rows of the requests whose blocks must come back so that the others can go on: as few as possible."""
    coming = np.array(executor.num_returning_blocks)
    free = np.array([pool.num_free for pool in executor.kv.pools])
    victims: list[Row] = []
    candidates = by_loss(executor, now_s, quantum_s)
    while stalled and len(candidates) > 1:
        needed = np.zeros_like(free)
        for row in stalled:
            needed += _num_missing(executor, row)
        if (needed <= coming + free).all():
            break
        rows = candidates.pop(0)
        victims += rows
        stalled = [row for row in stalled if row not in rows]
        coming += num_held(executor, rows)
    return victims


def by_loss(executor: ExecutorState, now_s: float, quantum_s: float) -> list[list[Row]]:
    """Running requests, the first to be preempted first: worst priority, least to compute again, latest.

    Who was preempted before and has not had its turn since goes after the others, or it would never get on.
    The request with the best rank is last, whatever it would lose, one choice after the other: its first one
    always gets on.
    """
    requests: dict[str, list[Row]] = {}
    for row in executor.rows.values():
        requests.setdefault(row.request.request_id, []).append(row)
    groups = sorted(requests.values(), key=lambda rows: min(map(_rank, rows)))

    def key(rows: list[Row]) -> tuple[bool, int, int, float]:
        request = rows[0].request
        is_fresh = any(is_protected(executor, row, now_s, quantum_s) for row in rows)
        loss = sum(int(executor.slots.position[row.slot]) for row in rows)
        return (is_fresh, -request.priority, loss, -request.arrival_s)

    return sorted(groups[1:], key=key) + [
        [row] for rows in groups[:1] for row in sorted(rows, key=_rank, reverse=True)
    ]


def has_had_its_turn(executor: ExecutorState, row: Row, now_s: float, quantum_s: float) -> bool:
    """Whether a running row has had its time since it was placed, and got on by a block of ids."""
    made = int(executor.slots.position[row.slot]) - row.num_ids
    return now_s - row.placed_s >= quantum_s and made >= executor.kv.sizes[0]


def is_protected(executor: ExecutorState, row: Row, now_s: float, quantum_s: float) -> bool:
    """Whether a running row was preempted before, came back, and has not had its turn since."""
    return row.num_preemptions > 0 and not has_had_its_turn(executor, row, now_s, quantum_s)


def _num_missing(executor: ExecutorState, row: Row) -> Ints:
    slots, slot = executor.slots, row.slot
    target = int(slots.position[slot]) + 1
    return np.array(
        [
            max(
                0,
                executor.kv.num_entries(g, target, int(slots.num_dropped[g, slot]))
                - int(slots.num_entries[g, slot]),
            )
            for g in range(len(executor.kv.pools))
        ]
    )


def num_held(executor: ExecutorState, rows: Iterable[Row]) -> Ints:
    """Blocks, by group, that come back when these rows leave: those that nobody else uses."""
    uses: list[dict[int, int]] = [{} for _ in executor.kv.pools]
    for row in rows:
        for g, blocks in enumerate(executor.slots.held(row.slot)):
            for block in blocks.tolist():
                uses[g][block] = uses[g].get(block, 0) + 1
    return np.array(
        [
            sum(pool.count(block) == num for block, num in used.items())
            for pool, used in zip(executor.kv.pools, uses, strict=True)
        ]
    )


def _rank(row: Row) -> tuple[int, float, int]:
    return row.rank


class Place(NamedTuple):
    """Where a row can start, and with what."""

    executor: ExecutorState
    hit: Hit | None
    copies: list[tuple[int, int]]  # KV group, source block: copied to the row's first own block of the group


def choose_place(executors: Iterable[ExecutorState], row: Row, num_harmless: int = 0) -> Place | None:
    """Where a row starts: where it fits and least is left to do before its next id; None: nowhere now.
    Whoever made `num_harmless` ids there has got on.

    A small share of the blocks stays free for rows that run, so that a new one does not have to be preempted
    at once; where nothing runs there is nothing to keep them for.
    """
    best: tuple[tuple[int, float], Place] | None = None
    for executor in executors:
        if not executor.is_ready or executor.is_short or not executor.has_room:
            continue
        if row.end_position > executor.max_len or not executor.may_start(row, num_harmless):
            continue
        place = _shared_start(executor, row)
        needed = num_needed(executor, row, place.hit)
        spare = watermark(executor)
        if any(
            count and pool.num_free < count + spare
            for count, pool in zip(needed, executor.kv.pools, strict=True)
        ):
            continue
        num_cached = place.hit.num_positions if place.hit else 0
        cost = len(row.ids) - num_cached + executor.backlog + _ROW_COST * len(executor.rows)
        key = (cost, -executor.kv.main.num_free / executor.kv.main.num_blocks)
        if best is None or key < best[0]:
            best = (key, place)
    return best[1] if best else None


def rows_in_the_way(
    executor: ExecutorState, row: Row, is_starving: bool, now_s: float, patience_s: float
) -> list[Row] | None:
    """The rows whose places a waiting row may take so that it fits (none: others leave already), or None.

    It may take those of rows with a worse priority; one that starves those of all that had their turn.
    """
    if not executor.is_ready or row.end_position > executor.max_len or executor.suspect is not None:
        return None

    def may_go(rows: list[Row]) -> bool:
        if rows[0].request.priority > row.request.priority:
            return not any(is_protected(executor, each, now_s, patience_s) for each in rows)
        return is_starving and all(has_had_its_turn(executor, each, now_s, patience_s) for each in rows)

    victims = [rows for rows in by_loss(executor, now_s, patience_s) if may_go(rows)]
    coming = np.array(executor.num_returning_blocks)
    leaving: list[Row] = []
    while True:
        num_free = executor.max_num_seqs - len(executor.rows) + len(leaving)
        if num_free > 0 and _could_fit(executor, row, coming):
            return leaving
        if not victims:
            return None
        rows = victims.pop(0)
        coming += num_held(executor, rows)
        leaving += rows


def _could_fit(executor: ExecutorState, row: Row, num_coming: Ints) -> bool:
    """Whether the row fits once `num_coming` blocks, by group, are free."""
    needed = num_needed(executor, row, _shared_start(executor, row).hit)
    return all(
        count <= pool.num_free + coming
        for count, pool, coming in zip(needed, executor.kv.pools, num_coming.tolist(), strict=True)
    )


def start_bytes(row: Row) -> int:
    """Roughly what telling an executor of a row takes."""
    history = 4 * len(row.ids) if row.request.sampling.needs_history else 0
    return 512 + len(row.request.stop_token_ids) + 4 * len(row.ids) // 16 + history


def watermark(executor: ExecutorState) -> int:
    """Blocks of each group that a new row must leave free."""
    smallest = min(pool.num_blocks for pool in executor.kv.pools)
    return min(len(executor.rows), max(1, smallest // WATERMARK_SHARE))


def start_position(kv: KvPool, row: Row) -> int:
    """Positions that a row needs slots for at its start: its ids' and one more."""
    return min(row.end_position, len(row.ids) + 1)


def num_needed(executor: ExecutorState, row: Row, hit: Hit | None) -> list[int]:
    """Blocks, by group, that a row which waits takes at its start; cached ones that it hits count too."""
    needed = []
    for g, pool in enumerate(executor.kv.pools):
        first = hit.first[g] if hit else 0
        shared = hit.blocks[g] if hit else []
        entries = executor.kv.num_entries(g, start_position(executor.kv, row), first)
        num_waking = sum(pool.is_cached(block) for block in shared)
        needed.append(max(0, entries - first - len(shared)) + num_waking)
    return needed


def _shared_start(executor: ExecutorState, row: Row) -> Place:
    """The most that the row can share: with another choice of its request, or from the prefix cache."""
    if not row.may_hit:
        return Place(executor, None, [])
    forked = _fork(executor, row)
    hit = None
    if executor.is_caching:
        extend_digests(row.digests, row.request.root, row.ids, executor.kv.sizes[0])
        hit = find_hit(executor.kv, row.digests, len(row.ids))
    num_found = hit.num_positions if hit else 0
    if forked is not None and forked.hit is not None and forked.hit.num_positions > num_found:
        return forked
    return Place(executor, hit, [])


def _fork(executor: ExecutorState, row: Row) -> Place | None:
    """Start with the prompt's blocks of another choice; a block that both would write is copied.

    ```
    parent   | full | full | part |      its own ids follow in the last block
    row      | same | same | copy |
    ```
    """
    kv, slots = executor.kv, executor.slots
    num_shared = min(row.request.num_prompt, len(row.ids) - 1)
    if num_shared < 1 or len(row.request.rows) < 2:
        return None
    num_full, num_over = divmod(num_shared, kv.sizes[0])
    first = [kv.first_seen(g, num_shared) for g in range(len(kv.pools))]
    for parent in row.request.rows:
        if parent.state is not RowState.RUNNING or parent.executor != executor.name or not parent.is_told:
            continue
        slot = parent.slot
        has_passed = any(slots.num_dropped[g, slot] > entry for g, entry in enumerate(first))
        if has_passed or slots.position[slot] < num_shared:
            continue  # a window has passed the prompt, or it is not computed yet
        blocks = [table[slot, first[g] : num_full].tolist() for g, table in enumerate(slots.tables)]
        copies = [(g, int(table[slot, num_full])) for g, table in enumerate(slots.tables)] if num_over else []
        return Place(executor, Hit(num_shared, first, blocks), copies)
    return None
