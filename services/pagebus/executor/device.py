"""What a runner asks of an accelerator: copies that nobody waits for, marks, captured work. Knows no model.

Everything runs on one stream, in the order in which it was asked for. `HostDevice` does the same on the CPU,
as strictly: what is fetched is there only once a later mark was waited for, and captured work sees nothing
but the tensors that it was captured with.
"""

import time
from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

Work = Callable[[], None]

_NUM_TIMED = 5


class Mark(Protocol):
    """A place in the stream."""

    def wait(self) -> None:
        """Return when the device has come there."""


class Device(Protocol):
    """An accelerator's one stream."""

    @property
    def device(self) -> torch.device:
        """Where tensors live."""

    def upload(self, values: npt.NDArray[np.int64]) -> torch.Tensor:
        """A copy on the device; `values` may be changed at once."""

    def fetch(self, values: torch.Tensor) -> torch.Tensor:
        """A copy on the host, there once a later mark was waited for; `values` may be changed at once."""

    def mark(self) -> Mark:
        """Here and now."""

    def capture(self, work: Work) -> Work:
        """What does `work` again, with one launch, on the same tensors. `work` has run before."""

    def warm_up(self, work: Work) -> None:
        """Run `work` as `capture` will, and wait for it."""

    def time_s(self, work: Work) -> float:
        """Seconds that the device takes for `work` alone, captured: the best of a few runs."""


class _HostMark:
    def __init__(self, pending: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._pending = pending

    def wait(self) -> None:
        for target, value in self._pending:
            target.copy_(value)
        self._pending.clear()


class HostDevice:
    """The CPU as a device."""

    def __init__(self) -> None:
        self.num_uploads = 0  # for tests
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def upload(self, values: npt.NDArray[np.int64]) -> torch.Tensor:
        """A copy."""
        self.num_uploads += 1
        return torch.from_numpy(values.copy())

    def fetch(self, values: torch.Tensor) -> torch.Tensor:
        """Garbage until a mark was waited for."""
        target = torch.full_like(values, 77, memory_format=torch.contiguous_format)
        self._pending.append((target, values.clone()))
        return target

    def mark(self) -> Mark:
        """What was fetched since the last one waits for it."""
        pending, self._pending = self._pending, []
        return _HostMark(pending)

    def capture(self, work: Work) -> Work:
        """The work itself; capturing does nothing to any tensor."""
        return work

    def warm_up(self, work: Work) -> None:
        """Run it."""
        work()

    def time_s(self, work: Work) -> float:
        """By the clock."""
        work()
        began_s = time.perf_counter()
        work()
        return time.perf_counter() - began_s


class _CudaMark:
    def __init__(self) -> None:
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record()

    def wait(self) -> None:
        self._event.synchronize()


class CudaDevice:
    """A CUDA device's current stream. Pinned memory is torch's: it is reused when its copies are done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._capturing = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @property
    def device(self) -> torch.device:
        """The CUDA device."""
        return self._device

    def upload(self, values: npt.NDArray[np.int64]) -> torch.Tensor:
        """Through pinned memory, without waiting."""
        return torch.from_numpy(values).pin_memory().to(self._device, non_blocking=True)

    def fetch(self, values: torch.Tensor) -> torch.Tensor:
        """Into pinned memory, without waiting."""
        return values.to("cpu", non_blocking=True)

    def mark(self) -> Mark:
        """An event on the stream."""
        return _CudaMark()

    def capture(self, work: Work) -> Work:
        """A CUDA graph; all share one pool of memory, as they never run at the same time."""
        return self._graph_of(work, is_shared=True).replay

    def _graph_of(self, work: Work, *, is_shared: bool) -> torch.cuda.CUDAGraph:
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        pool = self._pool if is_shared else None
        try:
            with torch.cuda.graph(
                graph, pool=pool, stream=self._capturing, capture_error_mode="thread_local"
            ):
                work()
        except BaseException:
            # torch leaves its own stream current where a capture was broken.
            torch.cuda.set_stream(before)
            raise
        return graph

    def warm_up(self, work: Work) -> None:
        """On the stream that captures: libraries keep workspaces for each stream."""
        self._capturing.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._capturing):
            work()
        torch.cuda.current_stream(self._device).wait_stream(self._capturing)
        torch.cuda.synchronize(self._device)

    def time_s(self, work: Work) -> float:
        """By events around replays of a graph with a pool of its own, which goes with it."""
        self.warm_up(work)
        graph = self._graph_of(work, is_shared=False)
        graph.replay()
        taken_ms = []
        for _ in range(_NUM_TIMED):
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            began.record()
            graph.replay()
            ended.record()
            ended.synchronize()
            taken_ms.append(float(began.elapsed_time(ended)))
        graph.reset()
        return min(taken_ms) / 1e3
