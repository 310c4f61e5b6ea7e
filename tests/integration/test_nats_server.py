import stat

import pytest

from pagebus.cli import nats_server
from pagebus.cli.errors import CommandError
from pagebus.cli.nats_server import EmbeddedNats, find_configuration, find_server, parse_version


def program(path, says: str) -> None:
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)


def test_the_variable_wins(tmp_path):
    own = tmp_path / "my-server"
    program(own, "nats-server: v2.15.1")
    assert find_server({"PAGEBUS_NATS_SERVER": str(own)}) == own


def test_a_wrong_variable_is_named(tmp_path):
    with pytest.raises(CommandError, match="PAGEBUS_NATS_SERVER names"):
        find_server({"PAGEBUS_NATS_SERVER": str(tmp_path / "nothing")})


def test_none_at_all_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(nats_server.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(CommandError, match="no nats-server found") as caught:
        find_server({"PATH": str(tmp_path)})
    assert "\n" not in str(caught.value)
    on_path = tmp_path / "nats-server"
    program(on_path, "")
    assert find_server({"PATH": str(tmp_path)}) == on_path


@pytest.mark.parametrize(
    ("text", "version"), [("nats-server: v2.15.1", (2, 15)), ("v10.0.0-beta.1\n", (10, 0))]
)
def test_versions(text, version):
    assert parse_version(text) == version


def test_no_version():
    with pytest.raises(CommandError, match="names no version"):
        parse_version("Segmentation fault")


@pytest.mark.parametrize(
    ("says", "why"), [("nats-server: v2.10.9", "needs 2.11 or newer"), ("hello", "names no version")]
)
async def test_an_unusable_server_is_refused_before_it_starts(says, why, tmp_path, monkeypatch):
    program(tmp_path / "old", says)
    monkeypatch.setenv("PAGEBUS_NATS_SERVER", str(tmp_path / "old"))
    server = EmbeddedNats()
    with pytest.raises(CommandError, match=why):
        await server.start()
    assert not server.is_running


async def test_a_broken_configuration_is_told_and_nothing_stays(tmp_path):
    configuration = tmp_path / "broken.conf"
    configuration.write_text("port: {{{")
    server = EmbeddedNats(configuration=configuration)
    with pytest.raises(CommandError, match=r"did not start: .*line 1"):
        await server.start()
    store = server.store
    assert store.stat().st_mode & 0o777 == 0o700
    assert store.parent.stat().st_mode & 0o777 == 0o700
    await server.stop()
    assert not store.exists()


async def test_a_taken_port_is_told():
    one = EmbeddedNats()
    await one.start()
    other = EmbeddedNats(port=one.port)
    try:
        with pytest.raises(CommandError, match=r"did not start.*address already in use"):
            await other.start()
    finally:
        await other.stop()
        await one.stop()


async def test_credentials_stay_over_restarts_and_off_the_command_line():
    server = EmbeddedNats()
    await server.start()
    try:
        before, port, pid = server.url("scheduler"), server.port, server.pid
        with open(f"/proc/{pid}/cmdline", "rb") as file:  # noqa: ASYNC230
            command_line = file.read()
        for role in nats_server.ROLES:
            password = server.url(role).rpartition("@")[0].rpartition(":")[2]
            assert len(password) >= 32
            assert password.encode() not in command_line
        await server.restart()
        assert server.pid != pid
        assert (server.url("scheduler"), server.port) == (before, port)
        await server.start()  # runs: nothing to do
    finally:
        await server.stop()
    assert server.pid == 0
    with pytest.raises(ValueError, match="no role"):
        server.url("admin")
    assert len({EmbeddedNats().url(role) for role in nats_server.ROLES}) == len(nats_server.ROLES)


def test_the_configuration_lists_no_way_around_the_users():
    text = "\n".join(
        line for line in find_configuration().read_text().splitlines() if not line.lstrip().startswith("#")
    )
    for word in ("no_auth_user", "websocket", "mqtt", "leafnodes", "deny", "http", "allow_responses"):
        assert word not in text
