"""`pagebus serve` as a launcher: a real nats-server, and stand-ins that write down what happens to them.

The real services under it are the e2e tests' business.
"""

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.serve import descendants, free_port

SERVICE = """
import os, pathlib, signal, socket, sys, time
from pagebus.cli.lifeline import die_with_launcher
die_with_launcher()
role = sys.argv[1]
trace = os.environ["TRACE"]

def say(word):
    with open(trace, "a") as out:
        out.write(f"{role} {word}\\n")

def end(*_):
    if os.environ.get("STUBBORN") == role:
        return
    if role == "gateway":
        time.sleep(0.3)  # streams drain
    say("ended")
    sys.exit(0)

num_interrupts = 0

def interrupt(*_):
    global num_interrupts
    num_interrupts += 1
    say("interrupted" if num_interrupts == 1 else "interrupted twice")
    end()

signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGINT, interrupt)
if os.environ.get("BROKEN") == role:
    open(os.environ["PAGEBUS_FAULT_FILE"], "w").write(f"the {role} cannot read this model")
    sys.exit(3)
say(f"started {os.environ['NATS_URL']}")
if role == os.environ.get("SLOW") and len(open(trace).read().split(f"{role} started")) > 2:
    sys.exit(1)  # the one that is to replace it
pathlib.Path(os.environ["PAGEBUS_READY_FILE"]).touch()
if role != "gateway":
    time.sleep(600)
while not all(f"{other} started" in open(trace).read() for other in ("executor", "scheduler")):
    time.sleep(0.02)
server = socket.socket(fileno=int(os.environ["PAGEBUS_LISTEN_FD"]))
while True:
    client, _ = server.accept()
    client.recv(4096)
    client.sendall(b'HTTP/1.1 200 OK\\r\\n\\r\\n{"num_blocks": 64, "block_size": 16, "max_model_len": 512}')
    client.close()
"""

LAUNCHER = """
import sys
from pagebus.cli import launcher, main
launcher.service_command = lambda role: [sys.executable, "-P", "-c", sys.argv[1], role]
sys.exit(main.main(sys.argv[2:]))
"""


class Running:
    """A launcher with stand-ins below it."""

    def __init__(self, tmp_path: Path, *arguments: str, **environ: str) -> None:
        self.port = free_port()
        self.trace = tmp_path / "trace"
        self.runtime = tmp_path / "runtime"
        self.runtime.mkdir()
        self.environ = {
            **os.environ,
            "TRACE": str(self.trace),
            "XDG_RUNTIME_DIR": str(self.runtime),
            "TMPDIR": str(tmp_path),
        }
        self.environ.pop("NATS_URL", None)
        self.environ.update(environ)
        self.out, self.err = tmp_path / "out", tmp_path / "err"
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-c", LAUNCHER, SERVICE, "serve", "--port", str(self.port), *arguments],
                stdout=out,
                stderr=err,
                env=self.environ,
                start_new_session=True,
            )

    def ready_line(self) -> str:
        self.until(lambda: "curl" in self.out.read_text() or self.process.poll() is not None)
        assert self.process.poll() is None, self.err.read_text()
        return self.out.read_text()

    def until(self, condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"waited for nothing: {self.err.read_text()}"
            time.sleep(0.02)

    def events(self) -> list[str]:
        return self.trace.read_text().splitlines() if self.trace.exists() else []

    def pids(self, word: str = "") -> list[int]:
        return [pid for pid, line in descendants(self.process.pid) if word in line]

    def status(self) -> list[dict[str, object]]:
        command = [sys.executable, "-m", "pagebus.cli", "status", "--json"]
        said = subprocess.run(command, capture_output=True, env=self.environ, check=False, timeout=30).stdout
        return json.loads(said)

    def end(self) -> None:
        pids = self.pids()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.until(lambda: not any(is_running(pid) for pid in pids))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


Start = Callable[..., Running]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Running] = []

    def begin(*arguments: str, **environ: str) -> Running:
        started.append(Running(tmp_path, *arguments, **environ))
        return started[-1]

    yield begin
    for one in started:
        one.end()


def greeting(url: str) -> bytes:
    host, port = url.rpartition("@")[2].split(":")
    with socket.create_connection((host, int(port)), 2) as server:
        return server.recv(5)


