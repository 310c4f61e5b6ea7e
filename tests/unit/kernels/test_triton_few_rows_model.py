"""Linears of few rows in a model: measured at the start, swapped where ours wins, the same numbers."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from pagebus.executor.device import HostDevice
from pagebus.kernels.jit import IS_INTERPRETED

pytestmark = pytest.mark.skipif(not IS_INTERPRETED, reason="needs TRITON_INTERPRET=1 before triton's import")

if IS_INTERPRETED:
    from pagebus.executor import gpu_few_rows
    from pagebus.executor.fusing import FusedGated
    from pagebus.kernels import triton_few_rows as kernels
    from pagebus.kernels.triton_few_rows import FewRowsConfig


class Timed(HostDevice):
    """A device on which works take what is told, in turn."""

    def __init__(self, times: Callable[[int], float]) -> None:
        super().__init__()
        self._times, self.num_timed = times, 0

    def time_s(self, work: Callable[[], None]) -> float:
        work()
        self.num_timed += 1
        return self._times(self.num_timed - 1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = FusedGated(nn.Linear(48, 64, bias=False), nn.Linear(32, 48, bias=True), "silu")
        self.head = nn.Linear(48, 70, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.mlp(hidden))
        return found


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "ONE_ROW", (FewRowsConfig(16, 32, 4, 1),))
    monkeypatch.setattr(kernels, "MANY_ROWS", (FewRowsConfig(16, 32, 4, 1),))
    monkeypatch.setattr(gpu_few_rows, "ROWS", (1, 4, 16))


def model() -> Block:
    torch.manual_seed(0)
    return Block().half().requires_grad_(False)


def test_the_same_numbers_where_ours_is_faster() -> None:
    plain, tuned = model(), model()
    counts = gpu_few_rows.tune(tuned, Timed(lambda n: 1.0 if n % 2 == 0 else 0.5), lambda: None)
    assert counts == {"gated": 1, "linear": 3}  # the way up too, for numbers of rows at which gating loses
    for num_rows in (1, 2, 4, 9, 16, 17, 40):
        hidden = torch.randn(1, num_rows, 48).half()
        torch.testing.assert_close(tuned(hidden), plain(hidden), atol=2e-3, rtol=2e-2)


def test_nothing_is_swapped_where_the_library_is_faster() -> None:
    tuned = model()
    assert gpu_few_rows.tune(tuned, Timed(lambda n: 1.0 + n % 2), lambda: None) == {"gated": 0, "linear": 0}
    assert type(tuned.head) is nn.Linear


def test_only_some_numbers_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours wins at one row alone: only that is asked of our kernel."""
    tuned = model()
    gpu_few_rows.tune(tuned, Timed(lambda n: 0.5 if n % 6 == 1 else 1.0), lambda: None)
    asked = []
    monkeypatch.setattr(
        gpu_few_rows, "triton_few_rows",
        lambda rows, *rest: asked.append(len(rows)) or kernels.triton_few_rows(rows, *rest),
    )  # fmt: skip
    for num_rows in (1, 2, 16, 20):
        tuned(torch.randn(1, num_rows, 48).half())
    assert asked == [1, 1, 1]


def test_a_wrong_product_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = kernels.triton_few_rows
    monkeypatch.setattr(gpu_few_rows, "triton_few_rows", lambda *given: right(*given) * 1.5)
    assert gpu_few_rows.tune(model(), Timed(lambda n: 1.0 / (n + 1)), lambda: None) == {
        "gated": 0,
        "linear": 0,
    }
    assert "is wrong here" in caplog.text


def test_a_cut_that_the_device_refuses_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("out of resource")

    monkeypatch.setattr(gpu_few_rows, "triton_few_rows", refuse)
    assert gpu_few_rows.tune(model(), Timed(lambda _: 1.0), lambda: None) == {"gated": 0, "linear": 0}
