"""Starts the real `pagebus serve` as a process, and finds, kills and waits for the processes below it."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path


def free_port() -> int:
    """A loopback port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Serve:
    """One running `pagebus serve`."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, runtime_dir: Path, log: Path) -> None:
        self.process = process
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.runtime_dir = runtime_dir
        self.log = log
        self.seconds_to_ready = 0.0

    def get(self, path: str, timeout_s: float = 5.0) -> tuple[int, bytes]:
        """Status and body; (0, b"") when the connection is refused."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=timeout_s) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        except (OSError, TimeoutError):
            return 0, b""

    def post(
        self, path: str, body: dict[str, object], timeout_s: float = 60.0
    ) -> tuple[int, dict[str, object]]:
        """Status and parsed body of a POST of JSON."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"content-type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def wait_ready(self, timeout_s: float = 60.0) -> float:
        """Seconds until /ready says 200; raises with the log when it never does."""
        start = time.monotonic()
        while time.monotonic() - start < timeout_s:
            if self.get("/ready")[0] == 200:
                return time.monotonic() - start
            if self.process.poll() is not None:
                raise AssertionError(f"serve exited with {self.process.returncode}:\n{self.output()}")
            time.sleep(0.05)
        raise AssertionError(f"not ready after {timeout_s} s:\n{self.output()}")

    def output(self) -> str:
        """All that it printed so far."""
        return self.log.read_text(errors="replace")

    def status(self) -> dict[str, object]:
        """The status file that tools read; the launcher writes it just after it sees that all is ready."""
        deadline = time.monotonic() + 10
        while not (found := list(self.runtime_dir.rglob("*.json"))) and time.monotonic() < deadline:
            time.sleep(0.05)
        (path,) = found
        return json.loads(path.read_text())

    def client_url(self) -> str:
        """The NATS URL of the restricted client user."""
        (url,) = {text for text in _strings(self.status()) if text.startswith("nats://client:")}
        return url

    def children(self, role: str) -> list[int]:
        """Process ids below this one whose command line names the role."""
        return [pid for pid, line in descendants(self.process.pid) if role in line]

    def stop(self, timeout_s: float = 40.0) -> int:
        """SIGTERM and wait; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            for pid, _ in descendants(self.process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.kill()
            self.process.wait()
            raise


def descendants(pid: int) -> list[tuple[int, str]]:
    """(pid, command line) of every process below `pid`, from /proc."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        for child in parents.get(todo.pop(), []):
            todo.append(child)
            with contextlib.suppress(OSError):
                line = (Path("/proc") / str(child) / "cmdline").read_bytes().replace(b"\0", b" ")
                found.append((child, line.decode(errors="replace")))
    return found


def _strings(value: object) -> Iterator[str]:
    match value:
        case str():
            yield value
        case dict():
            for item in value.values():
                yield from _strings(item)
        case list():
            for item in value:
                yield from _strings(item)


@contextlib.contextmanager
def serving(
    tmp_path: Path, *arguments: str, env: dict[str, str] | None = None, is_ready: bool = True
) -> Iterator[Serve]:
    """`pagebus serve ARGUMENTS` on a free port, ready unless told otherwise, stopped at the end."""
    port = free_port()
    runtime_dir = tmp_path / "runtime"
    runtime_dir.mkdir(exist_ok=True, parents=True)
    log = tmp_path / "serve.log"
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(runtime_dir), **(env or {})}
    environment.pop("NATS_URL", None)
    environment.update(env or {})
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "pagebus.cli", "serve", *arguments, "--port", str(port)],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    serve = Serve(process, port, runtime_dir, log)
    try:
        if is_ready:
            serve.seconds_to_ready = serve.wait_ready()
        yield serve
    finally:
        serve.stop()
