"""Decode graphs: the ladder, the order of captures, what is told meanwhile, work that no graph can hold."""

import io
import logging
from functools import partial
from itertools import pairwise

import pytest

from pagebus.executor import progress
from pagebus.executor.decode_graphs import DecodeGraphs, ladder
from pagebus.executor.device import HostDevice, Work


class Terminal(io.StringIO):
    """A stream that says that somebody looks."""

    def isatty(self) -> bool:
        return True


class Refusing(HostDevice):
    """Captures no work of four rows."""

    def __init__(self) -> None:
        super().__init__()
        self.captured = 0

    def capture(self, work: Work) -> Work:
        self.captured += 1
        if self.captured == 2:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return work


def test_the_ladder_holds_every_number_closely() -> None:
    assert ladder(1) == [1]
    assert ladder(20) == [1, 2, 4, 8, 16, 24]
    for most in (1, 3, 8, 100, 256, 300, 1000):
        sizes = ladder(most)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] >= most
        assert all(after <= max(2 * before, before + 8, before * 9 // 8) for before, after in pairwise(sizes))


def test_the_largest_is_captured_first_and_a_terminal_sees_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, ran, beats = Terminal(), list[int](), list[None]()
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    graphs = DecodeGraphs(
        HostDevice(), lambda size: partial(ran.append, size), 8, beat=lambda: beats.append(None)
    )
    graphs.capture()
    assert ran == [8, 4, 2, 1]  # warmed up
    assert graphs.num_captured == 4
    assert len(beats) == 8
    assert "capturing CUDA graphs [##############################] 100 % (4/4)" in terminal.getvalue()
    graphs.run(graphs.size_for(3))
    assert ran[-1] == 4


def test_work_that_no_graph_holds_stays_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    ran = list[int]()
    graphs = DecodeGraphs(Refusing(), lambda size: partial(ran.append, size), 8, beat=lambda: None)
    with caplog.at_level(logging.WARNING):
        graphs.capture()
    assert graphs.num_captured == 0
    assert "without CUDA graphs, and slowly: operation not permitted when stream is capturing" in caplog.text
    graphs.run(8)
    assert ran[-1] == 8
