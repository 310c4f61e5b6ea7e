"""A model on an accelerator with a queue of its own: steps are launched ahead, rows' state stays there.

```
launch    what differs ─▶ a copy ─▶ [inputs from the state ─▶ model ─▶ ids ─▶ state, results] ─▶ a copy
collect   wait for that copy, read the results
```

What stands in brackets is one CUDA graph where every row decodes, and launched kernel by kernel else. Knows
rows and tables, no plan, no text and no bus.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from pagebus.executor.attention import AttentionCall, FusedCall, answering
from pagebus.executor.batch import RowInput, RowOutput
from pagebus.executor.decode_graphs import DecodeGraphs, ladder
from pagebus.executor.device import Device, Mark
from pagebus.executor.device_batch import Changes, DeviceBatch, Parts
from pagebus.executor.device_sampling import (
    Chosen,
    Told,
    choose,
    extras_of,
    launch_extras,
    logprobs_of,
)
from pagebus.executor.device_state import DeviceState
from pagebus.executor.errors import BrokenModelError, ModelError
from pagebus.executor.gpu_few_rows import tune
from pagebus.executor.loader import LoadedModel
from pagebus.executor.model_runner import ModelRunner, _Batch
from pagebus.executor.triton_cache import GroupStep, TritonCache
from pagebus.kernels import triton_steps as steps
from pagebus.kernels.kv_write import BLOCK_SIZE
from pagebus.kernels.triton_steps import (
    Layout,
    StepBuffers,
    triton_finish,
    triton_keep,
    triton_prepare,
)

_NOT_FINITE = "the model made logits that are not finite"
_NOT_FINITE_CHANGED = "penalties or logit_bias made logits that are not finite"
_NONE_LEFT = "no id of the vocabulary is left to choose from"


@dataclass(slots=True)
class _Launched:
    """A step on its way. `good[n]` is the row, of all of the step's, that stands at place n."""

    rows: Sequence[RowInput]
    outputs: list[RowOutput]
    good: list[int]
    results: torch.Tensor | None = None  # [good rows, RESULTS], float64, on the host once `mark` is reached
    mark: Mark | None = None
    changed: Sequence[int] = ()
    told: Told | None = None
    hidden: object = None  # the body's output, where prompts' log-probabilities are asked for
    inputs: StepBuffers | None = None
    firsts: Sequence[int] = ()  # flat number of each good row's first token


