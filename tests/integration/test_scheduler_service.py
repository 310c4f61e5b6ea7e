"""The scheduler's service on a real nats-server, in the roles of the deployed configuration."""

from tests.support.nats import connected, running_server
from tests.unit.scheduler import service_checks as checks


async def test_many_requests_finish_with_their_own_ids():
    async with running_server() as server, connected(server, "scheduler", "executor", "gateway") as buses:
        await checks.many_requests_finish_with_their_own_ids(*buses, horizon=8, max_num_batched_tokens=64)


async def test_rubbish_harms_nobody():
    async with running_server() as server, connected(server, "scheduler", "executor", "gateway") as buses:
        await checks.rubbish_on_every_subject_harms_nobody(*buses)


async def test_a_standby_takes_over_and_streams_go_on():
    async with (
        running_server() as server,
        connected(server, "scheduler", "scheduler", "executor", "gateway") as buses,
    ):
        await checks.a_standby_takes_over_and_streams_go_on(buses)
