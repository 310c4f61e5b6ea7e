"""Who may publish and subscribe what, on a real nats-server with the deploy configuration."""

import asyncio

import pytest

from pagebus.bus import subjects
from pagebus.bus.nats_bus import NatsBus
from pagebus.bus.protocol import BusError, Msg, NoRespondersError, NotPermittedError
from pagebus.cli.nats_server import ROLES
from tests.support.buses import until_kept
from tests.support.nats import RawConnection, connected, eventually, running_server

MODEL = "some/model"

PUBLISH = {
    subjects.generate(MODEL): {"gateway", "tool"},
    subjects.hello(MODEL): {"executor"},
    subjects.step_done(MODEL): {"executor"},
    subjects.heartbeat(MODEL): {"scheduler"},
    subjects.plan("ex-1"): {"scheduler"},
    subjects.out("gw-1"): {"scheduler", "executor"},
    subjects.life("gw-1"): {"executor", "gateway"},
    subjects.api_generate(MODEL): {"client"},
    subjects.api_cancel(MODEL): {"client"},
    subjects.api_join(MODEL): {"gateway"},
    subjects.stream("r-1"): {"gateway"},
    "_INBOX_client.a.1": {"gateway"},
    "_INBOX_executor.a.1": {"gateway", "tool"},
    "_INBOX_gateway.a.1": {"gateway"},
    "_INBOX_scheduler.a.1": set(),
    "_INBOX_tool.a.1": set(),
    f"$KV.{subjects.BUCKET}.{subjects.leader_key(MODEL)}": {"scheduler"},
    f"$JS.API.STREAM.INFO.KV_{subjects.BUCKET}": {"scheduler"},
    f"$JS.API.STREAM.CREATE.KV_{subjects.BUCKET}": {"scheduler"},
    f"$JS.API.STREAM.DELETE.KV_{subjects.BUCKET}": set(),
    f"$JS.API.STREAM.PURGE.KV_{subjects.BUCKET}": set(),
    f"$JS.API.STREAM.UPDATE.KV_{subjects.BUCKET}": {"scheduler"},
    f"$JS.API.STREAM.MSG.GET.KV_{subjects.BUCKET}": {"scheduler"},
    f"$KV.{subjects.STREAMS_BUCKET}.s.r-1": {"gateway"},
    **{
        f"$JS.API.STREAM.{kind}.{stream}": {"gateway"}
        for kind in ("INFO", "CREATE", "UPDATE", "MSG.GET")
        for stream in (f"KV_{subjects.STREAMS_BUCKET}", subjects.OUT_LOG)
    },
    **{
        f"$JS.API.STREAM.{kind}.{stream}": set()
        for kind in ("DELETE", "PURGE", "MSG.DELETE", "SNAPSHOT", "PEER.REMOVE")
        for stream in (f"KV_{subjects.STREAMS_BUCKET}", subjects.OUT_LOG, f"KV_{subjects.BUCKET}")
    },
    f"$JS.API.DIRECT.GET.{subjects.OUT_LOG}": {"gateway"},
    f"$JS.API.CONSUMER.CREATE.{subjects.OUT_LOG}": set(),
    "$JS.API.STREAM.CREATE.other": set(),
    "$JS.API.INFO": set(),
    "$SYS.REQ.SERVER.PING": set(),
    "$KV.other.key": set(),
    "pagebus.other": set(),
    "anything": set(),
}

SUBSCRIBE = {
    subjects.generate(MODEL): {"scheduler"},
    subjects.hello(MODEL): {"scheduler"},
    subjects.step_done(MODEL): {"scheduler"},
    subjects.heartbeat(MODEL): {"gateway", "scheduler", "executor", "tool"},
    subjects.plan("ex-1"): {"executor"},
    subjects.out("gw-1"): {"gateway", "tool"},
    subjects.life("gw-1"): {"gateway", "tool"},
    subjects.api_generate(MODEL): {"gateway"},
    subjects.api_cancel(MODEL): {"gateway"},
    subjects.api_join(MODEL): {"gateway"},
    subjects.stream("r-1"): {"client"},
    "_INBOX_client.a.*": {"client"},
    "_INBOX_executor.a.*": {"executor"},
    "_INBOX_gateway.a.*": {"gateway"},
    "_INBOX_scheduler.a.*": {"scheduler"},
    "_INBOX_tool.a.*": {"tool"},
    "_INBOX.>": set(),
    f"$KV.{subjects.BUCKET}.>": set(),
    "$SYS.>": set(),
    "pagebus.>": set(),
    "pagebus.*.*": set(),
    ">": set(),
}


