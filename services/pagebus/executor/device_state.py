"""Tensors that decoding steps work on, always the same, and the one copy that changes them. Knows no rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pagebus.executor.device import Device
from pagebus.executor.device_batch import Changes, Parts
from pagebus.kernels import triton_steps as steps
from pagebus.kernels.triton_steps import Layout, StepBuffers


@dataclass(frozen=True, slots=True)
class DeviceState:
    """Tensors that decoding steps work on, always the same."""

    words: torch.Tensor  # [layout.size], int64: see `triton_steps.py`
    buffers: StepBuffers
    results: torch.Tensor  # [rows, RESULTS], float64
    cu_seqlens: torch.Tensor  # [rows + 1], int64: 0, 1, 2, ...
    cu_seqlens_32: torch.Tensor  # the same, int32
    ones: torch.Tensor  # [rows], int64

    @staticmethod
    def make(layout: Layout, paddings: Sequence[int], device: torch.device) -> "DeviceState":
        """With nothing but padding; `paddings[g]`: the block of group g that is no row's."""
        num_rows = layout.num_rows
        state = torch.zeros(layout.size, dtype=torch.int64, device=device)
        for group, block in enumerate(paddings):
            state[layout.table(group, 0) : layout.table(group, layout.num_slots) + layout.width] = block
        state[layout.order :] = layout.num_slots
        buffers = StepBuffers.make(num_rows, num_rows, layout, device)
        cu_seqlens = torch.arange(num_rows + 1, device=device)
        return DeviceState(
            words=state,
            buffers=buffers,
            results=torch.zeros(num_rows, steps.RESULTS, dtype=torch.float64, device=device),
            cu_seqlens=cu_seqlens,
            cu_seqlens_32=cu_seqlens.int(),
            ones=torch.ones(num_rows, dtype=torch.int64, device=device),
        )

    def change(self, changes: Changes, parts: Parts, device: Device) -> torch.Tensor | None:
        """Send all that a step needs in one copy, and change what is to be changed. None: there was nothing.

        What is given are the words of `parts`, where its slices lie.
        """
        num = len(changes)
        if num:
            addresses, values = changes.packed()
            at_addresses, at_values = parts.add(addresses), parts.add(values)
        joined = parts.joined()
        if not len(joined):
            return None
        words = device.upload(joined)
        if num:
            self.words.index_copy_(0, words[at_addresses], words[at_values])
        return words
