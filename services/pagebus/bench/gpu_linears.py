"""A model's linears for few rows: the library's product beside ours, and what an executor would choose.

Each size of linear runs over as many weights as a layer's cache does not hold. Knows shapes, no layers and no
bus.
"""

from collections.abc import Iterator

import torch
from torch import nn

from pagebus.bench.gpu_parts import Task
from pagebus.bench.gpu_results import Measured
from pagebus.bench.gpu_shapes import linears_of


def linears(task: Task) -> Iterator[Measured]:
    """Microseconds of all linears of a step, by each number of rows, as chosen; the library's in the note."""
    from pagebus.executor.device import CudaDevice
    from pagebus.executor.fusing import FusedGated
    from pagebus.executor.gpu_few_rows import CACHE_BYTES, ROWS, compare

    device = CudaDevice(torch.device(task.device))
    library, chosen, num_bytes = dict.fromkeys(ROWS, 0.0), dict.fromkeys(ROWS, 0.0), 0
    notes: dict[int, list[str]] = {num_rows: [] for num_rows in ROWS}
    with torch.inference_mode():
        for size in linears_of(task.part.shape):
            num_weights = -(-CACHE_BYTES // (2 * size.num_in * size.num_out))
            options = {"bias": False, "device": device.device, "dtype": torch.bfloat16}
            wide = [
                nn.Linear(size.num_in, size.num_out, **options).requires_grad_(False)  # type: ignore[arg-type]
                for _ in range(num_weights)
            ]
            modules: list[FusedGated | nn.Linear] = [*wide]
            if size.is_gated:
                modules = [FusedGated(one, nn.Identity(), "silu") for one in wide]
            for found in compare(device, modules):
                scale = size.times / num_weights
                library[found.num_rows] += found.library_s * scale
                chosen[found.num_rows] += found.least_s * scale
                cut = "library" if found.config is None else f"{found.config.block_n}x{found.config.block_k}"
                gain = found.library_s / found.least_s
                notes[found.num_rows].append(f"{size.num_in}>{size.num_out} {cut} {gain:.2f}x")
            num_bytes += 2 * size.num_in * size.num_out * size.times
    for num_rows in ROWS:
        yield Measured(
            name=f"{task.part.shape}, linears of a step, {num_rows} rows",
            value=chosen[num_rows] * 1e6, unit="us", floor=num_bytes / task.bytes_per_s * 1e6,
            note=f"the library's alone {library[num_rows] * 1e6:.0f}; " + ", ".join(notes[num_rows]),
        )  # fmt: skip
