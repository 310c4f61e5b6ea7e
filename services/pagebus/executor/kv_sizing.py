"""How many blocks of keys and values a loaded model gets: on a GPU after a run of its largest step.

Knows settings and runners; what memory means is `memory.py`'s and `gpu_memory.py`'s.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from pagebus.executor.batch import RowInput, RowOutput
from pagebus.executor.errors import ModelError
from pagebus.executor.gpu_memory import CudaMemory, DeviceMemory, budget_for_kv, check_context
from pagebus.executor.kv_cache import needs_of
from pagebus.executor.largest_step import blocks_for, largest_step, lengths_of
from pagebus.executor.loader import LoadedModel
from pagebus.executor.memory import blocks_of_groups, share_blocks
from pagebus.settings.structs import ExecutorSettings


class TriedRunner(Protocol):
    """A runner that is made for one step and goes again."""

    def step(self, rows: Sequence[RowInput]) -> list[RowOutput]:
        """As `Runner.step`."""

    def close(self) -> None:
        """Let go of the model and the pages."""


MakeRunner = Callable[[Sequence[int]], TriedRunner]
"""A runner of the model with so many blocks in each KV group, without anything that is captured ahead."""


def num_blocks_of(loaded: LoadedModel, settings: ExecutorSettings, make: MakeRunner) -> list[int]:
    """Blocks of each KV group, by the memory that the settings allow. Raises `ModelError`."""
    if loaded.device.type == "cuda":
        return num_blocks_on_gpu(loaded, settings, make, CudaMemory(loaded.device))
    return blocks_of_groups(
        needs_of(loaded.specs, loaded.page_dtype),
        max_model_len=loaded.max_model_len,
        device=loaded.device,
        kv_cache_memory=settings.kv_cache_memory,
        gpu_memory_utilization=settings.gpu_memory_utilization,
    )


def num_blocks_on_gpu(
    loaded: LoadedModel, settings: ExecutorSettings, make: MakeRunner, memory: DeviceMemory
) -> list[int]:
    """The same by a real step of `max_num_batched_tokens` tokens and `max_num_seqs` rows of logits."""
    needs = needs_of(loaded.specs, loaded.page_dtype)

    def run_step(num_tokens: int) -> None:
        lengths = lengths_of(num_tokens, settings.max_num_seqs, loaded.max_model_len)
        runner = make([blocks_for(lengths)] * len(needs))
        try:
            outputs = runner.step(largest_step(lengths, len(needs), loaded.vocab_size))
        finally:
            runner.close()
        errors = [output.error for output in outputs if output.error is not None]
        if errors:
            raise ModelError(f"the largest step does not run: {errors[0]}")

    budget = budget_for_kv(
        memory,
        run_step,
        num_tokens=settings.max_num_batched_tokens,
        utilization=settings.gpu_memory_utilization,
    )
    check_context(needs, budget, loaded.max_model_len, is_asked=settings.max_model_len > 0)
    return share_blocks(needs, budget, loaded.max_model_len)