class DeviceRunner(ModelRunner):
    """A `PipelinedRunner` for models whose pages are Triton's."""

    is_pipelined = True

    def __init__(
        self,
        loaded: LoadedModel,
        num_blocks: Sequence[int],
        device: Device,
        *,
        max_rows: int,
        is_eager: bool = False,
    ) -> None:
        """`max_rows` of a step. Not `is_eager`: decoding steps are captured now, which takes a while."""
        super().__init__(loaded, num_blocks)
        if not isinstance(self._cache, TritonCache):
            raise ModelError("a pipelined runner needs Triton's pages")
        self._pages: TritonCache = self._cache
        self._queue = device
        most = ladder(max_rows)[-1]
        width = -(-loaded.max_model_len // BLOCK_SIZE)
        self._layout = Layout(
            num_slots=2 * most,
            num_groups=len(self._pages.windows),
            width=-(-width // 16) * 16,
            num_rows=most,
        )
        self._static = DeviceState.make(self._layout, self._pages.num_blocks, device.device)
        self._batch = DeviceBatch(self._layout)
        self._sums = torch.empty(0)  # of the hidden states, [tokens]
        self._kept: torch.Tensor | None = None  # logits of rows that want more, [rows, vocabulary]
        self._graphs = DecodeGraphs(
            device, lambda size: partial(self._decode, size), max_rows, beat=self.pulse.beat
        )
        with torch.inference_mode():
            if is_eager:
                self._decode(1)  # what is made once: rotary tables, the size of logits
                return
            self.pulse.begin()
            if not loaded.is_batch_invariant:
                tune(loaded.model, device, self.pulse.beat)
            self._decode(1)
            self._graphs.capture()
            self.pulse.end()

    @property
    def num_graphs(self) -> int:
        """Batch sizes that decode as one launch."""
        return self._graphs.num_captured

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._device

    def replay(self, num_rows: int, times: int) -> None:
        """For benchmarks: the last decoding step, of `num_rows` rows, goes on with nothing in between.

        Its rows' positions move on without anybody knowing: each is new to the next launch.
        """
        size = self._graphs.size_for(num_rows)
        with torch.inference_mode():
            for _ in range(times):
                self._graphs.run(size)
        self._batch.forget()

    def step(self, rows: Sequence[RowInput]) -> list[RowOutput]:
        """Launch and collect."""
        return self.collect(self.launch(rows))

    # -- launch ------------------------------------------------------------------------------------------

    def launch(self, rows: Sequence[RowInput]) -> object:
        """Start a step; nothing here waits for the device."""
        outputs = [RowOutput(error=self._flaw_now(row)) for row in rows]
        launched = _Launched(rows, outputs, [i for i, output in enumerate(outputs) if output.error is None])
        try:
            with torch.inference_mode():
                self._launch(launched)
        except torch.AcceleratorError as error:  # the device's context is lost: all that follows fails too
            raise BrokenModelError(f"{type(error).__name__}: {error}") from error
        except BaseException:
            self._batch.forget()
            raise
        finally:
            self._hidden = None
        return launched

    def _flaw_now(self, row: RowInput) -> str | None:
        if row.follows is None:
            return self._flaw(row)
        if self._batch.is_known(row):
            return None if row.start < self.max_model_len else self._flaw(row)
        return self._flaw(row) if self._batch.can_follow(row) else "the row that it follows made no id"

    def _launch(self, launched: _Launched) -> None:
        rows = [launched.rows[i] for i in launched.good]
        changes = Changes()
        slots = self._batch.place(rows, launched.good, len(launched.rows), changes)
        if not rows:
            return
        parts = Parts()
        if self._kept is None:
            raise RuntimeError("no logits were ever made")
        extras = extras_of(rows, slots, self._kept.shape[1], parts)
        if all(_is_decode(row) for row in rows):
            logits, buffers, results, words = self._launch_decode(slots, changes, parts)
        else:
            logits, buffers, results, words = self._launch_mixed(rows, slots, changes, parts)
            launched.hidden = self._hidden if any(_tells_prompt(row) for row in rows) else None
            launched.inputs = buffers
            launched.firsts = np.cumsum([0, *(len(row.ids) for row in rows)]).tolist()
        self._batch.advance(rows)
        if extras is not None and words is not None:
            launched.told = launch_extras(
                extras, words, logits, buffers, results, self._static.words, self._queue
            )
            launched.changed = extras.changed
        launched.results = self._queue.fetch(results)
        launched.mark = self._queue.mark()

    def _launch_decode(
        self, slots: Sequence[int], changes: Changes, parts: Parts
    ) -> tuple[torch.Tensor, StepBuffers, torch.Tensor, torch.Tensor | None]:
        """Rows of one token, in the order of `slots`."""
        size = self._graphs.size_for(len(slots))
        self._batch.arrange(slots, size, changes)
        words = self._static.change(changes, parts, self._queue)
        self._graphs.run(size)
        if self._kept is None:
            raise RuntimeError("no logits were ever made")
        return self._kept, self._static.buffers, self._static.results[: len(slots)], words

    def _launch_mixed(
        self, rows: Sequence[RowInput], slots: Sequence[int], changes: Changes, parts: Parts
    ) -> tuple[torch.Tensor, StepBuffers, torch.Tensor, torch.Tensor]:
        """Rows of any number of tokens."""
        counts = [len(row.ids) for row in rows]
        at_order = parts.add(slots)
        at_cu = parts.add(np.cumsum([0, *counts]))
        at_sampled = parts.add([row.is_sampled for row in rows])
        at_ids = parts.add(np.concatenate([np.asarray(row.ids, np.int64) for row in rows]))
        at_row = parts.add(np.repeat(np.arange(len(rows)), counts))
        words = self._static.change(changes, parts, self._queue)
        if words is None:
            raise RuntimeError("a step without words")
        order, cu_seqlens = words[at_order], words[at_cu]
        buffers = StepBuffers.make(len(rows), sum(counts), self._layout, self._device)
        triton_prepare(
            self._static.words, self._layout, order, cu_seqlens, words[at_ids], buffers, BLOCK_SIZE
        )
        tokens = torch.arange(sum(counts), device=self._device)
        logits = self._run_model(buffers, tokens, cu_seqlens.int(), cu_seqlens[1:] - 1)
        chosen = choose(logits, buffers)
        sums = torch.zeros(len(rows), device=self._device).index_add_(0, words[at_row], self._sums)
        results = torch.empty(len(rows), steps.RESULTS, dtype=torch.float64, device=self._device)
        self._finish(order, cu_seqlens, words[at_sampled], chosen, sums, results)
        return logits, buffers, results, words

    def _decode(self, num_rows: int) -> None:
        """What a graph holds: a step of the first `num_rows` rows of the state's order."""
        static = self._static
        buffers = static.buffers.first(num_rows)
        order = static.words[self._layout.order :][:num_rows]
        cu_seqlens = static.cu_seqlens[: num_rows + 1]
        triton_prepare(static.words, self._layout, order, cu_seqlens, None, buffers, BLOCK_SIZE)
        is_uncut = self._loaded.is_batch_invariant
        cuts = static.cu_seqlens_32[: num_rows + 1] if is_uncut else None
        logits = self._run_model(buffers, static.cu_seqlens[:num_rows], cuts, 0)
        if self._kept is None:
            self._kept = logits.new_empty(self._layout.num_rows, logits.shape[1])
        triton_keep(static.words, order, logits, self._kept)
        chosen = choose(logits, buffers)
        self._finish(order, cu_seqlens, static.ones[:num_rows], chosen, self._sums, static.results[:num_rows])

    def _finish(
        self,
        order: torch.Tensor,
        cu_seqlens: torch.Tensor,
        is_sampled: torch.Tensor,
        chosen: Chosen,
        sums: torch.Tensor,
        results: torch.Tensor,
    ) -> None:
        triton_finish(
            self._static.words, self._layout, order, cu_seqlens, is_sampled, chosen.ids, chosen.tops, sums,
            results,
        )  # fmt: skip

    def _run_model(
        self,
        buffers: StepBuffers,
        tokens: torch.Tensor,  # 0, 1, 2, ...
        cu_seqlens: torch.Tensor | None,
        keep: torch.Tensor | int,
    ) -> torch.Tensor:
        """Logits [rows, vocabulary] after the flat tokens `keep`; 0: after all of them."""
        groups = [
            GroupStep(
                slots=buffers.slots[group],
                blocks=buffers.blocks[group],
                places=buffers.places[group],
                tokens=tokens,
                tables=buffers.tables[group],
                contexts=buffers.contexts,
                cu_seqlens=cu_seqlens,
            )
            for group in range(self._layout.num_groups)
        ]

        def attend(call: AttentionCall | FusedCall) -> torch.Tensor:
            self.pulse.beat()
            return self._pages.attend(call, groups)

        with answering(attend):
            out = self._loaded.model(
                input_ids=buffers.ids[None],
                position_ids=buffers.positions[None],
                use_cache=False,
                logits_to_keep=keep,
            )
        logits: torch.Tensor = out.logits
        return logits[0]

    def _note_finite(self, _module: nn.Module, _inputs: object, output: object) -> None:
        """After the model's body: sums of hidden states, which are finite where these are."""
        hidden = output[0] if isinstance(output, tuple) else output.last_hidden_state  # type: ignore[attr-defined]
        self._sums = hidden[0].sum(-1, dtype=torch.float32)
        self._hidden = output

    # -- collect -----------------------------------------------------------------------------------------

    def collect(self, launched: object) -> list[RowOutput]:
        """Wait for the step: one output a row, in order."""
        if not isinstance(launched, _Launched):
            raise TypeError(f"{type(launched).__name__} is no launched step")
        if launched.mark is None or launched.results is None:
            return launched.outputs
        try:
            with torch.inference_mode():
                launched.mark.wait()
                self._read(launched, launched.results.numpy())
        except torch.AcceleratorError as error:
            raise BrokenModelError(f"{type(error).__name__}: {error}") from error
        return launched.outputs

    def _read(
        self, launched: _Launched, results: "np.ndarray[tuple[int, ...], np.dtype[np.float64]]"
    ) -> None:
        changed = set(launched.changed)
        for n, (i, (id, top, total, again)) in enumerate(zip(launched.good, results.tolist(), strict=True)):
            row, output = launched.rows[i], launched.outputs[i]
            if not math.isfinite(total):
                output.error = "the model made values that are not finite"
                self._clear(row)
                continue
            if row.is_sampled:
                output.error = _flaw_of_top(top, _NOT_FINITE)
                if output.error is None and n in changed:
                    output.error = _flaw_of_top(again, _NOT_FINITE_CHANGED)
                output.id = int(id) if output.error is None else None
            if launched.hidden is not None and _tells_prompt(row) and launched.inputs is not None:
                self._tell_prompt_of(launched, launched.inputs, n, row, output)
        if launched.told is not None:
            for n, logprobs in logprobs_of(launched.told).items():
                output = launched.outputs[launched.good[n]]
                if output.error is None:
                    output.logprobs = logprobs

    def _tell_prompt_of(
        self, launched: _Launched, inputs: StepBuffers, n: int, row: RowInput, output: RowOutput
    ) -> None:
        """The slow way, from the hidden states that were kept."""
        self._hidden = launched.hidden
        ids, positions = inputs.ids[None], inputs.positions[None]
        batch = _Batch(rows=[], ids=ids, positions=positions, last=[], spans=[], is_kept=True)
        try:
            self._tell_prompt(row, batch, launched.firsts[n], output)
        finally:
            self._hidden = None


def _is_decode(row: RowInput) -> bool:
    return len(row.ids) == 1 and row.is_sampled and not _tells_prompt(row)


def _tells_prompt(row: RowInput) -> bool:
    """Whether the row's positions have log-probabilities of prompt ids to tell."""
    return row.sampling.num_prompt_logprobs is not None and row.start + 1 < row.num_prompt


def _flaw_of_top(top: float, flaw: str) -> str | None:
    """Why no id can be chosen, by the largest logit."""
    if math.isfinite(top):
        return None
    return _NONE_LEFT if top == -math.inf else flaw
