"""The systems before paging: small cases worked out by hand, and the paper's ordering."""

import numpy as np
import pytest

from pagebus.bench.paper_contiguous import BestFitAllocator, BuddyAllocator
from pagebus.bench.paper_contiguous_run import (
    POLICIES,
    ContiguousRun,
    reserve_max,
    reserve_oracle,
    reserve_pow2,
    run_static,
)
from pagebus.bench.paper_cost import MACHINES, CostModel
from pagebus.bench.paper_lengths import SHAREGPT, SimRequest, draw_lengths, to_requests, unit_gaps

COST = CostModel(machine=MACHINES["opt-13b"])


@pytest.mark.parametrize(
    ("num_prompt", "num_output", "pow2", "oracle"),
    [(10, 25, 42, 35), (10, 32, 42, 42), (10, 1, 11, 11), (1000, 1040, 2048, 2040)],
)
def test_reservations(num_prompt: int, num_output: int, pow2: int, oracle: int) -> None:
    request = SimRequest(0.0, num_prompt, (num_output,))
    assert (reserve_max(request), reserve_pow2(request), reserve_oracle(request)) == (2048, pow2, oracle)


def test_one_request_takes_a_step_for_each_token() -> None:
    request = SimRequest(0.0, 100, (3,))
    outcome = ContiguousRun([request], reserve_oracle, BuddyAllocator(4096), COST, 0.0).run()
    expected_s = COST.step_s(100, 1, 100) + COST.step_s(1, 1, 100) + COST.step_s(1, 1, 101)
    assert outcome.num_steps == 3
    assert outcome.end_s == pytest.approx(expected_s)
    assert outcome.normalized_latency_s == pytest.approx(expected_s / 3)


def test_the_head_waits_for_memory_and_nobody_overtakes() -> None:
    long, short = SimRequest(0.0, 1000, (500,)), SimRequest(0.0, 10, (5,))
    run = ContiguousRun([long, long, short], reserve_oracle, BestFitAllocator(2048), COST, 0.0)
    outcome = run.run()
    # The second would fit after the first alone, and the short one beside the first: it waits for the second.
    assert outcome.num_steps == 1000


def test_a_request_that_never_fits_is_an_error() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        ContiguousRun([SimRequest(0.0, 10, (5,))], reserve_max, BuddyAllocator(1024), COST, 0.0).run()


@pytest.mark.parametrize("kind", [BuddyAllocator, BestFitAllocator])
def test_shares_sum_to_the_pool_and_better_knowledge_holds_more(
    kind: type[BuddyAllocator | BestFitAllocator],
) -> None:
    requests = to_requests(draw_lengths(SHAREGPT, 300, 0), np.zeros(300))
    shares = []
    for reservation in POLICIES.values():
        outcome = ContiguousRun(requests, reservation, kind(15_728), COST, 20.0).run()
        assert outcome.shares is not None
        parts = outcome.shares
        total = parts.token_state + parts.reserved + parts.never_used + parts.unused
        assert total == pytest.approx(1.0)
        shares.append(parts.token_state)
    assert shares == sorted(shares)
    assert shares[0] == pytest.approx(0.204, abs=0.03)


def test_running_requests_follow_the_load() -> None:
    lengths = draw_lengths(SHAREGPT, 200, 0)
    for rate, low, high in ((0.02, 0.1, 0.6), (3.0, 6.5, 7.0)):
        requests = to_requests(lengths, unit_gaps(200, 0) / rate)
        outcome = ContiguousRun(requests, reserve_max, BuddyAllocator(15_728), COST, 0.0).run()
        assert low < outcome.num_running <= high
        assert outcome.shares is None


def test_a_static_batch_ends_with_its_longest() -> None:
    requests = [SimRequest(0.0, 10, (n,)) for n in (5, 40, 7)]
    outcome = run_static(requests, 2 * 2048, COST)  # two at a time
    assert outcome.num_steps == 40 + 7
    expected_s = sum(COST.step_s(20 if k == 0 else 2, 2, 20 + 2 * k) for k in range(40))
    expected_s += sum(COST.step_s(10 if k == 0 else 1, 1, 10 + k) for k in range(7))
    assert outcome.end_s == pytest.approx(expected_s)
    assert outcome.tokens_per_s == pytest.approx(52 / expected_s)