def test_the_ready_line_and_the_status_file_tell_where_everything_is(start: Start) -> None:
    running = start("--executors", "2")
    line = running.ready_line()
    assert len(line.strip().splitlines()) <= 2
    assert f"http://127.0.0.1:{running.port} " in line
    assert "KV cache 1,024 tokens = 2 full-length requests of 512" in line
    assert "curl http" in line
    url = re.search(r"nats://client:\S+@127\.0\.0\.1:\d+", line)
    assert url
    (file,) = running.runtime.rglob("*.json")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    (status,) = running.status()
    assert status["nats_url"] == url[0]
    assert status["is_ready"] is True
    assert status["pid"] == running.process.pid
    assert status["num_kv_tokens"] == 1024
    assert greeting(url[0]) == b"INFO "
    assert len(running.err.read_text().splitlines()) <= 5


def test_every_role_has_a_user_of_its_own_and_no_command_line_a_password(start: Start) -> None:
    running = start()
    running.ready_line()
    urls = dict(re.findall(r"^(\w+) started (\S+)$", "\n".join(running.events()), re.MULTILINE))
    assert set(urls) == {"gateway", "scheduler", "executor"}
    for role, url in urls.items():
        assert url.startswith(f"nats://{role}:")
    passwords = [url.split(":")[2].split("@")[0] for url in urls.values()]
    assert len(set(passwords)) == 3
    lines = "\n".join(line for _, line in descendants(running.process.pid))
    assert "nats-server" in lines
    assert not [password for password in passwords if password in lines]


def test_it_stops_in_reverse_order_and_leaves_nothing(start: Start) -> None:
    running = start()
    running.ready_line()
    pids = running.pids()
    assert len(pids) == 4
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(20) == 0
    ended = [event for event in running.events() if event.endswith("ended")]
    assert ended == ["gateway ended", "executor ended", "scheduler ended"]
    assert not [pid for pid in pids if is_running(pid)]
    assert not list(running.runtime.rglob("*.json"))
    assert not list(running.trace.parent.glob("pagebus-*")), "temporary folders"
    assert running.err.read_text() == ""


def test_the_terminal_s_ctrl_c_reaches_the_launcher_alone(start: Start) -> None:
    running = start()
    running.ready_line()
    os.killpg(running.process.pid, signal.SIGINT)
    assert running.process.wait(20) == 0
    assert not [event for event in running.events() if "twice" in event]


def test_a_second_ctrl_c_hurries(start: Start) -> None:
    running = start(STUBBORN="gateway")
    running.ready_line()
    pids = running.pids()
    running.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert running.process.poll() is None, "the gateway still drains"
    begin = time.monotonic()
    running.process.send_signal(signal.SIGINT)
    running.process.wait(20)
    assert time.monotonic() - begin < 4
    assert not [pid for pid in pids if is_running(pid)]


def test_a_killed_launcher_takes_everything_along(start: Start) -> None:
    running = start()
    running.ready_line()
    pids = running.pids()
    assert len(pids) == 4
    running.process.kill()
    running.process.wait()
    running.until(lambda: not any(is_running(pid) for pid in pids), 5)


@pytest.mark.parametrize("role", ["gateway", "scheduler", "executor"])
def test_a_killed_service_comes_back(start: Start, role: str) -> None:
    running = start()
    running.ready_line()
    victim = next(pid for pid, line in descendants(running.process.pid) if line.strip().endswith(" " + role))
    os.kill(victim, signal.SIGKILL)
    running.until(lambda: sum(event.startswith(f"{role} started") for event in running.events()) == 2)
    assert "SIGKILL" in running.err.read_text()


def test_a_killed_nats_server_comes_back_with_its_port_and_passwords(start: Start) -> None:
    running = start()
    running.ready_line()
    (victim,) = running.pids("nats-server")
    url = str(running.status()[0]["nats_url"])
    os.kill(victim, signal.SIGKILL)
    running.until(lambda: running.pids("nats-server") not in ([], [victim]))
    running.until(lambda: accepts(url))
    assert len([event for event in running.events() if "started" in event]) == 3, "services stay"


