"""Requests of a real requester over a real nats-server that dies, with the deploy configuration's roles."""

import asyncio

from pagebus.bus.messages import Heartbeat, Sampling, encode
from pagebus.bus.nats_bus import NatsBus
from pagebus.bus.subjects import heartbeat, plan
from pagebus.cli.nats_server import EmbeddedNats
from pagebus.requester.client import Requester
from pagebus.requester.events import Event, RequestSpec
from tests.support.fake_server import MODEL, FakeServer, assert_whole
from tests.support.nats import connected, eventually, running_server

PROMPT = list(range(1, 41))


async def collect(requester: Requester, name: str, max_tokens: int) -> list[Event]:
    spec = RequestSpec(
        request_id=name,
        prompt=PROMPT,
        max_tokens=max_tokens,
        num_choices=2,
        sampling=Sampling(num_logprobs=3, num_prompt_logprobs=2),
        timeout_s=60.0,
    )
    return [event async for event in requester.generate(spec)]


async def run_streams(server: EmbeddedNats, scheduler: NatsBus, gateway: NatsBus, num_kills: int) -> None:
    fake = FakeServer(scheduler)
    await fake.start()
    requester = Requester(gateway, model=MODEL, instance="gw")
    await requester.start()
    await fake.beat()
    streams = [asyncio.ensure_future(collect(requester, f"r{number}", 100)) for number in range(32)]
    for _ in range(num_kills):
        await asyncio.sleep(0.4)
        await server.restart()
        await eventually(lambda: scheduler.is_connected and gateway.is_connected)
    for number, events in enumerate(await asyncio.wait_for(asyncio.gather(*streams), 50)):
        assert_whole(events, f"r{number}", 2, 100, num_logprobs=3, num_prompt_logprobs=2, prompt=PROMPT)
    assert requester.num_live == 0
    assert requester.counters["asked"] == 32
    assert (requester.counters["asked_again"] > 0) is (num_kills > 0)
    await requester.close()


async def test_32_streams_over_nats():
    async with running_server() as server, connected(server, "scheduler", "gateway") as [scheduler, gateway]:
        await run_streams(server, scheduler, gateway, 0)


async def test_32_streams_while_the_bus_is_killed_twice():
    async with running_server() as server, connected(server, "scheduler", "gateway") as [scheduler, gateway]:
        await run_streams(server, scheduler, gateway, 2)
        assert gateway.counters["reconnects"] == 2


async def test_what_other_roles_cannot_forge():
    """A client's heartbeat, with a higher epoch, never arrives; an executor cannot send plans."""
    async with (
        running_server() as server,
        connected(server, "client", "executor", "gateway", "scheduler") as buses,
    ):
        client, executor, gateway, scheduler = buses
        requester = Requester(gateway, model=MODEL, instance="gw")
        await requester.start()
        forged = encode(Heartbeat(scheduler="x", model=MODEL, epoch=10**9))
        await client.publish(heartbeat(MODEL), forged)
        await executor.publish(heartbeat(MODEL), forged)
        await executor.publish(plan("other"), b"")
        true = encode(Heartbeat(scheduler="s", model=MODEL, epoch=1))
        await scheduler.publish(heartbeat(MODEL), true)
        await eventually(lambda: requester.heartbeat)
        await eventually(lambda: client.counters["permission_errors"] == 1)
        await eventually(lambda: executor.counters["permission_errors"] == 2)
        assert requester.heartbeat is not None
        assert requester.heartbeat.epoch == 1
        await requester.close()
