"""What a CUDA graph would hold asks nothing of the host: for every family, fused as on a GPU.

On the CPU nothing would fail, so each operation of torch that a captured step runs is looked at: one that
reads a value, has a size that depends on values, or makes a tensor from Python's numbers would end a capture,
and decoding would be launched kernel by kernel.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

pytest.importorskip("triton")

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pagebus.executor import loader, model_runner
from pagebus.executor.device import HostDevice
from pagebus.executor.loader import LoadedModel, load_model
from pagebus.executor.pulse import Pulse
from pagebus.executor.rotary import RotaryTable
from pagebus.kernels.jit import IS_INTERPRETED
from tests.support.models import FAMILIES, make_model

pytestmark = pytest.mark.skipif(not IS_INTERPRETED, reason="needs TRITON_INTERPRET=1 before triton's import")

if IS_INTERPRETED:
    from triton.runtime.interpreter import GridExecutor

    from pagebus.executor import triton_cache
    from pagebus.executor.device_runner import DeviceRunner

WAITING = (
    "_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "bincount",
    "lift_fresh", "repeat_interleave.Tensor", "where.default", "one_hot", "nonzero_numpy", "_unique2",
)  # fmt: skip
NUM_BLOCKS = 12


class Watch(TorchDispatchMode):
    """Notes operations that no graph can hold, but for those inside of kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.num_seen = 0
        self.is_inside = False

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: object, args: tuple[object, ...] = (), kwargs: object = None
    ) -> object:
        if not self.is_inside:
            self.num_seen += 1
            name = str(func).removeprefix("aten.")
            if any(name == word or name.startswith(f"{word}.") for word in WAITING):
                self.found.append(name)
            indices = args[1] if name.startswith("index") and len(args) > 1 else ()
            for index in indices if isinstance(indices, list | tuple) else ():
                if isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8):
                    self.found.append(f"{name} by a mask")
        return func(*args, **(kwargs if isinstance(kwargs, dict) else {}))

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """A kernel runs."""
        before, self.is_inside = self.is_inside, True
        try:
            yield
        finally:
            self.is_inside = before


class Capturing(HostDevice):
    """Captures by running the work once more, watched."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        with self._watch:
            work()
        return work


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    found = Watch()
    launch = GridExecutor.__call__

    def launched(self: object, *args: object, **kwargs: object) -> None:
        with found.inside():
            launch(self, *args, **kwargs)

    def attention(
        query: torch.Tensor, _keys: object, values: torch.Tensor, *_: object, **__: object
    ) -> object:
        with found.inside():
            return query.new_full((*query.shape[:2], values.shape[-1]), 0.25)

    monkeypatch.setattr(GridExecutor, "__call__", launched)
    monkeypatch.setattr(triton_cache, "triton_paged_attention", attention)
    monkeypatch.setattr(loader, "make_row_invariant", lambda _: [])  # a CPU's linears
    monkeypatch.setattr(RotaryTable, "_length", lambda table, *_: table._max_model_len)  # as on a GPU
    return found


def build(path: Path, kind: str, device: HostDevice, monkeypatch: pytest.MonkeyPatch) -> "DeviceRunner":
    def cache(loaded: LoadedModel, num_blocks: Sequence[int], _: Pulse) -> "triton_cache.TritonCache":
        return triton_cache.TritonCache(loaded.specs, num_blocks, loaded.page_dtype, loaded.device)

    monkeypatch.setattr(model_runner, "make_cache", cache)
    model = make_model(kind, path / kind, has_tokenizer=False)
    loaded = load_model(model, dtype="float32", max_model_len=FAMILIES[kind].max_model_len or 128)
    loader._fuse(model, loaded.model, loaded.device)
    loader._swap_products(model, loaded.model, is_fp8=False, is_batch_invariant=False)
    num_groups = len({spec.window for spec in loaded.specs})
    return DeviceRunner(loaded, [NUM_BLOCKS] * num_groups, device, max_rows=1)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_captured_step_asks_nothing_of_the_host(
    tmp_path: Path, kind: str, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = build(tmp_path, kind, Capturing(watch), monkeypatch)
    assert runner.num_graphs == 1
    assert watch.num_seen > 10
    assert not watch.found


def test_what_would_be_found(watch: Watch) -> None:
    values = torch.arange(4.0)
    for wrong in (
        lambda: bool(values.sum() > 1),
        lambda: values[values > 1],
        lambda: torch.tensor([1.0, 2.0]),
        lambda: torch.where(values > 1),
    ):
        watch.found.clear()
        with watch:
            wrong()
        assert watch.found
