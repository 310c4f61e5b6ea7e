"""The real scheduler core in virtual time: memory is accounted for, and paging keeps what the paper says."""

import numpy as np
import pytest

from pagebus.bench.paper_cost import MACHINES, CostModel
from pagebus.bench.paper_lengths import (
    ALPACA,
    SHAREGPT,
    SimRequest,
    draw_lengths,
    to_requests,
    unit_gaps,
)
from pagebus.bench.paper_paging import PagingConfig, PagingRun
from pagebus.bus.messages import Plan

COST = CostModel(machine=MACHINES["opt-13b"])
CONFIG = PagingConfig(cost=COST)


def test_paging_holds_the_papers_share_of_token_state() -> None:
    """At the default horizon, grants ahead counted as waste; also of the pool, free blocks counted too."""
    requests = to_requests(draw_lengths(SHAREGPT, 400, 0), np.zeros(400))
    shares = PagingRun(requests, CONFIG, 30.0).run().shares
    assert shares is not None
    parts = (shares.unfilled, shares.granted_ahead, shares.prompt_ahead, shares.freed_late, shares.unused)
    assert shares.token_state + sum(parts) == pytest.approx(1.0)
    assert min(parts) > 0.0
    assert shares.of_held >= 0.96
    assert shares.token_state >= 0.95


def test_a_longer_horizon_grants_more_ahead() -> None:
    requests = to_requests(draw_lengths(SHAREGPT, 120, 0), np.zeros(120))
    ahead = []
    for horizon in (1, 8, 32):
        run = PagingRun(requests, PagingConfig(cost=COST, horizon=horizon), 10.0)
        shares = run.run().shares
        assert shares is not None
        ahead.append(shares.granted_ahead)
    assert ahead[0] < ahead[1] < ahead[2]


def test_one_request_takes_a_step_for_each_token() -> None:
    run = PagingRun([SimRequest(0.0, 100, (30,))], CONFIG, 0.0)
    outcome = run.run()
    assert outcome.num_steps == 30
    least_s = COST.step_s(100, 1, 100, 16) + 29 * COST.step_s(1, 1, 100, 16)
    assert least_s < outcome.end_s < least_s + 0.02  # the bus: plan, report


@pytest.mark.parametrize("seed", range(3))
def test_no_block_is_in_two_tables_where_nothing_is_shared(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = to_requests(draw_lengths(ALPACA, 300, seed), unit_gaps(300, seed) / 200)
    run = PagingRun(requests, PagingConfig(cost=COST, seed=seed), 0.0)
    take, most = run.executor.take, []

    def checked(plan: Plan) -> bool:
        is_taken = take(plan)
        most.append(int(run.executor.uses.max()))
        return is_taken

    monkeypatch.setattr(run.executor, "take", checked)
    run.run()
    assert max(most) == 1


def test_choices_share_their_prompt() -> None:
    """Two choices of a long prompt and a short answer hold little more than one."""
    saved = {}
    for num_choices in (1, 2, 4):
        requests = [SimRequest(2.0 * i, 800, (16,) * num_choices) for i in range(8)]
        saved[num_choices] = PagingRun(requests, CONFIG, 0.0).run().sharing_saved
    assert saved[1] == 0.0
    assert 0.35 < saved[2] < 0.5
    assert 0.55 < saved[4] < 0.75


def test_the_same_seed_gives_the_same_run() -> None:
    requests = to_requests(draw_lengths(SHAREGPT, 60, 7), unit_gaps(60, 7) / 3)
    first, again = (PagingRun(requests, CONFIG, 0.0).run() for _ in range(2))
    assert first == again


def test_requests_that_hardly_fit_are_preempted_and_all_end() -> None:
    requests = [SimRequest(0.0, 500, (1400,)) for _ in range(30)]
    outcome = PagingRun(requests, CONFIG, 0.0).run()
    assert outcome.num_preemptions > 0
    assert outcome.num_steps >= 1400
