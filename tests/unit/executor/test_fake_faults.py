"""Faults of the fake model: only where the environment asks for them, and exactly those."""

import time
from array import array
from pathlib import Path

import pytest

from pagebus.bus.messages import Sampling
from pagebus.executor import fake_faults
from pagebus.executor.batch import RowInput
from pagebus.executor.fake import GREEDY, FakeRunner, build_fake_runner, fake_sequence
from pagebus.executor.fake_faults import FaultyRunner, InjectedError, do, faulty_runner, read_poison
from pagebus.settings.structs import ExecutorSettings


def prefill(runner: FakeRunner, prompt: list[int], sampling: Sampling = GREEDY) -> int | None:
    row = RowInput(prompt, 0, [array("i", [1, 2])], sampling, history=prompt)
    (output,) = runner.step([row])
    return output.id


def test_without_variables_there_are_no_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (fake_faults.STEP_VARIABLE, fake_faults.POISON_VARIABLE, fake_faults.TROUBLE_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    assert type(build_fake_runner(ExecutorSettings(fake=True))) is FakeRunner
    monkeypatch.setenv(fake_faults.POISON_VARIABLE, "600=raise")
    assert type(build_fake_runner(ExecutorSettings(fake=True))) is FaultyRunner


def test_poison_strikes_whoever_computes_it() -> None:
    runner = faulty_runner(100, {fake_faults.POISON_VARIABLE: "600=raise,601=memory,602=hang:0.05"})
    assert runner is not None
    assert prefill(runner, [5, 6]) == fake_sequence([5, 6], 1)[0]
    with pytest.raises(InjectedError):
        prefill(runner, [5, 600])
    with pytest.raises(MemoryError):
        prefill(runner, [601, 5])
    began_s = time.monotonic()
    assert prefill(runner, [602, 5]) == fake_sequence([602, 5], 1)[0]
    assert time.monotonic() - began_s >= 0.05


def test_trouble_is_taken_once(tmp_path: Path) -> None:
    path = tmp_path / "trouble"
    runner = faulty_runner(100, {fake_faults.TROUBLE_VARIABLE: str(path)})
    assert runner is not None
    assert prefill(runner, [5]) == fake_sequence([5], 1)[0]
    path.write_text("raise\n")
    with pytest.raises(InjectedError):
        prefill(runner, [5])
    assert not path.exists()
    assert prefill(runner, [5]) == fake_sequence([5], 1)[0]


@pytest.mark.parametrize("text", ["600", "600=", "x=exit", "600=explode"])
def test_a_fault_that_does_not_exist_is_an_error(text: str) -> None:
    def strike() -> None:
        for fault in read_poison(text).values():
            do(fault)

    with pytest.raises(ValueError):  # noqa: PT011  # its text is int's or ours
        strike()


def test_penalties_make_the_history_matter() -> None:
    """A history that is not the row's ids so far changes the id made, as a real penalty would."""
    sampling = Sampling(temperature=0.0, presence_penalty=0.5)
    runner = FakeRunner()
    row = RowInput([5, 6], 0, [array("i", [1])], sampling, history=[5, 6])
    (right,) = runner.step([row])
    row.history = [5, 7]
    (wrong,) = runner.step([row])
    assert [right.id] == fake_sequence([5, 6], 1, sampling=sampling) != fake_sequence([5, 6], 1)
    assert wrong.id != right.id
