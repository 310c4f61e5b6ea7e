"""What must hold of a scheduler's blocks and rows between two turns; simulations and tests look at it.

Changes nothing, and nothing of the service calls it.
"""

from collections import Counter

from pagebus.scheduler.core import SchedulerCore
from pagebus.scheduler.executors import ExecutorState


def flaw_of(core: SchedulerCore) -> str | None:
    """What is wrong with the books of this term, or None."""
    for executor in core._executors.values():
        flaw = _flaw_of_rows(executor) or _flaw_of_blocks(executor) or _flaw_of_sharing(executor)
        if flaw is not None:
            return f"executor {executor.name}: {flaw}"
    return None


def leftovers(core: SchedulerCore) -> dict[str, int]:
    """What is still held, by name; empty when nothing is asked for any more."""
    book = core._book
    left = {
        "requests": book.num_requests,
        "waiting rows": book.lobby.num_rows,
        "suspects": sum(bool(request.rows) for _, _, request in book.lobby.suspects._heap),
        "finished rows": len(core._finished),
    }
    for executor in core._executors.values():
        pools = executor.kv.pools
        left |= {
            f"{executor.name}: rows": len(executor.rows),
            f"{executor.name}: handles": len(executor.handles),
            f"{executor.name}: returning rows": len(executor.returning),
            f"{executor.name}: unsettled": int(executor.has_unsettled),
            f"{executor.name}: slots": executor.slots.top,
            f"{executor.name}: suspect": int(executor.suspect is not None),
            f"{executor.name}: blocks": sum(pool.num_blocks - pool.num_free for pool in pools),
            f"{executor.name}: plans": 0 if executor.is_lost else len(executor.unacknowledged),
        }
    return {name: count for name, count in left.items() if count}


def _flaw_of_rows(executor: ExecutorState) -> str | None:
    """Every slot in use is planned, or about to be let go."""
    live = {row.handle for row in executor.slots.rows[: executor.slots.top] if row is not None}
    leaving = {entry.row.handle for entry in executor.returning} | {row.handle for row in executor._ended}
    if live != set(executor.rows) | leaving:
        return f"slots of {live}, rows {set(executor.rows)}, leaving {leaving}"
    if executor.rows and (executor.is_lost or executor.needs_snapshot):
        return "rows are placed while it may still hold others"
    return None


def _flaw_of_blocks(executor: ExecutorState) -> str | None:
    """Free, used and cached blocks are all blocks, and every reference is counted."""
    slots = executor.slots
    live = [row for row in slots.rows[: slots.top] if row is not None]
    for g, pool in enumerate(executor.kv.pools):
        used = Counter(block for row in live for block in slots.held(row.slot)[g].tolist())
        if len(used) + pool.num_free != pool.num_blocks or not (
            used.keys().isdisjoint(pool._free) and used.keys().isdisjoint(pool._cached)
        ):
            return f"group {g}: {len(used)} blocks in use and {pool.num_free} free of {pool.num_blocks}"
        if int(pool._counts.sum()) != used.total() or any(pool.count(block) != used[block] for block in used):
            return f"group {g}: references and tables differ"
        if not set(pool._cached) <= set(pool._digests) or len(pool._blocks) != len(pool._digests):
            return f"group {g}: the cache's two sides differ"
    return None


def _flaw_of_sharing(executor: ExecutorState) -> str | None:
    """Rows share a block only at the same place of their tables, and only where both have passed it."""
    slots = executor.slots
    for g, size in enumerate(executor.kv.sizes):
        entries: dict[int, tuple[int, int]] = {}  # by block: its place, and the slot that has it
        for slot in (row.slot for row in slots.rows[: slots.top] if row is not None):
            first, last = int(slots.num_dropped[g, slot]), int(slots.num_entries[g, slot])
            for entry, block in enumerate(slots.tables[g][slot, first:last].tolist(), start=first):
                place, other = entries.setdefault(block, (entry, slot))
                if other == slot:
                    continue
                reached = min(int(slots.position[slot]), int(slots.position[other]))
                if place != entry or reached < (entry + 1) * size:
                    return f"block {block} stands at {place} and {entry} of two tables, computed to {reached}"
    return None
