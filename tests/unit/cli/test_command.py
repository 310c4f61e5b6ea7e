"""The `pagebus` command: quick help, one-line errors, words for the ready line, the file for tools."""

import asyncio
import contextlib
import json
import logging
import os
import shlex
import socket
import stat
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import pytest

from pagebus.bus.subjects import is_part
from pagebus.cli import status_file
from pagebus.cli.errors import CommandError
from pagebus.cli.launcher import OwnBus, service_environment
from pagebus.cli.main import COMMANDS, main
from pagebus.cli.port import LISTEN_VARIABLE, SharedListener, inherited_listener
from pagebus.cli.ready import Capacity, ask, curl_command
from pagebus.cli.services import instance_name
from pagebus.settings.load import read_settings
from pagebus.settings.structs import ExecutorSettings, GatewaySettings, SchedulerSettings, ServeSettings
from pagebus.telemetry import logs


def pagebus(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "NATS_URL"}
    return subprocess.run(
        [sys.executable, "-m", "pagebus.cli", *arguments],
        capture_output=True,
        text=True,
        env=environment | environ,
        timeout=60,
        check=False,
    )


def test_help_is_quick_and_lists_every_command() -> None:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        ended = pagebus("--help")
        seconds.append(time.perf_counter() - start)
    assert ended.returncode == 0
    assert all(f"  {name} " in ended.stdout for name in COMMANDS)
    assert min(seconds) < 0.3, seconds


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, pagebus.cli.main as m; m.main(['--help']); print(sorted(sys.modules))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for module in ("torch", "transformers", "fastapi", "nats", "msgspec", "asyncio", "argparse"):
        assert f"'{module}'" not in said


def test_version() -> None:
    assert pagebus("--version").stdout.startswith("pagebus ")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    ended = pagebus(command, "--help")
    assert ended.returncode == 0, ended.stderr
    assert f"pagebus {command}" in ended.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "usage"),
        (["srve"], 2, "'srve'"),
        (["serve", "--port", "x"], 2, "--port: 'x'"),
        (["serve", "/no/such/dir", "--port", "0"], 1, "/no/such/dir"),
        (["serve", "--host", "no.such.host.invalid", "--port", "0"], 1, "--host"),
        (["gateway"], 2, "NATS_URL"),
        (["scheduler"], 2, "NATS_URL"),
        (["executor"], 2, "NATS_URL"),
        (["executor", "/no/such/dir"], 3, "/no/such/dir"),
        (["scheduler", "--name", "a.b"], 2, "NATS_URL"),
    ],
)
def test_errors_are_one_line(arguments: list[str], code: int, words: str) -> None:
    ended = pagebus(*arguments)
    assert ended.returncode == code, ended.stderr
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == (
        1 if arguments else len(ended.stderr.strip().splitlines())
    )


def test_a_bad_instance_name_is_named() -> None:
    ended = pagebus("scheduler", "--name", "a.b", NATS_URL="nats://127.0.0.1:9")
    assert ended.returncode == 2
    assert "--name" in ended.stderr


@pytest.mark.parametrize("is_shared", [False, True])
def test_a_port_in_use_is_one_line(is_shared: bool) -> None:
    with socket.socket() as other:
        if is_shared:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        ended = pagebus("serve", "--port", str(port))
    assert ended.returncode == 1
    assert str(port) in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1, ended.stderr


def test_connections_wait_in_the_shared_socket_and_nobody_else_gets_the_port() -> None:
    with contextlib.closing(SharedListener("127.0.0.1", 0)) as listener:
        client = socket.create_connection(("127.0.0.1", listener.port), 1)  # nobody accepts it yet
        with socket.socket() as stranger:
            stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            with pytest.raises(OSError, match="in use"):
                stranger.bind(("127.0.0.1", listener.port))
        with pytest.raises(CommandError, match=str(listener.port)):
            SharedListener("127.0.0.1", listener.port)
        gateway = inherited_listener({LISTEN_VARIABLE: str(os.dup(listener.fd))})
        assert gateway is not None
        with gateway:
            gateway.settimeout(1)
            accepted, address = gateway.accept()
            assert address == client.getsockname()
            accepted.close()
        socket.create_connection(("127.0.0.1", listener.port), 1).close()  # one gateway's end ends nothing
        client.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", listener.port), 1)


