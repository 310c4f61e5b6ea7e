"""Log-probabilities are the log-softmax of the logits, ranked with ties broken by id."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pagebus.executor.logprobs import describe, describe_each, joined
from pagebus.executor.scan import scan
from tests.support.draws import read


@settings(max_examples=60, deadline=None)
@given(
    num_rows=st.integers(1, 12),
    size=st.sampled_from([1, 7, 64, 300, 5000]),
    num_top=st.sampled_from([0, 1, 5, 20, 6000]),
    seed=st.integers(0, 1000),
    is_coarse=st.booleans(),
)
def test_against_log_softmax(num_rows: int, size: int, num_top: int, seed: int, is_coarse: bool) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(num_rows, size) * 4
    if is_coarse:
        logits = logits.round()
    given_ids = torch.randint(size, (num_rows,))
    told = describe(scan(logits), given_ids.tolist(), num_top)
    assert told.num_top == min(num_top, size)
    ids, values, ranks = read(told)
    exact = logits.double().log_softmax(-1)
    ordered = logits.sort(dim=-1, descending=True, stable=True).indices[:, : told.num_top]
    assert torch.equal(ids, torch.cat((given_ids[:, None], ordered), 1))
    assert torch.allclose(values.double(), exact.gather(1, ids), rtol=0, atol=1e-5)
    assert torch.equal(ranks, (logits >= logits.gather(1, given_ids[:, None])).sum(-1))


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_row_is_told_the_same_in_every_batch(num_threads: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(32, 40_001) * 3
    given_ids, nums_top = torch.randint(40_001, (32,)).tolist(), [(0, 5, 20, 1)[n % 4] for n in range(32)]
    threads = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        alone = [describe(scan(logits[n : n + 1]), given_ids[n : n + 1], nums_top[n]) for n in range(32)]
        for size in (2, 7, 32):
            together = describe_each(scan(logits[:size]), given_ids[:size], nums_top[:size])
            assert together == alone[:size]
        ninth = scan(logits[3:12]).some([6, 0])
        assert describe_each(ninth, [given_ids[9], given_ids[3]], [nums_top[9], nums_top[3]]) == [
            alone[9],
            alone[3],
        ]
    finally:
        torch.set_num_threads(threads)


def test_parts_are_joined() -> None:
    logits = torch.randn(9, 200)
    whole = describe(scan(logits), list(range(9)), 3)
    parts = [describe(scan(logits[at : at + 4]), list(range(at, min(at + 4, 9))), 3) for at in (0, 4, 8)]
    assert joined(parts) == whole
