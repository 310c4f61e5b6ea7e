"""The NATS bus against a real nats-server: every trap of the client library, and outages."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import uvloop
from nats import errors

from pagebus.bus.nats_bus import NatsBus
from pagebus.bus.protocol import (
    BusError,
    MessageLog,
    Msg,
    NotConnectedError,
    NotPermittedError,
    RequestTimeoutError,
    Stored,
)
from pagebus.cli.nats_server import EmbeddedNats, free_port
from tests.support.buses import CHECKS, until_kept
from tests.support.nats import RawConnection, connected, eventually, open_server, running_server


@pytest.fixture
async def server(tmp_path) -> AsyncIterator[EmbeddedNats]:
    async with open_server(tmp_path) as running:
        yield running


@pytest.fixture
async def buses(server) -> AsyncIterator[list[NatsBus]]:
    async with connected(server, "client", "client") as pair:
        yield pair


async def assert_alive(bus: NatsBus, sender: RawConnection) -> None:
    """The bus still receives, on the connection that it had."""
    got: list[Msg] = []
    await bus.subscribe("alive", got.append)
    await sender.publish(b"alive", b"")
    await eventually(lambda: got)
    assert bus.counters["reconnects"] == 0


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_does_what_every_bus_does(check, buses):
    await check(*buses)


@pytest.mark.parametrize(
    "poison",
    [
        {"subject": b"pagebus.\xff", "data": b"x"},
        {"subject": b"pagebus.a", "data": b"x", "reply": b"r.\xff\xfe"},
        {"subject": b"pagebus.a", "data": b"", "headers": b"NATS/1.0 \xff\xff\xff\r\n\r\n"},
        {"subject": b"pagebus.a", "data": b"", "headers": b"NATS/1.0 503 \xff\r\n\r\n"},
        {"subject": b"pagebus.a", "data": b"x", "headers": b"NATS/1.0\r\n\xff: b\r\n\r\n"},
    ],
)
async def test_poison_is_counted_and_dropped(poison, server, buses):
    bus = buses[0]
    got: list[Msg] = []
    await bus.subscribe("pagebus.>", got.append)
    async with RawConnection(server.url("client")) as raw:
        await raw.publish(**poison)
        await eventually(lambda: bus.counters["poisoned"] == 1)
        assert got == []
        await assert_alive(bus, raw)


@pytest.mark.parametrize(
    "headers",
    [
        b"NATS/1.0\r\nno colon\r\n\r\n",
        b"NATS/1.0\r\na: \xff\r\n\r\n",
        b"NATS/1.0\r\n\r\n",
        b"NATS/1.0   \r\n\r\n",
        b"NATS/1.0 200 OK\r\n: \r\n\r\n",
        b"HTTP/1.1 200\r\n\r\n",
    ],
)
async def test_odd_headers_do_not_hide_the_message(headers, server, buses):
    bus = buses[0]
    got: list[Msg] = []
    await bus.subscribe("pagebus.a", got.append)
    async with RawConnection(server.url("client")) as raw:
        await raw.publish(b"pagebus.a", b"data", headers=headers)
        await eventually(lambda: got or bus.counters["poisoned"])
        assert [message.data for message in got] == [b"data"]
        await assert_alive(bus, raw)


async def test_poison_for_the_inbox(server, buses):
    bus, other = buses
    await other.subscribe("pagebus.silent", lambda message: None)
    async with RawConnection(server.url("client")) as raw:
        asked = asyncio.ensure_future(bus.request("pagebus.silent", b"", timeout_s=1))
        await eventually(lambda: bus._inbox._is_open)
        prefix = bus._inbox._subject.encode()
        await raw.publish(prefix + b".\xff", b"x")
        await raw.publish(prefix + b".1", b"x", reply=b"\xff")
        await raw.publish(prefix + b".999", b"nobody waits for this")
        await eventually(lambda: bus.counters["poisoned"] == 2)
        with pytest.raises(RequestTimeoutError):
            await asked
        await assert_alive(bus, raw)


async def test_a_late_pong_after_a_flush_that_timed_out(server, buses):
    bus = buses[0]
    os.kill(server.pid, signal.SIGSTOP)
    status = Path(f"/proc/{server.pid}/stat")
    await eventually(lambda: ") T " in status.read_text())  # its threads stop one after the other
    try:
        with pytest.raises(errors.TimeoutError):
            await bus._client.flush(timeout=0.1)
    finally:
        os.kill(server.pid, signal.SIGCONT)
    async with RawConnection(server.url("client")) as raw:
        await assert_alive(bus, raw)
    assert bus.counters["read_loop_deaths"] == 0


async def test_a_server_error_reconnects_instead_of_closing(server, buses):
    bus = buses[0]
    got: list[Msg] = []
    await bus.subscribe("pagebus.a", got.append)
    # What the guard never lets through: payload and headers over the limit. The server says -ERR, hangs up.
    headers = b"NATS/1.0\r\na: b\r\n\r\n"
    size = bus.max_payload + 1
    await bus._client.publish_frame(
        b"HPUB x %d %d\r\n" % (len(headers), size) + headers + bytes(size - len(headers)) + b"\r\n"
    )
    await eventually(lambda: bus.counters["reconnects"] == 1)
    await buses[1].publish("pagebus.a", b"")
    await eventually(lambda: got)


async def test_an_error_that_leaves_the_connection_open(tmp_path):
    async with open_server(tmp_path, "max_subscriptions: 3") as server, connected(server, "client") as [bus]:
        for number in range(6):
            await bus.subscribe(f"pagebus.{number}", lambda message: None)
        assert bus.counters["server_errors"] >= 3
        assert bus.is_connected
        assert bus.counters["disconnects"] == 0


async def test_a_dead_read_loop_is_noticed_and_healed(server, buses):
    bus = buses[0]
    got: list[Msg] = []
    await bus.subscribe("pagebus.a", got.append)
    bus._client._reading_task.cancel()
    await eventually(lambda: bus.counters["reconnects"] == 1, timeout_s=3)
    assert bus.counters["read_loop_deaths"] == 1
    await buses[1].publish("pagebus.a", b"")
    await eventually(lambda: got)


async def test_a_dead_reconnection_is_started_again(server, buses):
    bus = buses[0]
    os.kill(server.pid, signal.SIGKILL)
    await server.wait()
    await eventually(lambda: bus._client._reconnection_task is not None)
    bus._client._reconnection_task.cancel()
    await eventually(lambda: bus.counters["reconnection_deaths"] >= 1)
    await server.start()
    await eventually(lambda: bus.is_connected)


async def test_a_killed_server_comes_back(server, buses):
    bus, other = buses
    calls: list[str] = []
    got: list[Msg] = []

    async def failing() -> None:
        calls.append("failing")
        raise RuntimeError("on purpose")

    async def reconnected() -> None:
        calls.append("reconnected")

    bus.on_reconnect(failing)
    bus.on_reconnect(reconnected)
    await bus.subscribe("pagebus.a", got.append)
    bucket = await bus.key_value("pagebus")
    revision = await bucket.put("k", b"kept")
    os.kill(server.pid, signal.SIGKILL)
    await server.wait()
    await eventually(lambda: not bus.is_connected and not other.is_connected)
    with pytest.raises(NotConnectedError):
        await other.publish("pagebus.a", b"lost")
    with pytest.raises(NotConnectedError):
        await other.request("pagebus.a", b"", timeout_s=1)
    with pytest.raises(BusError):
        await bucket.get("k")
    await server.start()
    await eventually(lambda: bus.is_connected and other.is_connected and len(calls) == 2)
    await other.publish("pagebus.a", b"new")
    await eventually(lambda: got)
    assert [message.data for message in got] == [b"new"]  # nothing was kept and sent late
    entry = await bucket.get("k")
    assert entry == (b"kept", revision)


def test_no_other_error_while_a_connection_breaks_under_uvloop(tmp_path):
    """Whoever publishes then must not die of it: between the socket's end and the read loop's word of it."""

    async def publish_on(bus: NatsBus, is_batch: bool) -> None:
        while True:
            try:
                await bus.publish("pagebus.a", b"x")
                if is_batch:
                    bus.publish_now("pagebus.a", b"y")
            except NotConnectedError:
                if not bus.is_connected:
                    return
            await asyncio.sleep(0)

    async def kill_it_often() -> None:
        unseen: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: unseen.append(context))
        async with open_server(tmp_path) as server:
            buses = [await NatsBus.connect(server.url("client"), name=f"g{number}") for number in range(4)]
            for round_number in range(5):
                publishing = [
                    asyncio.create_task(publish_on(bus, number % 2 == 0)) for number, bus in enumerate(buses)
                ]
                subscribing = asyncio.create_task(buses[0].subscribe("pagebus.b", print))
                await asyncio.sleep(0.05 if round_number else 0)
                os.kill(server.pid, signal.SIGKILL)
                await asyncio.wait_for(asyncio.gather(*publishing, subscribing), 10)
                await server.wait()
                await server.start()
                await eventually(lambda: all(bus.is_connected for bus in buses))
            for bus in buses:
                await bus.close()
        assert not unseen

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(kill_it_often())


async def test_an_answer_under_way_fails_with_the_connection(server, buses):
    bus, other = buses
    await other.subscribe("pagebus.silent", lambda message: None)
    asked = asyncio.ensure_future(bus.request("pagebus.silent", b"", timeout_s=30))
    await asyncio.sleep(0.1)
    await server.restart()
    with pytest.raises(NotConnectedError):
        await asyncio.wait_for(asked, 5)


async def test_a_subscription_under_way_does_not_wait_for_a_connection_that_broke(server, buses):
    bus, other = buses
    got: list[Msg] = []
    os.kill(server.pid, signal.SIGSTOP)
    subscribing = asyncio.ensure_future(bus.subscribe("pagebus.a", got.append))
    await asyncio.sleep(0.1)
    assert not subscribing.done()
    os.kill(server.pid, signal.SIGKILL)
    began_s = time.monotonic()
    await asyncio.wait_for(subscribing, 5)
    assert time.monotonic() - began_s < 1.0  # of the two seconds that the server may take for it
    assert bus.counters["flush_timeouts"] == 1
    await server.wait()
    await server.start()
    await eventually(lambda: bus.is_connected and other.is_connected)
    await other.publish("pagebus.a", b"new")
    await eventually(lambda: got)


async def test_a_bucket_that_the_server_lost_is_made_again(server, buses, tmp_path):
    bucket = await buses[0].key_value("pagebus")
    await bucket.put("k", b"1")
    await buses[1]._jetstream.call("STREAM.DELETE.KV_pagebus")
    assert await bucket.get("k") is None
    await bucket.create("k", b"2")


async def test_a_log_that_the_server_lost_is_made_again(server, buses):
    log = await buses[0].message_log("pagebus-out", ["pagebus.out.*"], max_age_s=60, max_bytes=1 << 20)
    await buses[0].publish("pagebus.out.a", b"1")
    await until_kept(log, 1)
    for use in (log.last_sequence, lambda: read_all(log, "pagebus.out.a")):
        await buses[1]._jetstream.call("STREAM.DELETE.pagebus-out")
        assert not await use()  # 0, or nothing
        await buses[0].publish("pagebus.out.a", b"2")
        await until_kept(log, 1)
        assert await read_all(log, "pagebus.out.a") == [(1, b"2")]


async def read_all(log: MessageLog, subject: str) -> list[Stored]:
    return [stored async for stored in log.read(subject, 1)]


async def test_a_bus_without_jetstream_says_so(tmp_path):
    configuration = tmp_path / "none.conf"
    configuration.write_text("host: 127.0.0.1\nport: $PAGEBUS_NATS_PORT\n")
    async with running_server(configuration) as server:
        bus = await NatsBus.connect(f"nats://127.0.0.1:{server.port}", name="x", timeout_s=5)
        with pytest.raises(BusError, match="no JetStream"):
            await bus.key_value("pagebus")
        with pytest.raises(BusError, match="no JetStream"):
            await bus.message_log("pagebus-out", ["pagebus.out.*"], max_age_s=60, max_bytes=1 << 20)
        await bus.close()


async def test_a_batch_that_came_in_part_is_asked_for_again(server, buses, monkeypatch):
    bus = buses[0]
    log = await bus.message_log("pagebus-out", ["pagebus.out.*"], max_age_s=60, max_bytes=1 << 20)
    for number in range(600):
        await bus.publish("pagebus.out.a", b"%d" % number)
    await until_kept(log, 600)
    take, num_answers = bus._inbox._take, 0

    def lossy(message: Msg) -> None:  # loses the 100th answer of all, and then the end of a batch
        nonlocal num_answers
        num_answers += "Nats-Num-Pending" in message.headers
        if num_answers in (100, 613):
            return
        take(message)

    bus._client._direct[next(sid for sid, handler in bus._client._direct.items() if handler == take)] = lossy
    assert [int(stored.data) for stored in await read_all(log, "pagebus.out.a")] == list(range(600))
    assert bus.counters["log_batches_cut"] >= 1


async def test_a_stopped_server_is_given_up_within_four_seconds(server, buses):
    bus = buses[0]
    os.kill(server.pid, signal.SIGSTOP)
    try:
        await eventually(lambda: not bus.is_connected, timeout_s=5)
        with pytest.raises(NotConnectedError):
            await bus.publish("pagebus.a", b"")
    finally:
        os.kill(server.pid, signal.SIGCONT)
    await eventually(lambda: bus.is_connected)


async def publish_many(bus: NatsBus, num_mebibytes: int) -> None:
    for _ in range(num_mebibytes):
        await bus.publish("pagebus.a", bytes(1 << 20))


async def test_a_server_that_takes_nothing_stops_publishers(server, buses):
    bus = buses[0]
    os.kill(server.pid, signal.SIGSTOP)
    try:
        with pytest.raises(NotConnectedError):
            await publish_many(bus, 100)
    finally:
        os.kill(server.pid, signal.SIGCONT)
    await eventually(lambda: bus.is_connected)


async def test_a_refused_user_is_told_at_once(server):
    with pytest.raises(NotPermittedError, match="refuses this user"):
        await NatsBus.connect(f"nats://client:wrong@127.0.0.1:{server.port}", name="x", timeout_s=10)


async def test_waits_for_a_server_that_comes_late(tmp_path, caplog):
    port = free_port()
    late = EmbeddedNats(port=port)
    connecting = asyncio.ensure_future(NatsBus.connect(late.url("gateway"), name="early", timeout_s=20))
    await asyncio.sleep(0.5)
    try:
        await late.start()
        bus = await connecting
        await bus.close()
    finally:
        await late.stop()
    waiting = [record for record in caplog.records if "waiting for the bus" in record.message]
    assert len(waiting) == 1
    assert late.url("gateway").rpartition("@")[0].rpartition(":")[2] not in waiting[0].message


async def test_gives_up_after_the_timeout():
    with pytest.raises(NotConnectedError, match="no bus answered"):
        await NatsBus.connect(f"nats://127.0.0.1:{free_port()}", name="x", timeout_s=0.5)


@pytest.mark.parametrize("url", ["http://127.0.0.1:4222", "nats://", "nats://host:port"])
async def test_what_is_no_url(url):
    with pytest.raises(ValueError, match=r"URL|[Pp]ort"):
        await NatsBus.connect(url, name="x", timeout_s=1)


async def test_a_password_may_hold_any_character(tmp_path):
    configuration = tmp_path / "one.conf"
    configuration.write_text(
        "host: 127.0.0.1\nport: $PAGEBUS_NATS_PORT\n"
        'authorization { users: [{ user: client, password: "p@:/%ss" }] }\n'
    )
    async with running_server(configuration) as server:
        url = f"nats://client:p%40%3A%2F%25ss@127.0.0.1:{server.port}"
        bus = await NatsBus.connect(url, name="x", timeout_s=5)
        await bus.close()


async def test_a_bus_closed_for_good_tells_its_owner(server):
    told: list[int] = []
    bus = await NatsBus.connect(server.url("client"), name="x", timeout_s=5, on_closed=lambda: told.append(1))
    await bus._client.close()  # nobody meant to
    assert told == [1]
    with pytest.raises(NotConnectedError):
        await bus.publish("a", b"")
    with pytest.raises(NotConnectedError):
        await bus.subscribe("a", lambda message: None)
    await bus.close()


@pytest.mark.parametrize("runner", ["asyncio", "uvloop"])
def test_a_bus_closed_for_good_ends_the_process(runner, tmp_path):
    program = textwrap.dedent(
        """
        import asyncio, sys, importlib
        from pathlib import Path
        from pagebus.bus.nats_bus import NatsBus
        from pagebus.cli.nats_server import EmbeddedNats

        async def main():
            server = EmbeddedNats()
            await server.start()
            bus = await NatsBus.connect(server.url("gateway"), name="x")
            await bus._client.close()
            await asyncio.sleep(20)

        importlib.import_module(sys.argv[1]).run(main())
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", program, runner],
        capture_output=True,
        timeout=15,
        check=False,
        env={"TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 1, done.stderr


async def test_close_sends_what_is_pending(server, buses):
    got: list[Msg] = []
    await buses[0].subscribe("pagebus.a", got.append)
    leaving = await NatsBus.connect(server.url("client"), name="leaving", timeout_s=5)
    for _ in range(500):
        await leaving.publish("pagebus.a", bytes(1000))
    await leaving.close()
    await leaving.close()
    await eventually(lambda: len(got) == 500)


async def test_garbage_from_the_server_is_no_end():
    """A server that speaks nonsense after the handshake: the bus reconnects, again and again."""
    num_connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_connections
        num_connections += 1
        writer.write(b'INFO {"server_id":"x","version":"2.11.0","max_payload":1048576,"headers":true}\r\n')
        await reader.readline()  # CONNECT
        await reader.readline()  # PING
        writer.write(b"PONG\r\n")
        await asyncio.sleep(0.05)
        writer.write(b"-ERR \r\n" if num_connections == 1 else b"WHAT IS THIS\r\n")
        await asyncio.sleep(5)
        writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    bus = await NatsBus.connect(f"nats://127.0.0.1:{port}", name="x", timeout_s=5)
    try:
        await eventually(lambda: num_connections >= 4, timeout_s=8)
    finally:
        await asyncio.wait_for(bus.close(), 10)
        listener.close()


def test_ctrl_c_in_the_terminal_does_not_reach_the_server(tmp_path):
    program = textwrap.dedent(
        """
        import asyncio, os, signal
        from pagebus.cli.nats_server import EmbeddedNats

        async def main():
            interrupted = asyncio.Event()
            asyncio.get_running_loop().add_signal_handler(signal.SIGINT, interrupted.set)
            server = EmbeddedNats()
            await server.start()
            os.killpg(os.getpgrp(), signal.SIGINT)  # what a terminal does
            await interrupted.wait()
            await asyncio.sleep(0.3)
            print("running" if server.is_running else "gone")
            await server.stop()

        asyncio.run(main())
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=15,
        check=False,
        start_new_session=True,
    )
    assert done.stdout.strip() == "running", done.stderr


def test_the_server_dies_with_its_launcher(tmp_path):
    program = textwrap.dedent(
        """
        import asyncio
        from pagebus.cli.nats_server import EmbeddedNats

        async def main():
            server = EmbeddedNats()
            await server.start()
            print(server.port, flush=True)
            await asyncio.sleep(60)

        asyncio.run(main())
        """
    )
    environment = {"TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as launcher:
        assert launcher.stdout is not None
        port = int(launcher.stdout.readline())
        socket.create_connection(("127.0.0.1", port), timeout=2).close()
        launcher.send_signal(signal.SIGKILL)
        launcher.wait()
    for _ in range(100):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=0.2).close()
        except OSError:
            return
        time.sleep(0.1)
    pytest.fail("nats-server outlived its launcher")