async def test_every_role_publishes_its_own_subjects_only():
    async with running_server() as server:
        for role in ROLES:
            async with RawConnection(server.url(role)) as raw:
                for subject, allowed in PUBLISH.items():
                    await raw.send(f"PUB {subject} 0\r\n\r\n".encode())
                    said = await raw.sync()
                    refused = any(b"Permissions Violation for Publish" in line for line in said)
                    assert refused is (role not in allowed), (role, subject, said)


@pytest.mark.parametrize("queue", ["", "some-queue"])
async def test_every_role_subscribes_to_its_own_subjects_only(queue):
    async with running_server() as server:
        for role in ROLES:
            async with RawConnection(server.url(role)) as raw:
                for number, (subject, allowed) in enumerate(SUBSCRIBE.items(), 1):
                    await raw.send(f"SUB {subject} {queue} {number}\r\n".encode())
                    said = await raw.sync()
                    refused = any(b"Permissions Violation for Subscription" in line for line in said)
                    assert refused is (role not in allowed), (role, subject, said)


async def test_nobody_comes_in_without_a_password():
    async with running_server() as server:
        for credentials in ("", "client:wrong@", "nobody:nothing@"):
            with pytest.raises(NotPermittedError):
                await NatsBus.connect(f"nats://{credentials}127.0.0.1:{server.port}", name="x", timeout_s=10)


async def test_a_refused_subscription_is_told():
    async with running_server() as server, connected(server, "client") as [client]:
        with pytest.raises(NotPermittedError, match="may not subscribe"):
            await client.subscribe("pagebus.>", lambda message: None)
        got: list[Msg] = []
        await client.subscribe(subjects.stream("Mixed-Case"), got.append)
        with pytest.raises(BusError):
            await client.key_value(subjects.BUCKET)
        async with connected(server, "gateway") as [gateway]:
            await gateway.publish(subjects.stream("Mixed-Case"), b"x")
            await eventually(lambda: got)


async def test_the_scheduler_keeps_its_bucket():
    async with running_server() as server, connected(server, "scheduler", "scheduler") as [one, other]:
        bucket = await one.key_value(subjects.BUCKET)
        revision = await bucket.create(subjects.leader_key(MODEL), b"1")
        await bucket.update(subjects.leader_key(MODEL), b"2", revision)
        await server.restart()
        await eventually(lambda: one.is_connected and other.is_connected)
        entry = await (await other.key_value(subjects.BUCKET)).get(subjects.leader_key(MODEL))
        assert entry is not None
        assert entry.value == b"2"


async def test_gateways_keep_records_and_read_the_log():
    async with running_server() as server, connected(server, "gateway", "gateway", "executor") as buses:
        one, other, executor = buses
        records = await one.key_value(subjects.STREAMS_BUCKET, max_age_s=60)
        await records.create("s.r-1", b"1")
        arguments = {"max_age_s": 60, "max_bytes": 1 << 20}
        await one.message_log(subjects.OUT_LOG, [subjects.ALL_OUT], **arguments)
        await executor.publish(subjects.out("gw-1"), b"tokens")
        log = await other.message_log(subjects.OUT_LOG, [subjects.ALL_OUT], **arguments)
        await until_kept(log, 1)
        assert [stored async for stored in log.read(subjects.out("gw-1"), 1)] == [(1, b"tokens")]
        assert (await (await other.key_value(subjects.STREAMS_BUCKET)).get("s.r-1")) == (b"1", 1)
        with pytest.raises(NoRespondersError):  # nothing keeps probes of life, so that "nobody" is told
            await executor.request(subjects.life("gw-1"), b"", timeout_s=5)


async def test_clients_and_executors_get_answers_from_gateways():
    async with running_server() as server, connected(server, "client", "executor", "gateway") as buses:
        client, executor, gateway = buses
        answers: list[Msg] = []
        await gateway.subscribe(subjects.api_generate(MODEL), answers.append, queue=subjects.GATEWAY_QUEUE)
        await gateway.subscribe(subjects.life("gw-1"), answers.append)
        for bus, subject in ((client, subjects.api_generate(MODEL)), (executor, subjects.life("gw-1"))):
            answers.clear()
            task = asyncio.ensure_future(bus.request(subject, b"?", timeout_s=5))
            await eventually(lambda: answers)
            await gateway.publish(answers[0].reply, b"!")
            assert (await task).data == b"!"
