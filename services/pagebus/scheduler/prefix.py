"""What a row finds in the prefix cache: a chain of digests over its full blocks, and blocks that have them.

A digest covers the block's ids, all ids before it, the tenant and the request's salt: one tenant never finds
what another computed, nor learns from timing that it exists.
"""

from array import array
from functools import lru_cache
from hashlib import sha256
from typing import NamedTuple

from pagebus.scheduler.blocks import KvPool

_ID_BYTES = 4


class Hit(NamedTuple):
    """Blocks to share: by KV group, table entries from `first[g]` on; together they cover `num_positions`."""

    num_positions: int
    first: list[int]
    blocks: list[list[int]]


@lru_cache(maxsize=4096)
def root_digest(tenant: str, cache_salt: str) -> bytes:
    """Where a chain begins."""
    parts = (tenant.encode("utf-8", "surrogatepass"), cache_salt.encode("utf-8", "surrogatepass"))
    return sha256(b"pagebus" + b"".join(len(part).to_bytes(8, "little") + part for part in parts)).digest()


def extend_digests(digests: list[bytes], root: bytes, ids: "array[int]", block_size: int) -> None:
    """Append the digests of those full blocks of `ids` that have none yet."""
    num_full = len(ids) // block_size
    if num_full <= len(digests):
        return
    size = block_size * _ID_BYTES
    first = len(digests)
    data = ids[first * block_size : num_full * block_size].tobytes()
    last = digests[-1] if digests else root
    for at in range(0, len(data), size):
        last = sha256(last + data[at : at + size]).digest()
        digests.append(last)


def find_hit(kv: KvPool, digests: list[bytes], num_ids: int) -> Hit | None:
    """The longest prefix of whole blocks whose KV is here; at least one position stays to be computed.

    A hit needs all full blocks of the groups with full attention, and the last window's of the others:

    ```
    full attention   | hit | hit | hit | hit |
    window           |  ?  |  ?  | hit | hit |      what the query after the hit still sees
    ```
    """
    most = min(len(digests), (num_ids - 1) // kv.sizes[0])
    for pool, window in zip(kv.pools, kv.windows, strict=True):
        if window is None:
            most = next((b for b in range(most) if pool.find(digests[b]) < 0), most)
    if most == 0:
        return None
    runs = [_runs(kv, g, digests, most) for g in range(len(kv.pools)) if kv.windows[g] is not None]
    windowed = [g for g in range(len(kv.pools)) if kv.windows[g] is not None]
    for num_blocks in range(most, 0, -1):
        position = num_blocks * kv.sizes[0]
        if all(
            run[num_blocks - 1] >= num_blocks - kv.first_seen(g, position)
            for g, run in zip(windowed, runs, strict=True)
        ):
            first = [kv.first_seen(g, position) for g in range(len(kv.pools))]
            blocks = [
                [pool.find(digest) for digest in digests[first[g] : num_blocks]]
                for g, pool in enumerate(kv.pools)
            ]
            return Hit(position, first, blocks)
    return None


def _runs(kv: KvPool, group: int, digests: list[bytes], most: int) -> list[int]:
    """For each block, how many in a row up to it are here."""
    runs, run = [], 0
    for digest in digests[:most]:
        run = run + 1 if kv.pools[group].find(digest) >= 0 else 0
        runs.append(run)
    return runs