def accepts(url: str) -> bool:
    """Whether the server takes this user and password."""
    user, password = url.removeprefix("nats://").split("@")[0].split(":")
    host, port = url.rpartition("@")[2].split(":")
    try:
        with socket.create_connection((host, int(port)), 2) as server:
            server.settimeout(2)
            server.recv(4096)
            server.sendall(
                b"CONNECT " + json.dumps({"user": user, "pass": password}).encode() + b"\r\nPING\r\n"
            )
            return b"PONG" in server.recv(4096)
    except OSError:
        return False


def test_a_model_that_cannot_be_served_is_one_line_and_exit_code_1(start: Start) -> None:
    running = start(BROKEN="executor")
    assert running.process.wait(20) == 1
    assert running.err.read_text().strip() == "pagebus serve: the executor cannot read this model"
    assert running.out.read_text() == ""


def test_several_gateways_share_the_port(start: Start) -> None:
    running = start("--gateways", "2")
    running.ready_line()
    running.until(lambda: sum(event.startswith("gateway started") for event in running.events()) == 2)
    pids = [pid for pid, line in descendants(running.process.pid) if line.strip().endswith(" gateway")]
    os.kill(pids[0], signal.SIGKILL)
    socket.create_connection(("127.0.0.1", running.port), 2).close()


def test_a_bus_of_the_user_s_own_is_used(start: Start) -> None:
    running = start(NATS_URL="nats://me:s3cret@127.0.0.1:4999")
    line = running.ready_line()
    assert "nats://127.0.0.1:4999" in line
    assert "s3cret" not in line
    assert not running.pids("nats-server")
    assert sum("started nats://me:s3cret@127.0.0.1:4999" in event for event in running.events()) == 3


def test_no_nats_server_is_one_line(start: Start) -> None:
    running = start(PAGEBUS_NATS_SERVER="/no/such/server")
    assert running.process.wait(20) == 1
    said = running.err.read_text().strip()
    assert "/no/such/server" in said
    assert len(said.splitlines()) == 1


def restart(running: Running, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pagebus.cli", "restart", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=running.environ, check=False, timeout=60
    )


def order_of(running: Running, role: str) -> list[str]:
    return [event.split()[1] for event in running.events() if event.startswith(role + " ")]


def test_a_restart_replaces_every_process_the_new_one_first(start: Start) -> None:
    running = start("--gateways", "2", "--schedulers", "2")
    running.ready_line()
    running.until(lambda: len(order_of(running, "gateway")) == 2)
    old = [pid for pid in running.pids() if pid not in running.pids("nats-server")]
    ended = restart(running, "--json")
    assert ended.returncode == 0, ended.stderr
    answer = json.loads(ended.stdout)
    assert answer["state"] == "done"
    assert len(answer["steps"]) == 5
    assert not [pid for pid in old if is_running(pid)]
    assert len(running.pids()) == 6
    assert order_of(running, "executor") == ["started", "started", "ended"]
    assert order_of(running, "gateway").count("started") == 4
    with socket.create_connection(("127.0.0.1", running.port), 2) as client:
        client.sendall(b"GET /ready HTTP/1.1\r\n\r\n")
        assert b"200 OK" in client.recv(4096)
    assert running.status()[0]["is_ready"] is True
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(20) == 0
    assert not list(running.runtime.rglob("*")) or not list(running.runtime.rglob("*.*"))


def test_without_room_for_two_the_old_one_ends_first(start: Start) -> None:
    running = start()
    running.ready_line()
    assert restart(running, "--no-overlap").returncode == 0
    assert order_of(running, "executor") == ["started", "ended", "started"]
    assert order_of(running, "scheduler") == ["started", "started", "ended"]


def test_a_new_one_that_never_gets_ready_leaves_the_old_one_in_place(start: Start) -> None:
    running = start(SLOW="scheduler")
    running.ready_line()
    (old,) = [pid for pid, line in descendants(running.process.pid) if line.strip().endswith(" scheduler")]
    ended = restart(running)
    assert ended.returncode == 1
    assert "scheduler" in ended.stderr
    assert "goes on" in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1
    assert is_running(old)
    assert order_of(running, "gateway") == ["started"], "what comes after it is not touched"
    assert running.process.poll() is None


def test_a_restart_without_a_server_is_one_line(tmp_path: Path) -> None:
    environ = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "pagebus.cli", "restart"]
    ended = subprocess.run(command, capture_output=True, text=True, env=environ, check=False, timeout=30)
    assert ended.returncode == 1
    assert len(ended.stderr.strip().splitlines()) == 1
