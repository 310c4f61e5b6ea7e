"""Killing any one process of an idle `pagebus serve`: it comes back, and the next request works."""

import os
import signal
import time
from collections.abc import Iterator

import pytest

from tests.support.serve import Serve, serving

ROLES = ["gateway", "scheduler", "executor", "nats-server"]


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    with serving(tmp_path_factory.mktemp("serve")) as running:
        yield running


def ask(serve: Serve) -> str:
    status, answer = serve.post(
        "/v1/chat/completions",
        {
            "model": "pagebus-mini",
            "messages": [{"role": "user", "content": "What is 7 * 8?"}],
            "temperature": 0,
        },
    )
    assert status == 200, answer
    return answer["choices"][0]["message"]["content"]


@pytest.mark.parametrize("role", ROLES)
def test_a_killed_process_comes_back(serve: Serve, role: str) -> None:
    answer = ask(serve)
    assert answer.endswith("56")
    (victim,) = serve.children(role)
    os.kill(victim, signal.SIGKILL)
    seen = set()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        status, _ = serve.get("/ready")
        seen.add(status)
        if status == 200 and (len(seen) > 1 or serve.children(role) not in ([], [victim])):
            break
        time.sleep(0.02)
    assert 200 in seen, serve.output()
    # without a gateway connections wait for the next one; a scheduler is often replaced before it is missed
    assert seen == {200} or role != "gateway", seen
    assert 503 in seen or role != "executor", seen
    assert ask(serve) == answer
    (successor,) = serve.children(role)
    assert successor != victim


def test_every_role_shows_in_its_command_line(serve: Serve) -> None:
    assert all(len(serve.children(role)) == 1 for role in ROLES)


def test_it_stops_in_order_and_leaves_nothing(tmp_path_factory: pytest.TempPathFactory) -> None:
    with serving(tmp_path_factory.mktemp("stop")) as running:
        pids = [pid for role in ROLES for pid in running.children(role)]
        assert len(pids) == len(ROLES)
        assert running.stop() == 0
        assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]
        assert "Traceback" not in running.output()


def test_children_end_when_the_launcher_is_killed(tmp_path_factory: pytest.TempPathFactory) -> None:
    with serving(tmp_path_factory.mktemp("orphans")) as running:
        pids = [pid for role in ROLES for pid in running.children(role)]
        running.process.kill()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and any(_is_alive(pid) for pid in pids):
            time.sleep(0.05)
        assert not [pid for pid in pids if _is_alive(pid)]


def _is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
