"""A step that stands still is given up; a slow one, an idle, a compiling and a stopped process never are."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from pagebus.bus.memory import MemoryBroker
from pagebus.executor.batch import RowInput, RowOutput
from pagebus.executor.errors import BrokenModelError
from pagebus.executor.fake import FakeRunner
from pagebus.executor.pulse import Pulse
from pagebus.executor.retrying import compute
from pagebus.executor.service import run
from pagebus.executor.watchdog import INTERVAL_S, Watchdog
from pagebus.settings.structs import ExecutorSettings
from tests.support.bus_scheduler import MODEL
from tests.support.executor_tests import scheduler
from tests.support.hand_scheduler import HandScheduler
from tests.support.rows import GREEDY


class Dog:
    """A watchdog of 10 s, and a clock."""

    def __init__(self, bound_s: float = 10.0) -> None:
        self.pulse = Pulse()
        self.pulse.count = 1  # a first step was seen to end
        self.dog = Watchdog(bound_s)
        self.now_s = 100.0

    def hung_after(self, seconds: float, *, beats_each_s: float | None = None) -> float | None:
        """When it gives up, looking every half second for so long; None: it does not."""
        begin_s, beat_s = self.now_s, self.now_s
        while self.now_s < begin_s + seconds:
            self.now_s += INTERVAL_S
            if beats_each_s is not None and self.now_s - beat_s >= beats_each_s:
                beat_s = self.now_s
                self.pulse.count += 1
            if self.dog.is_hung(self.pulse, self.now_s):
                return self.now_s - begin_s
        return None


def test_a_step_without_progress_is_given_up_after_the_bound() -> None:
    dog = Dog()
    dog.pulse.is_busy = True
    after_s = dog.hung_after(60.0)
    assert after_s is not None
    assert 10.0 <= after_s <= 11.0


def test_a_slow_step_an_idle_process_and_one_that_compiles_are_not() -> None:
    dog = Dog()
    assert dog.hung_after(100.0) is None, "idle"
    dog.pulse.is_busy = True
    assert dog.hung_after(300.0, beats_each_s=9.0) is None, "each layer takes nine seconds"
    dog.pulse.is_compiling = True
    assert dog.hung_after(300.0) is None, "compiling"
    dog.pulse.is_compiling, dog.pulse.slowest_s = False, 5.0
    after_s = dog.hung_after(300.0)
    assert after_s is not None
    assert after_s >= 25.0, "parts are known to take five seconds"
    off = Dog(bound_s=0.0)
    off.pulse.is_busy = True
    assert off.hung_after(1000.0) is None


def test_a_first_step_gets_longer() -> None:
    dog = Dog()
    dog.pulse.count, dog.pulse.is_busy = 0, True
    after_s = dog.hung_after(100.0)
    assert after_s is not None
    assert 30.0 <= after_s <= 31.0


def test_a_process_that_was_stopped_for_a_minute_is_not_hung() -> None:
    dog = Dog()
    dog.pulse.is_busy = True
    assert dog.hung_after(5.0) is None
    dog.now_s += 60.0
    assert dog.hung_after(4.0) is None
    assert dog.hung_after(10.0) is not None


def test_a_pulse_forgets_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 5.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    pulse = Pulse()
    pulse.begin()
    now_s += 30.0  # stopped from outside
    pulse.beat()
    assert pulse.slowest_s == 2.0, "a hang would be waited for as long again, five times"
    for _ in range(10_000):
        now_s += 0.01
        pulse.beat()
    assert pulse.slowest_s == pytest.approx(0.01, abs=0.01)
    pulse.tell_compiling(True)
    now_s += 60.0
    pulse.tell_compiling(False)
    pulse.tell_compiling(True)
    pulse.end()
    assert (pulse.count, pulse.is_busy, pulse.is_compiling) == (10_002, False, False)
    assert pulse.slowest_s < 1.0


def test_compiling_at_a_launch_is_told() -> None:
    pytest.importorskip("triton")
    code = (
        "import triton\n"
        "from pagebus.kernels.jit import on_compiling\n"
        "told = []\n"
        "on_compiling(told.append)\n"
        "for hook in (triton.knobs.runtime.jit_cache_hook, triton.knobs.runtime.jit_post_compile_hook):\n"
        "    assert not hook(key='', repr='', fn=None, compile={}, already_compiled=False)\n"
        "print(told)\n"
    )
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60, env=env
    )
    assert ended.stdout.strip() == "[True, False]", ended.stderr


class HangingRunner(FakeRunner):
    """Never returns from the step that computes id 13."""

    def step(self, rows: Sequence[RowInput]) -> list[RowOutput]:
        if any(13 in each.ids for each in rows):
            self.is_hanging = True
            while self.is_hanging:
                time.sleep(0.01)
        return super().step(rows)


async def test_the_service_is_given_up_while_it_still_says_hello() -> None:
    broker = MemoryBroker()
    buses = broker.connect("ex"), broker.connect("s")
    runner = HangingRunner(num_blocks=64, max_model_len=256)
    hangs = asyncio.Event()
    settings = ExecutorSettings(model=MODEL, fake=True, watchdog_s=2.5, drain_timeout_s=0.0)
    hand, stop = HandScheduler("ex"), asyncio.Event()
    async with scheduler(buses[1], hand) as lead:
        service = run(settings, buses[0], Path(), "ex", stop, build=lambda _s, _p: runner, on_hang=hangs.set)
        task = asyncio.create_task(service)
        hand.add("r0", [1, 2, 3], max_tokens=5)
        await lead.until_finished("r0")
        assert not hangs.is_set()
        hand.add("r1", [13, 14], max_tokens=5)
        lead.poke()
        await asyncio.wait_for(hangs.wait(), 10.0)
        progress = {hello.progress for hello in lead.hellos[-2:]}
        assert len(progress) == 1, "its counter stands still"
        runner.is_hanging = False
        stop.set()
        await asyncio.wait_for(task, 10.0)


def test_the_end_shows_where_every_thread_is() -> None:
    code = (
        "import threading, time, logging\n"
        "from pagebus.executor.watchdog import end_process\n"
        "logging.basicConfig()\n"
        "def forward_that_never_returns(): time.sleep(60)\n"
        "threading.Thread(target=forward_that_never_returns, daemon=True).start()\n"
        "time.sleep(0.2)\n"
        "end_process()\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=30
    )
    assert ended.returncode == 1
    assert "forward_that_never_returns" in ended.stderr
    assert "makes no progress" in ended.stderr


# -- steps that raise --------------------------------------------------------------------------------------


class RaisingRunner(FakeRunner):
    """Raises `error` in a step with one of the ids `bad`; with more rows than `most` finds no memory."""

    bad: frozenset[int] = frozenset()
    most = 1000
    error: Exception = ValueError("a bad id")
    num_calls = 0

    def step(self, rows: Sequence[RowInput]) -> list[RowOutput]:
        self.num_calls += 1
        if len(rows) > self.most:
            raise MemoryError
        if any(self.bad & set(each.ids) for each in rows):
            raise self.error
        return super().step(rows)


def runner_and_rows(num_rows: int) -> tuple[RaisingRunner, list[RowInput]]:
    runner = RaisingRunner(num_blocks=64, max_model_len=64)
    return runner, [
        RowInput(ids=[10 + n, 5], start=0, tables=[[n]], sampling=GREEDY) for n in range(num_rows)
    ]


@pytest.mark.parametrize("num_rows", [1, 2, 3, 7, 8, 33])
def test_only_rows_at_fault_fail_and_the_others_make_the_same(num_rows: int) -> None:
    quiet, rows = runner_and_rows(num_rows)
    expected = [output.id for output in quiet.step(rows)]
    for bad in range(num_rows):
        runner, rows = runner_and_rows(num_rows)
        runner.bad = frozenset({10 + bad})
        outputs = compute(runner, rows)
        for n, output in enumerate(outputs):
            assert (output.error is not None) is (n == bad)
            assert output.id == (None if n == bad else expected[n])
        assert "a bad id" in (outputs[bad].error or "")
        assert runner.num_calls <= 2 + 3 * num_rows.bit_length()


def test_a_step_too_large_for_the_memory_is_done_in_parts() -> None:
    quiet, rows = runner_and_rows(20)
    runner, _ = runner_and_rows(20)
    runner.most = 3
    assert [output.id for output in compute(runner, rows)] == [output.id for output in quiet.step(rows)]


def test_what_fails_every_row_is_no_row_s_fault() -> None:
    runner, rows = runner_and_rows(4)
    runner.bad = frozenset({5})
    with pytest.raises(ValueError, match="a bad id"):
        compute(runner, rows)
    runner, rows = runner_and_rows(1)
    runner.most = 0
    with pytest.raises(MemoryError):
        compute(runner, rows)


def test_a_broken_device_is_not_tried_again() -> None:
    runner, rows = runner_and_rows(4)
    runner.bad, runner.error = frozenset({5}), BrokenModelError("the context is lost")
    with pytest.raises(BrokenModelError):
        compute(runner, rows)
    assert runner.num_calls == 1
