"""A model with its pages: prepare, forward, sample. Knows rows and tables, no plan, no text and no bus."""

import pagebus.executor.openmp  # noqa: F401  # isort: skip  (before torch)

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

from pagebus.bus.messages import Logprobs, PoolGroup
from pagebus.executor.attention import AttentionCall, FusedCall, answering
from pagebus.executor.batch import BlockCopy, RowInput, RowOutput
from pagebus.executor.cpu_cache import CpuCache, can_hold, why_no_bytes
from pagebus.executor.cpu_program import find_program
from pagebus.executor.cpu_run import CpuProgram
from pagebus.executor.errors import BrokenModelError, ModelError
from pagebus.executor.gpu_memory import CudaMemory, share_of
from pagebus.executor.kv_cache import Cache, has_peaks
from pagebus.executor.kv_sizing import num_blocks_of
from pagebus.executor.linears import padded_size
from pagebus.executor.loader import LoadedModel, load_model
from pagebus.executor.logits_processors import flaw_of
from pagebus.executor.logprobs import describe, describe_each, joined
from pagebus.executor.memory import keep_freed_memory, num_physical_cores
from pagebus.executor.pulse import Pulse
from pagebus.executor.sampling import sample
from pagebus.executor.scan import Scan, scan
from pagebus.executor.torch_cache import PagedCache
from pagebus.kernels.cpu_library import library_for
from pagebus.kernels.kv_write import BLOCK_SIZE
from pagebus.kernels.paged_attention import RowSpan
from pagebus.settings.structs import ExecutorSettings

_log = logging.getLogger(__name__)

_HEAD_BYTES = 64 << 20  # of float32 logits of prompt positions at once


@dataclass(frozen=True, slots=True)
class _Batch:
    """The good rows of a step in the order of the flat batch: rows of one token first."""

    rows: list[int]  # index among the step's rows
    ids: torch.Tensor  # [1, padded tokens]
    positions: torch.Tensor  # [1, padded tokens]
    last: list[int]  # flat index of each row's last token
    spans: list[list[RowSpan]]  # by KV group, then row
    is_kept: bool  # more logits than those of `last` may be asked for


