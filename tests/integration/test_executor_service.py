"""The executor's service on a real nats-server, with a scheduler written by hand."""

from pathlib import Path

import pytest

from pagebus.executor.fake import FakeRunner, fake_sequence
from tests.support import executor_tests
from tests.support.executor_tests import LIFE, PROMPTS, Check, executor, scheduler
from tests.support.hand_scheduler import HandScheduler
from tests.support.nats import connected, open_server, running_server

CHECKS: list[Check] = [
    executor_tests.check_lost_plans,
    executor_tests.check_preemption,
    executor_tests.check_epoch_change,
    executor_tests.check_step_failure,
    executor_tests.check_out_of_memory,
    executor_tests.check_drain,
    executor_tests.check_nobody_listens,
    executor_tests.check_stop,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_on_nats(check: Check, tmp_path: Path) -> None:
    async with open_server(tmp_path) as server, connected(server, "client", "client") as buses:
        await check(*buses)


@pytest.mark.parametrize("horizon", [1, 4, 16])
async def test_results_are_the_same_for_every_horizon_on_nats(tmp_path: Path, horizon: int) -> None:
    async with open_server(tmp_path) as server, connected(server, "client", "client") as buses:
        await executor_tests.check_horizon(*buses, horizon)


async def test_the_roles_of_the_deploy_configuration_are_enough() -> None:
    async with (
        running_server() as server,
        connected(server, "executor", "scheduler", "gateway") as (executor_bus, scheduler_bus, gateway_bus),
    ):
        hand = HandScheduler("ex")
        runner = FakeRunner(num_blocks=64, max_model_len=256, step_time_s=0.01)
        async with scheduler(scheduler_bus, hand, gateway_bus) as lead, executor(executor_bus, runner):
            hand.add("r0", PROMPTS[4], max_tokens=150, life=LIFE)  # nobody answers there: its rows end
            hand.add("r1", PROMPTS[5], max_tokens=150)
            lead.poke()
            await lead.until_finished("r1")
            await lead.until(lambda: bool(lead.failures))
        assert lead.failures[0].code == "nobody_listens"
        assert lead.received["r1"] == fake_sequence(PROMPTS[5], 150)
