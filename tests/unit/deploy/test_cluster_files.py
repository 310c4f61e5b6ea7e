"""The files of a cluster of NATS servers: what they name exists, nats-server takes them; no engine needed."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pagebus.bus.nats_bus import split_urls
from pagebus.cli.nats_server import find_server

ROOT = Path(__file__).resolve().parents[3]
SERVERS = ("nats", "nats-2", "nats-3")
PASSWORD = "s3cret-_"


def compose() -> dict[str, dict[str, dict[str, object]]]:
    return yaml.safe_load((ROOT / "deploy" / "compose-cluster.yaml").read_text("utf-8"))


def environment(service: str) -> dict[str, str]:
    """As compose gives it, with the password of every role in place."""
    given = compose()["services"][service]["environment"]
    assert isinstance(given, dict)
    return {name: re.sub(r"\$\{\w+(:\?[^}]*)?\}", PASSWORD, str(value)) for name, value in given.items()}


@pytest.mark.needs("check-jsonschema")
def test_it_is_valid() -> None:
    command = [Path(sys.executable).parent / "check-jsonschema", "--builtin-schema", "vendor.compose-spec"]
    file = ROOT / "deploy" / "compose-cluster.yaml"
    ended = subprocess.run([*command, file], capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize("server", SERVERS)
def test_the_nats_server_takes_what_it_is_given(server, tmp_path):
    for name in ("nats-server.conf", "nats-cluster.conf"):
        shutil.copy(ROOT / "deploy" / name, tmp_path)
    variables = environment(server) | {"PAGEBUS_NATS_STORE": f'"{tmp_path}"'}
    command = [find_server(), "--config", tmp_path / "nats-cluster.conf", "-t"]
    ended = subprocess.run(command, capture_output=True, text=True, env=variables, check=False, timeout=30)
    assert ended.returncode == 0, ended.stderr
    for name in variables:
        fewer = {key: value for key, value in variables.items() if key != name}
        ended = subprocess.run(command, capture_output=True, text=True, env=fewer, check=False, timeout=30)
        assert ended.returncode != 0, f"{name} is given and not read"


def test_every_server_has_a_name_of_its_own_and_routes_to_the_others():
    names = {environment(server)["PAGEBUS_NATS_NAME"] for server in SERVERS}
    assert len(names) == len(SERVERS)
    for server in SERVERS:
        routes = re.findall(r"nats://route:([^@]+)@([\w-]+):6222", environment(server)["PAGEBUS_NATS_ROUTES"])
        assert routes == [(PASSWORD, other) for other in SERVERS]


@pytest.mark.parametrize("role", ["gateway", "scheduler", "executor"])
def test_every_service_knows_all_servers(role):
    urls = split_urls(environment(role)["NATS_URL"])
    assert urls == [f"nats://{role}:{PASSWORD}@{server}:4222" for server in SERVERS]


def test_no_password_is_written_down():
    text = (ROOT / "deploy" / "compose-cluster.yaml").read_text("utf-8")
    for line in text.splitlines():
        if not line.startswith("#") and ("PASSWORD:" in line or "nats://" in line):
            assert "${PAGEBUS_NATS_" in line, line


def test_what_is_mounted_exists():
    for server in SERVERS:
        volumes = compose()["services"][server]["volumes"]
        assert isinstance(volumes, list)
        for volume in volumes:
            source = str(volume).partition(":")[0]
            assert not source.startswith("./") or (ROOT / source).is_file()