def test_a_socket_from_systemd_is_taken_and_what_is_no_listening_socket_is_refused(tmp_path: Path) -> None:
    assert inherited_listener({}) is None
    assert inherited_listener({"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid() + 1)}) is None
    own = {"LISTEN_PID": str(os.getpid())}
    with pytest.raises(CommandError, match="one socket"):
        inherited_listener({**own, "LISTEN_FDS": "2"})
    with socket.socket() as deaf, (tmp_path / "file").open("wb") as file:
        for fd in ("99999", "x", "-1", str(os.dup(deaf.fileno())), str(os.dup(file.fileno()))):
            with pytest.raises(CommandError, match=LISTEN_VARIABLE):
                inherited_listener({LISTEN_VARIABLE: fd})
    code = (
        "import os, sys, socket\n"
        "from pagebus.cli.port import inherited_listener\n"
        "os.dup2(int(sys.argv[1]), 3)\n"
        "found = inherited_listener({'LISTEN_FDS': '1', 'LISTEN_PID': str(os.getpid())})\n"
        "print(found.getsockname()[1])"
    )
    with contextlib.closing(SharedListener("127.0.0.1", 0)) as listener:
        ended = subprocess.run(
            [sys.executable, "-c", code, str(listener.fd)],
            pass_fds=(listener.fd,),
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
        assert ended.stdout.strip() == str(listener.port), ended.stderr


def test_the_address_is_reachable() -> None:
    for host, expected in [("0.0.0.0", "127.0.0.1"), ("localhost", "localhost"), ("127.0.0.1", "127.0.0.1")]:
        listener = SharedListener(host, 0)
        assert listener.url == f"http://{expected}:{listener.port}"
        listener.close()


def test_capacity_in_words() -> None:
    assert Capacity(4096, 16, 8192).words() == "KV cache 65,536 tokens = 8 full-length requests of 8,192"
    assert Capacity(512, 16, 8192).words() == "KV cache 8,192 tokens = 1 full-length request of 8,192"
    assert "unknown" in Capacity(0, 0, 0).words()
    assert "lowered" not in Capacity(512, 16, 8192, 8192).words()
    assert (
        Capacity(32, 16, 512, 8192)
        .words()
        .endswith("(the context is lowered from 8,192: the cache holds no more)")
    )


def test_the_curl_command_survives_a_shell() -> None:
    words = shlex.split(curl_command("http://127.0.0.1:1", "it's/a model", has_key=False))
    assert words[:2] == ["curl", "http://127.0.0.1:1/v1/chat/completions"]
    assert json.loads(words[-1])["model"] == "it's/a model"
    assert "$API_KEY" in curl_command("http://127.0.0.1:1", "m", has_key=True)


@pytest.mark.parametrize(
    ("answer", "status", "has_capacity"),
    [
        (b'HTTP/1.1 200 OK\r\n\r\n{"num_blocks": 4, "block_size": 16, "max_model_len": 32}', 200, True),
        (b'HTTP/1.1 503 x\r\n\r\n{"reason": "no executor"}', 503, False),
        (b"HTTP/1.1 200 OK\r\n\r\nfine", 200, False),
        (b"HTTP/1.1 200 OK\r\n\r\n[]", 200, False),
        (b"\xff\xff", 0, False),
        (b"HTTP/1.1 x y\r\n\r\n", 0, False),
        (b"", 0, False),
    ],
)
async def test_asking_for_readiness_never_raises(answer: bytes, status: int, has_capacity: bool) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        found = await ask("127.0.0.1", server.sockets[0].getsockname()[1])
    assert found.status == status
    assert (found.capacity is not None) == has_capacity


async def test_nobody_there_is_status_zero() -> None:
    listener = SharedListener("127.0.0.1", 0)
    listener.close()
    assert (await ask("127.0.0.1", listener.port)).status == 0


STATUS = status_file.Status(os.getpid(), "1", "m", "http://127.0.0.1:9", "nats://c:p@h", 1, 2, 3, 4, 5)


def test_the_status_file_is_for_this_user_only(tmp_path: Path) -> None:
    directory = status_file.runtime_dir({"XDG_RUNTIME_DIR": str(tmp_path)})
    path = status_file.write(directory, 8000, STATUS)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert status_file.read_all(directory) == [STATUS]
    assert [file.name for file in directory.iterdir()] == ["serve-8000.json"]


def test_dead_and_broken_status_files_are_passed_over(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead = status_file.Status(**{**STATUS.__dict__, "pid": ended.pid})
    status_file.write(tmp_path, 1, dead)
    (tmp_path / "serve-2.json").write_text("{")
    (tmp_path / "serve-3.json").write_text('{"pid": 1}')
    assert status_file.read_all(tmp_path) == []


def test_status_without_a_server(tmp_path: Path) -> None:
    ended = pagebus("status", XDG_RUNTIME_DIR=str(tmp_path))
    assert ended.returncode == 1
    assert "no pagebus serve" in ended.stderr
    listed = pagebus("status", "--json", XDG_RUNTIME_DIR=str(tmp_path))
    assert listed.returncode == 1
    assert json.loads(listed.stdout) == []


def test_a_service_gets_its_settings_and_only_its_own_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NATS_URL", "nats://tool:secret@h")
    monkeypatch.setenv("PAGEBUS_CONFIG", "/some/file")
    monkeypatch.setenv("PAGEBUS_API_KEY", "old")
    settings = ServeSettings(
        model="/m", served_model_name=("a,b", "c"), api_key=("k,1",), horizon=3, dtype="float32", name="x"
    )
    roles = {"gateway": GatewaySettings, "scheduler": SchedulerSettings, "executor": ExecutorSettings}
    for role, struct in roles.items():
        environment = service_environment(role, 2, settings, f"nats://{role}:p@h")
        assert environment["NATS_URL"] == f"nats://{role}:p@h"
        assert "secret" not in str(environment)
        assert "PAGEBUS_CONFIG" not in environment
        read = read_settings(struct, [], environment)
        assert read == struct(
            **{key: value for key, value in vars(settings).items() if key in struct.__dataclass_fields__}
            | {"name": f"x-{role}-2"}
        )
        if role != "gateway":
            assert "k,1" not in str(environment)


def test_a_bus_of_the_users_own_shows_no_password() -> None:
    bus = OwnBus("nats://user:p%40ss@host:4222")
    assert bus.url("gateway") == "nats://user:p%40ss@host:4222"
    assert bus.url("client") == "nats://host:4222"
    assert OwnBus("nats://host:1").url("client") == "nats://host:1"
    several = OwnBus("nats://user:p@a:1, user:q@b:2,nats://user:r@c:3")
    assert several.url("client") == "nats://a:1,nats://b:2,nats://c:3"


def test_instance_names() -> None:
    names = {instance_name("executor", "") for _ in range(100)}
    assert len(names) == 100
    assert all(is_part(name) for name in names)
    assert instance_name("executor", "mine") == "mine"


def test_logs_are_json_lines_with_extras_and_traceback() -> None:
    out = StringIO()
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    hook = sys.excepthook
    try:
        logs.configure("gateway", "info", out)
        log = logging.getLogger("pagebus.test")
        log.debug("not shown")
        log.info("a line\nbreak", extra={"port": 8000, "path": Path("/x")})
        logging.getLogger("other").info("not shown")
        try:
            raise ValueError("broken")
        except ValueError:
            log.exception("it failed")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.getLogger("pagebus").setLevel(logging.NOTSET)
        logging.captureWarnings(capture=False)
        sys.excepthook = hook
    first, second = [json.loads(line) for line in out.getvalue().splitlines()]
    assert first["message"] == "a line\nbreak"
    assert (first["service"], first["level"], first["port"], first["path"]) == ("gateway", "info", 8000, "/x")
    assert "ValueError: broken" in second["traceback"]


def test_an_unknown_command_in_process(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nothing"]) == 2
    assert "'nothing'" in capsys.readouterr().err


async def test_an_answer_that_comes_in_two_parts_is_read_whole() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.write(b'{"num_blocks": 4, "block_size": 16, "max_model_len": 32, "full_model_len": 64}')
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        readiness = await ask("127.0.0.1", server.sockets[0].getsockname()[1])
    assert readiness.capacity == Capacity(4, 16, 32, 64)
