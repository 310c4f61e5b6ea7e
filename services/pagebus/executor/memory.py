"""How many KV blocks there are, and how many threads. Knows sizes and the machine, no model family."""

import ctypes
import logging
import os
import re
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
_GPU_RESERVE_BYTES = 2 << 30  # activations of a step, the matrix library's workspace


def parse_bytes(text: str) -> int:
    """Bytes of "512MiB", "4GiB", "1.5 GB", "4g" or "1048576". Raises `ModelError`."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ModelError(f"--kv-cache-memory {text!r} is not a size such as 512MiB, 4GiB or auto")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def num_kv_blocks(
    *,
    bytes_a_block: int,
    max_model_len: int,
    device: torch.device,
    kv_cache_memory: str,
    gpu_memory_utilization: float,
) -> int:
    """Blocks of each KV group; `bytes_a_block` is what one block takes in all layers of all groups together.

    Every group gets the same number of blocks. Raises `ModelError` when not even one block fits.
    """
    sequence_blocks = -(-max_model_len // BLOCK_SIZE)
    if kv_cache_memory.strip().lower() != "auto" and device.type == "cpu":
        budget = parse_bytes(kv_cache_memory)
    elif device.type == "cpu":
        budget = _auto_budget(free_memory(), sequence_blocks * bytes_a_block)
    else:
        budget = _gpu_budget(device, gpu_memory_utilization)
    num_blocks = min(budget // bytes_a_block, _MAX_SEQUENCES * sequence_blocks)
    if num_blocks < 1:
        need, have = bytes_a_block >> 10, max(0, budget) >> 10
        raise ModelError(
            f"the KV memory of {have} KiB does not hold one block of {BLOCK_SIZE} tokens ({need} KiB)"
        )
    return num_blocks


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


def keep_freed_memory() -> bool:
    """Let glibc reuse what tensors free instead of giving it back; False where the C library is another.

    A step makes the same temporaries again and again. Each one above 128 KiB would be mapped, faulted in
    page by page and unmapped: more time than the arithmetic in it.
    """
    trim_threshold, mmap_threshold, arena_max = -1, -3, -8  # from malloc.h
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    options = ((mmap_threshold, 32 << 20), (trim_threshold, (1 << 31) - 1), (arena_max, 1))
    return all(set_option(option, value) == 1 for option, value in options)
