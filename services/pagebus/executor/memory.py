"""How many KV blocks there are, and how many threads. Knows sizes and the machine, no model family."""

import ctypes
import logging
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pagebus.executor.errors import ModelError
from pagebus.kernels.kv_write import BLOCK_SIZE

_log = logging.getLogger(__name__)

_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?|)b?\s*", re.IGNORECASE)

_AUTO_SHARE = 0.25
_AUTO_MAX_BYTES = 4 << 30
_MAX_SEQUENCES = 256  # more full-length sequences than this are no use: the pool of a tiny model stays small
_CHUNK_BLOCKS = 2048 // BLOCK_SIZE  # a step's token budget by default
_GPU_RESERVE_BYTES = 2 << 30  # activations of a step, the matrix library's workspace


def parse_bytes(text: str) -> int:
    """Bytes of "512MiB", "4GiB", "1.5 GB", "4g" or "1048576". Raises `ModelError`."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ModelError(f"--kv-cache-memory {text!r} is not a size such as 512MiB, 4GiB or auto")
    return int(float(match[1]) * _UNITS[match[2].lower()])


@dataclass(frozen=True, slots=True)
class GroupNeed:
    """A KV group as far as memory goes."""

    bytes_a_block: int  # in all of the group's layers together
    window: int | None


def blocks_of_groups(
    groups: Sequence[GroupNeed],
    *,
    max_model_len: int,
    device: torch.device,
    kv_cache_memory: str,
    gpu_memory_utilization: float,
) -> list[int]:
    """Blocks of each KV group, by the memory that the settings allow. Raises `ModelError`."""
    longest = sum(_held(group, max_model_len) * group.bytes_a_block for group in groups)
    if kv_cache_memory.strip().lower() != "auto" and device.type == "cpu":
        budget = parse_bytes(kv_cache_memory)
    elif device.type == "cpu":
        budget = _auto_budget(free_memory(), longest)
    else:
        budget = _gpu_budget(device, gpu_memory_utilization)
    return share_blocks(groups, budget, max_model_len)


def share_blocks(groups: Sequence[GroupNeed], budget: int, max_model_len: int) -> list[int]:
    """Split `budget` bytes so that the groups run out at about the same time.

    A sequence of s blocks holds s of a full group, and of a window's at most h = window / 16 + 2. With
    lengths from one block to the longest, S, every doubling equally likely, a group's mean holding is in
    proportion to

        S - 1                          full attention
        h - 1 + h * ln(S / h)          a window, where h < S

    and a group gets its share of the memory by that, a window's also the blocks of a chunk of a prompt,
    which are held until it is computed. Where the longest sequence would not fit but could, the full groups
    get what it takes first. Raises `ModelError` when some group would have no block.
    """
    longest = -(-max_model_len // BLOCK_SIZE)
    held = [_held(group, max_model_len) for group in groups]
    chunks = [0 if h == longest else min(_CHUNK_BLOCKS, longest - h) for h in held]
    wanted = [h - 1 + h * math.log(longest / h) if longest > 1 else 1.0 for h in held]
    none, full = [0] * len(groups), [longest if h == longest else 0 for h in held]
    wanted_windows = [0.0 if fixed else share for share, fixed in zip(wanted, full, strict=True)]
    ways = [(wanted, chunks), (wanted_windows, _added(chunks, full)), (wanted, none), (wanted_windows, full)]
    for shares, least in ways:
        sizes = _scaled(groups, shares, least, budget)
        if all(n >= h for n, h in zip(sizes, held, strict=True)):
            break
    else:  # not even one
        sizes = [max(0, budget) // sum(group.bytes_a_block for group in groups)] * len(groups)
    sizes = [min(n, _MAX_SEQUENCES * h + more) for n, h, more in zip(sizes, held, chunks, strict=True)]
    if min(sizes) < 1:
        need, have = sum(group.bytes_a_block for group in groups) >> 10, max(0, budget) >> 10
        raise ModelError(
            f"the KV memory of {have} KiB does not hold one block of {BLOCK_SIZE} tokens ({need} KiB)"
        )
    return _filled(groups, sizes, [_MAX_SEQUENCES * h for h in held], budget)


def bytes_of_longest(groups: Sequence[GroupNeed], max_model_len: int) -> int:
    """What one sequence of `max_model_len` tokens holds at once."""
    return _bytes(groups, [_held(group, max_model_len) for group in groups])


def longest_that_fits(groups: Sequence[GroupNeed], budget: int, max_model_len: int) -> int:
    """The longest sequence, in whole blocks, at most `max_model_len`, that `budget` bytes hold; 0: none."""
    low, high = 0, -(-max_model_len // BLOCK_SIZE)
    while low < high:
        middle = (low + high + 1) // 2
        if bytes_of_longest(groups, middle * BLOCK_SIZE) <= budget:
            low = middle
        else:
            high = middle - 1
    return min(low * BLOCK_SIZE, max_model_len)


def _added(first: Sequence[int], second: Sequence[int]) -> list[int]:
    return [one + other for one, other in zip(first, second, strict=True)]


def _bytes(groups: Sequence[GroupNeed], sizes: Sequence[int]) -> int:
    return sum(n * group.bytes_a_block for n, group in zip(sizes, groups, strict=True))


def _filled(groups: Sequence[GroupNeed], sizes: list[int], most: Sequence[int], budget: int) -> list[int]:
    """What rounding and bounds have left over goes to the first groups that may have it."""
    for g, group in enumerate(groups):
        left = (budget - _bytes(groups, sizes)) // group.bytes_a_block
        sizes[g] += max(0, min(left, most[g] - sizes[g]))
    return sizes


def _held(group: GroupNeed, max_model_len: int) -> int:
    """Blocks that the longest sequence holds at once while it decodes: its window's, and one at each end."""
    longest = -(-max_model_len // BLOCK_SIZE)
    return longest if group.window is None else min(longest, -(-group.window // BLOCK_SIZE) + 2)


def _scaled(
    groups: Sequence[GroupNeed], shares: Sequence[float], least: Sequence[int], budget: int
) -> list[int]:
    """Blocks in proportion to `shares`, on top of `least`, in `budget` bytes; none where it is too little."""
    left = budget - _bytes(groups, least)
    if left < 0:
        return [0] * len(groups)
    unit = sum(share * group.bytes_a_block for share, group in zip(shares, groups, strict=True))
    scale = left / unit if unit else 0.0
    return [n + max(0, math.floor(scale * share - 1e-6)) for share, n in zip(shares, least, strict=True)]


def _auto_budget(free: int, sequence_bytes: int) -> int:
    """A quarter of the free memory, at most 4 GiB; up to half of it where one full sequence needs more."""
    return max(min(int(free * _AUTO_SHARE), _AUTO_MAX_BYTES), min(sequence_bytes, free // 2))


def _gpu_budget(device: torch.device, utilization: float) -> int:
    free, total = torch.cuda.mem_get_info(device)
    reserve = min(_GPU_RESERVE_BYTES, total // 10)
    return int(total * utilization) - (total - free) - reserve


def free_memory() -> int:
    """Bytes that this process may still take: the machine's available memory, or its control group's rest."""
    available = 8 << 30  # where the system does not say
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        match = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
        available = int(match[1]) << 10 if match else available
    for limit, usage in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            available = min(available, max(0, int(Path(limit).read_text()) - int(Path(usage).read_text())))
        except (OSError, ValueError):  # no such control group, or "max"
            continue
    return available


def num_physical_cores() -> int:
    """Cores this process may use, counting hyper-threads of one core once; a container's quota counts."""
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores: set[str] = set()
    for cpu in cpus:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text().strip())
        except OSError:
            cores.add(str(cpu))
    count = max(1, len(cores))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = max(1, min(count, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no control group, or "max"
        pass
    return count


_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # from malloc.h


def keep_freed_memory() -> bool:
    """Let glibc reuse what tensors free instead of giving it back; False where the C library is another.

    A step makes the same temporaries again and again. Each one above 128 KiB would be mapped, faulted in
    page by page and unmapped: more time than the arithmetic in it.
    """
    return _set_malloc({_MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: (1 << 31) - 1, _ARENA_MAX: 1})


def return_freed_memory() -> bool:
    """Let glibc give back what tensors free; for loading, where each temporary has another size.

    By default glibc raises the bound of what it maps by itself with every block freed, and then keeps holes.
    """
    return _set_malloc({_MMAP_THRESHOLD: 256 << 10, _TRIM_THRESHOLD: 1 << 20, _ARENA_MAX: 1})


def _set_malloc(options: dict[int, int]) -> bool:
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(set_option(option, value) == 1 for option, value in options.items())
