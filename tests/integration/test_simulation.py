"""Seeded runs of the real services on a bad bus, in virtual time: each request ends once, with its ids."""

import pytest

from pagebus.requester.state import RequestState
from pagebus.scheduler.blocks import BlockError
from pagebus.scheduler.executors import ExecutorState
from pagebus.sim.world import ViolationError, run


@pytest.mark.parametrize("first", range(0, 40, 10))
def test_seeds(first):
    outcomes = [run(seed) for seed in range(first, first + 10)]
    assert sum(outcome.num_faults for outcome in outcomes) > 50
    assert all(outcome.end_s < 200 for outcome in outcomes)


def test_the_same_seed_is_the_same_run():
    assert run(7) == run(7)


def run_some(num_seeds):
    for seed in range(num_seeds):
        run(seed)


def test_a_requester_that_does_not_ask_again_is_found(monkeypatch):
    """The test of the test."""
    monkeypatch.setattr(RequestState, "on_leader", lambda self, epoch, now_s: None)
    monkeypatch.setattr(RequestState, "on_failed", lambda self, failed, now_s: None)
    monkeypatch.setattr(RequestState, "_patience_s", lambda self: float("inf"))
    with pytest.raises(ViolationError, match="deadline"):
        run_some(10)


def test_a_scheduler_that_gives_blocks_away_too_early_is_found(monkeypatch):
    original = ExecutorState.remove
    monkeypatch.setattr(ExecutorState, "remove", lambda self, row, **_: original(self, row, is_finished=True))
    with pytest.raises((ViolationError, BlockError)):
        run_some(10)