class ModelRunner:
    """Runs steps of a loaded model on pages of its own."""

    def __init__(self, loaded: LoadedModel, num_blocks: Sequence[int]) -> None:
        self._loaded = loaded
        self._device = loaded.device
        self.pulse = Pulse()
        self._cache = make_cache(loaded, num_blocks, self.pulse)
        self._is_finite = torch.empty(0, dtype=torch.bool)
        self._hidden: object = None  # the body's output in this step
        base = loaded.model.base_model
        if base is loaded.model:
            raise ModelError(f"{loaded.model.config.model_type} has no model below its head")
        self._hook = base.register_forward_hook(self._note_finite)
        self._program: CpuProgram | None = None  # runs the layers instead of the model's modules
        self._normed = torch.empty(0)  # of the program, in this step
        if isinstance(self._cache, CpuCache):
            self._program = find_program(
                loaded.model, loaded.specs, self._cache, loaded.vocab_size, loaded.max_model_len
            )

    def close(self) -> None:
        """Let go of the model, which lives on; the pages go when nobody holds this any more."""
        self._hook.remove()

    @property
    def pool(self) -> tuple[PoolGroup, ...]:
        return self._cache.pool

    @property
    def max_model_len(self) -> int:
        return self._loaded.max_model_len

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Copy whole blocks, in order, before the next step. Raises `ValueError` for a block that is none."""
        self._cache.copy(copies)

    @torch.inference_mode()
    def step(self, rows: Sequence[RowInput]) -> list[RowOutput]:
        """Write the rows' KV, attend, and sample: one output a row, in order. A bad row fails alone."""
        outputs = [RowOutput(error=self._flaw(row)) for row in rows]
        good = [i for i, output in enumerate(outputs) if output.error is None]
        if not good:
            return outputs
        try:
            self._compute(rows, good, outputs)
        except torch.AcceleratorError as error:  # the device's context is lost: all that follows fails too
            raise BrokenModelError(f"{type(error).__name__}: {error}") from error
        finally:
            self._hidden = None
        return outputs

    def _compute(self, rows: Sequence[RowInput], good: list[int], outputs: list[RowOutput]) -> None:
        """The three beats, for the rows `good`."""
        batch = self._prepare(rows, good)
        sampled = [n for n, i in enumerate(batch.rows) if rows[i].is_sampled]
        logits = self._forward(batch, [batch.last[n] for n in sampled])
        self.pulse.beat()
        self._fail_broken(rows, batch, outputs)
        for i, last in zip(batch.rows, batch.last, strict=True):
            if rows[i].sampling.num_prompt_logprobs is not None and outputs[i].error is None:
                self._tell_prompt(rows[i], batch, last + 1 - len(rows[i].ids), outputs[i])
        self._sample(rows, [batch.rows[n] for n in sampled], logits, outputs)

    def logits(self, rows: Sequence[RowInput]) -> torch.Tensor:
        """As `step`, but the logits after each row's last id, [rows, vocabulary]. Raises on a bad row."""
        flaws = [flaw for row in rows if (flaw := self._flaw(row)) is not None]
        if flaws:
            raise ValueError(flaws[0])
        with torch.inference_mode():
            batch = self._prepare(rows, list(range(len(rows))))
            found = self._forward(batch, batch.last)
        return found[torch.tensor(batch.rows, device=self._device).argsort()]

    def _flaw(self, row: RowInput) -> str | None:
        """What keeps this row from being computed, or None."""
        num_tokens = len(row.ids)
        if num_tokens == 0:
            return "the row has no ids"
        if min(row.ids) < 0 or max(row.ids) >= self._loaded.vocab_size:
            return f"an id lies outside the vocabulary of {self._loaded.vocab_size}"
        end = row.start + num_tokens
        if row.start < 0 or end > self.max_model_len:
            return f"position {end - 1} lies beyond the context of {self.max_model_len}"
        if len(row.tables) != len(self._cache.windows):
            return f"{len(row.tables)} block tables for {len(self._cache.windows)} KV groups"
        first, last = row.start // BLOCK_SIZE, (end - 1) // BLOCK_SIZE
        for group, (table, window) in enumerate(zip(row.tables, self._cache.windows, strict=True)):
            needed = first if window is None else max(0, row.start - window + 1) // BLOCK_SIZE
            seen = table[0 if window is None else needed : last + 1]
            if len(table) <= last or min(seen) < 0 or max(seen) >= self._cache.num_blocks[group]:
                return f"the block table does not cover positions up to {end - 1}"
        if row.sampling.num_prompt_logprobs is not None and len(row.history) < min(end + 1, row.num_prompt):
            return f"{len(row.history)} of the prompt's {row.num_prompt} ids came where all are needed"
        return flaw_of(row.sampling)

    def _prepare(self, rows: Sequence[RowInput], good: list[int]) -> _Batch:
        """Beat one: flat ids and positions, and where everything lies."""
        order = sorted(good, key=lambda i: len(rows[i].ids) > 1)
        counts = [len(rows[i].ids) for i in order]
        ends = np.cumsum(counts)
        num_tokens = int(ends[-1])
        padded = padded_size(num_tokens) if self._device.type == "cpu" else num_tokens
        ids = np.zeros(padded, dtype=np.int64)
        positions = np.zeros(padded, dtype=np.int64)
        spans: list[list[RowSpan]] = [[] for _ in self._cache.windows]
        for i, count, end in zip(order, counts, ends.tolist(), strict=True):
            row = rows[i]
            ids[end - count : end] = row.ids
            positions[end - count : end] = np.arange(row.start, row.start + count)
            for group, table in enumerate(row.tables):
                span = RowSpan(end - count, count, row.start, np.asarray(table, dtype=np.int64))
                spans[group].append(span)
        return _Batch(
            rows=order,
            ids=torch.from_numpy(ids).to(self._device)[None],
            positions=torch.from_numpy(positions).to(self._device)[None],
            last=(ends - 1).tolist(),
            spans=spans,
            is_kept=any(rows[i].sampling.num_prompt_logprobs is not None for i in order),
        )

    def _forward(self, batch: _Batch, wanted: list[int]) -> torch.Tensor:
        """Beat two: the logits after the flat tokens `wanted`, float [len(wanted), vocabulary]."""
        if self._program is not None:
            num = batch.last[-1] + 1
            ids, positions = batch.ids[0, :num].numpy(), batch.positions[0, :num].numpy()
            self._normed, self._is_finite = self._program.run(
                ids, positions, batch.spans, self.pulse.beat, None if batch.is_kept else wanted
            )
            return self._program.logits(self._normed[wanted] if batch.is_kept else self._normed)
        answer = self._cache.answer(batch.spans, batch.ids.shape[1])

        def attend(call: AttentionCall | FusedCall) -> torch.Tensor:
            self.pulse.beat()  # a layer begins: the one before it is computed, or at least launched
            return answer(call)

        with answering(attend):
            return self._call(batch, wanted)

    def _call(self, batch: _Batch, wanted: list[int]) -> torch.Tensor:
        # The head computes few rows, and as many as kernels exist for: padded like the tokens.
        keep = wanted + [0] * (padded_size(len(wanted)) - len(wanted))
        out = self._loaded.model(
            input_ids=batch.ids,
            position_ids=batch.positions,
            use_cache=False,
            logits_to_keep=torch.tensor(keep, device=self._device),
        )
        logits: torch.Tensor = out.logits
        return logits[0, : len(wanted)]

    def _more_logits(self, batch: _Batch, wanted: list[int]) -> torch.Tensor:
        """As `_forward`, of tokens of the same step: the head alone, over what the body gave."""
        if self._program is not None:
            return self._program.logits(self._normed[wanted])
        model = self._loaded.model
        name, body = model.base_model_prefix, model.base_model
        setattr(model, name, _Given(self._hidden))
        try:
            return self._call(batch, wanted)
        finally:
            setattr(model, name, body)

    def _note_finite(self, _module: nn.Module, _inputs: object, output: object) -> None:
        """After the model's body: which tokens' hidden states are finite."""
        hidden = output[0] if isinstance(output, tuple) else output.last_hidden_state  # type: ignore[attr-defined]
        self._is_finite = torch.isfinite(hidden[0].sum(-1))
        self._hidden = output

    def _fail_broken(self, rows: Sequence[RowInput], batch: _Batch, outputs: list[RowOutput]) -> None:
        """Rows with NaN or infinity fail, and their blocks are cleared before anyone else gets them."""
        is_finite = self._is_finite.tolist()
        if all(is_finite):
            return
        for i, last in zip(batch.rows, batch.last, strict=True):
            first = last + 1 - len(rows[i].ids)
            if not all(is_finite[first : last + 1]):
                outputs[i].error = "the model made values that are not finite"
                self._clear(rows[i])

    def _clear(self, row: RowInput) -> None:
        """Zero the blocks that this step wrote; those before them may be shared, and are finite."""
        first = row.start // BLOCK_SIZE
        self._cache.clear([list(table[first:]) for table in row.tables])

    def _tell_prompt(self, row: RowInput, batch: _Batch, first: int, output: RowOutput) -> None:
        """Log-probabilities of the prompt's ids after the row's positions; `first`: its first flat token."""
        ids = list(row.history[row.start + 1 : min(row.start + len(row.ids) + 1, row.num_prompt)])
        told: list[Logprobs] = []
        for at in range(0, len(ids), self._num_at_once):
            some = ids[at : at + self._num_at_once]
            self.pulse.beat()
            tokens = range(first + at, first + at + len(some))
            scanned = scan(self._more_logits(batch, list(tokens)).float())
            if min(some) < 0 or max(some) >= scanned.vocabulary:
                output.error = f"an id lies outside the {scanned.vocabulary} that the model can make"
            elif not bool(torch.isfinite(scanned.tops).all()):
                output.error = "the model made logits that are not finite"
            else:
                told.append(describe(scanned, some, row.sampling.num_prompt_logprobs or 0))
        if told and output.error is None:
            output.prompt_logprobs = joined(told)

    @property
    def _num_at_once(self) -> int:
        """Prompt positions whose logits are computed at once; the sizes of `padded_size` are such."""
        num = _HEAD_BYTES // (4 * self._loaded.vocab_size)
        return max(2, num // 64 * 64 if num >= 64 else num // 8 * 8)

    def _sample(
        self, rows: Sequence[RowInput], sampled: list[int], logits: torch.Tensor, outputs: list[RowOutput]
    ) -> None:
        """Beat three: one id for each of the rows `sampled`, whose logits stand in that order."""
        good = [n for n, i in enumerate(sampled) if outputs[i].error is None]
        if not good:
            return
        scanned = scan(logits.float()).some(good)
        sampled = [sampled[n] for n in good]
        made = sample(scanned, [rows[i] for i in sampled])
        for n, i in enumerate(sampled):
            if n in made.flaws:
                outputs[i].error = made.flaws[n]
            else:
                outputs[i].id = made.ids[n]
        _tell(scanned, [rows[i] for i in sampled], [outputs[i] for i in sampled])


def make_cache(loaded: LoadedModel, num_blocks: Sequence[int], pulse: Pulse) -> Cache:
    """The model's pages, of `num_blocks` in each KV group, as its device attends to them best.

    `pulse` is told while a kernel is compiled at its first launch.
    """
    if loaded.device.type == "cuda":
        from pagebus.kernels.jit import HAS_TRITON, on_compiling  # slow to import, and a CPU does without

        if HAS_TRITON:
            from pagebus.executor.triton_cache import TritonCache

            on_compiling(pulse.tell_compiling)
            return TritonCache(
                loaded.specs,
                num_blocks,
                loaded.page_dtype,
                loaded.device,
                is_batch_invariant=loaded.is_batch_invariant,
            )
    library = library_for(loaded.dtype) if loaded.device.type == "cpu" and can_hold(loaded.specs) else None
    if library is not None:
        return CpuCache(loaded.specs, num_blocks, library, loaded.page_dtype)
    if has_peaks(loaded.page_dtype):
        raise ModelError(why_no_bytes(loaded.specs, loaded.page_dtype, loaded.device))
    return PagedCache(loaded.specs, num_blocks, loaded.dtype, loaded.device)


class _Given(nn.Module):
    """Stands in for a model's body, with an output that it gave."""

    def __init__(self, output: object) -> None:
        super().__init__()
        self._output = output

    def forward(self, *_: object, **__: object) -> object:
        return self._output


def _tell(scanned: Scan, rows: Sequence[RowInput], outputs: Sequence[RowOutput]) -> None:
    """The log-probabilities of ids that were made, where rows ask for them."""
    places, ids, nums_top = [], [], []
    for n, (row, output) in enumerate(zip(rows, outputs, strict=True)):
        if row.sampling.num_logprobs is not None and output.id is not None:
            places.append(n)
            ids.append(output.id)
            nums_top.append(row.sampling.num_logprobs)
    if places:
        told = describe_each(scanned.some(places), ids, nums_top)
        for n, of_row in zip(places, told, strict=True):
            outputs[n].logprobs = of_row


def build_runner(settings: ExecutorSettings, path: Path) -> ModelRunner:
    """The model in `path` on the device that the settings name, with as many blocks as memory allows.

    Sets torch's threads. Raises `ModelError`.
    """
    device = _choose_device(settings)
    if device == "cpu":
        _refuse_on_cpu(settings)
        torch.set_num_threads(settings.num_threads or num_physical_cores())
    loaded = load_model(
        path,
        dtype=settings.dtype,
        device=device,
        load_format=settings.load_format,
        seed=settings.seed,
        max_model_len=settings.max_model_len,
        kv_cache_dtype=settings.kv_cache_dtype,
        quantization=settings.quantization,
        is_batch_invariant=settings.batch_invariant,
        room=share_of(CudaMemory(torch.device(device)), settings.gpu_memory_utilization).left
        if device == "cuda"
        else None,
    )
    if device == "cpu":
        keep_freed_memory()  # from now on; loading gives back what it frees
    most = settings.max_num_seqs
    num_blocks = num_blocks_of(
        loaded, settings, lambda sizes: on_device(loaded, sizes, max_rows=most, is_eager=True)
    )
    return on_device(loaded, num_blocks, max_rows=settings.max_num_seqs, is_eager=settings.enforce_eager)


def on_device(
    loaded: LoadedModel, num_blocks: Sequence[int], *, max_rows: int, is_eager: bool = False
) -> ModelRunner:
    """The runner that the model's device runs best with: on CUDA one whose rows' state stays there."""
    if loaded.device.type == "cuda":
        from pagebus.kernels.jit import HAS_TRITON

        if HAS_TRITON:
            from pagebus.executor.device import CudaDevice
            from pagebus.executor.device_runner import DeviceRunner

            device = CudaDevice(loaded.device)
            return DeviceRunner(loaded, num_blocks, device, max_rows=max_rows, is_eager=is_eager)
    return ModelRunner(loaded, num_blocks)


def _refuse_on_cpu(settings: ExecutorSettings) -> None:
    """Say what only a GPU can do before anything is loaded."""
    if settings.quantization != "none":
        raise ModelError(f"--quantization {settings.quantization} needs a CUDA device")


def _choose_device(settings: ExecutorSettings) -> Literal["cpu", "cuda"]:
    if settings.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ModelError("--device cuda: this machine has no CUDA device that torch can use")
    return settings.device
