"""A service process is started again with a growing pause, given up where that is of no use, and stopped."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pagebus.cli.backoff import Backoff
from pagebus.cli.processes import ServiceProcess, service_command


def test_backoff_doubles_up_to_ten_seconds_and_starts_over_after_a_good_life() -> None:
    backoff = Backoff()
    assert [backoff.after(1.0) for _ in range(8)] == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0]
    assert backoff.num_failures == 8
    assert backoff.after(31.0) == 0.2
    assert backoff.num_failures == 1
    assert backoff.after(1.0) == 0.4


def test_a_role_shows_in_its_command_line() -> None:
    assert service_command("executor")[-1] == "executor"


class Fatal:
    def __init__(self) -> None:
        self.sentences: list[str] = []

    def __call__(self, sentence: str) -> None:
        self.sentences.append(sentence)


def process(tmp_path: Path, code: str, fatal: Fatal) -> ServiceProcess:
    environment = {**os.environ, "TRACE": str(tmp_path / "trace")}
    code = "import os, sys, time, signal\nopen(os.environ['TRACE'], 'a').write('x')\n" + code
    return ServiceProcess("executor", 1, [sys.executable, "-c", code], environment, tmp_path, fatal)


def num_starts(tmp_path: Path) -> int:
    trace = tmp_path / "trace"
    return len(trace.read_text()) if trace.exists() else 0


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "waited for nothing"
        await asyncio.sleep(0.01)


async def test_a_killed_process_is_started_again(tmp_path: Path) -> None:
    fatal = Fatal()
    child = process(tmp_path, "time.sleep(60)", fatal)
    await child.start()
    await until(lambda: num_starts(tmp_path) == 1)
    first = child.pid
    assert first
    os.kill(first, signal.SIGKILL)
    await until(lambda: num_starts(tmp_path) == 2)
    assert child.pid not in (None, first)
    await child.stop(5)
    assert child.pid is None
    assert not fatal.sentences


async def test_a_process_that_keeps_failing_while_starting_is_given_up(tmp_path: Path) -> None:
    fatal = Fatal()
    child = process(tmp_path, "sys.exit(1)", fatal)
    await child.start()
    await until(lambda: bool(fatal.sentences))
    assert num_starts(tmp_path) == 5
    assert "executor" in fatal.sentences[0]
    assert "exit code 1" in fatal.sentences[0]
    await child.stop(5)


async def test_a_model_that_cannot_be_served_is_told_at_once(tmp_path: Path) -> None:
    fatal = Fatal()
    told = "open(os.environ['PAGEBUS_FAULT_FILE'], 'w').write('no such model'); sys.exit(3)"
    child = process(tmp_path, told, fatal)
    await child.start()
    await until(lambda: bool(fatal.sentences))
    assert fatal.sentences == ["no such model"]
    assert num_starts(tmp_path) == 1
    await child.stop(5)


async def test_stop_asks_first(tmp_path: Path) -> None:
    code = (
        "signal.signal(signal.SIGTERM, lambda *_: (open(os.environ['TRACE'], 'a').write('y'), sys.exit(0)))\n"
    )
    child = process(tmp_path, code + "open(os.environ['TRACE'], 'a').write('r')\ntime.sleep(60)", Fatal())
    await child.start()
    await until(lambda: num_starts(tmp_path) == 2)
    await child.stop(5)
    assert (tmp_path / "trace").read_text() == "xry"


async def test_stop_kills_what_does_not_listen(tmp_path: Path) -> None:
    code = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    code += "open(os.environ['TRACE'], 'a').write('r')\ntime.sleep(60)"
    child = process(tmp_path, code, Fatal())
    await child.start()
    await until(lambda: num_starts(tmp_path) == 2)
    start = time.monotonic()
    await child.stop(0.2)
    assert child.pid is None
    assert time.monotonic() - start < 5


async def test_stop_during_the_pause_starts_nothing(tmp_path: Path) -> None:
    child = process(tmp_path, "sys.exit(1)", Fatal())
    child.is_settled = True
    await child.start()
    await until(lambda: num_starts(tmp_path) == 2)  # the next pause is 0.4 s
    await until(lambda: child.pid is None)
    await child.stop(5)
    await asyncio.sleep(0.6)
    assert num_starts(tmp_path) == 2


async def test_a_process_has_a_session_of_its_own(tmp_path: Path) -> None:
    child = process(tmp_path, "time.sleep(60)", Fatal())
    await child.start()
    assert child.pid
    assert os.getsid(child.pid) == child.pid != os.getsid(0)
    await child.stop(5)


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="Linux tells a process of its parent's death"
)
def test_a_launched_process_dies_with_its_launcher(tmp_path: Path) -> None:
    import subprocess

    inner = (
        "from pagebus.cli.lifeline import die_with_launcher; die_with_launcher();"
        "import time; print(1, flush=True); time.sleep(60)"
    )
    outer = (
        "import os, subprocess, sys, time\n"
        "env = {**os.environ, 'PAGEBUS_LAUNCHER_PID': str(os.getpid())}\n"
        f"child = subprocess.Popen([sys.executable, '-c', {inner!r}], env=env, stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    launcher = subprocess.Popen([sys.executable, "-c", outer], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout
    pid = int(launcher.stdout.readline())
    launcher.kill()
    launcher.wait()
    launcher.stdout.close()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and _is_running(pid):
        time.sleep(0.02)
    assert not _is_running(pid)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
