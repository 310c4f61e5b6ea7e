"""The cost model meets the two points that it was fitted to, and moves as hardware does."""

import pytest

from pagebus.bench.paper_cost import MACHINES, CostModel

COST = CostModel(machine=MACHINES["opt-13b"])


@pytest.mark.parametrize(
    ("rate", "num_running", "mean_output", "mean_context"),
    [(2.0, 30.42, 337.99, 458), (30.0, 132.44, 58.45, 77)],
    ids=["ShareGPT", "Alpaca"],
)
def test_step_time_is_what_the_papers_batches_imply(
    rate: float, num_running: float, mean_output: float, mean_context: int
) -> None:
    """Little's law: running = rate x time in the system; that time over the tokens made is a step's."""
    implied_s = num_running / rate / mean_output
    num_rows = round(num_running)
    assert COST.step_s(num_rows, num_rows, num_rows * mean_context, 16) == pytest.approx(implied_s, rel=0.15)


def test_memory_is_that_of_the_papers_table() -> None:
    slots = {name: machine.num_slots for name, machine in MACHINES.items()}
    assert slots == {"opt-13b": 15_728, "opt-66b": 9_696, "opt-175b": 60_064}
    machine = MACHINES["opt-13b"]
    assert machine.kv_bytes_per_token == 800 * 1024
    assert machine.kv_bytes_per_token * machine.num_slots == pytest.approx(12 * 2**30, rel=0.001)


def test_small_blocks_are_slower_and_no_blocks_are_fastest() -> None:
    times = [COST.step_s(30, 30, 15_000, size) for size in (1, 2, 4, 8, 16, 32, 64, 128, 256)]
    assert times == sorted(times, reverse=True)
    assert COST.step_s(30, 30, 15_000) < times[-1]
    kv_s = [COST.step_s(1, 1, 15_000, size) - COST.step_s(1, 1, 0, size) for size in (16, None)]
    assert kv_s[0] / kv_s[1] == pytest.approx(1.25)


def test_weights_hide_a_few_tokens_and_long_prompts_do_not() -> None:
    assert COST.step_s(1, 1, 0) == COST.step_s(64, 1, 0)
    assert COST.step_s(2048, 1, 0) > 10 * COST.step_s(1, 1, 0)
