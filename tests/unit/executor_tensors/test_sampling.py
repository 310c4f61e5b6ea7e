"""Drawn ids follow the exact probabilities, and depend on nothing but their own row."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pagebus.bus.messages import Sampling, pack_ids
from pagebus.executor.batch import RowInput
from pagebus.executor.filters import temperatures_of, thresholds
from pagebus.executor.race import Race
from pagebus.executor.sampling import sample
from pagebus.executor.scan import scan
from pagebus.kernels.gumbel import noise_key
from tests.support.draws import assert_drawn_from, changed_logits, draw, ids_of, probabilities, words

GREEDY = Sampling(temperature=0)
FILTERS = [
    Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for temperature, top_k, top_p, min_p in product((1.0, 0.6), (0, 5), (1.0, 0.8), (0.0, 0.08))
]


@pytest.mark.parametrize(
    "sampling", FILTERS, ids=lambda s: f"t{s.temperature}-k{s.top_k}-p{s.top_p}-m{s.min_p}"
)
def test_chi_square_of_filters(sampling: Sampling) -> None:
    torch.manual_seed(3)
    logits = torch.randn(90) * 1.5  # a whole group of noise and a part of one
    num_draws = 6000
    expected = torch.tensor(probabilities(logits.double().tolist(), sampling))
    rows = [draw(sampling, choice=i % 7, index=i) for i in range(num_draws)]
    counts = torch.bincount(torch.tensor(ids_of(logits.expand(num_draws, -1), rows)), minlength=90).double()
    assert_drawn_from(counts, expected)


PROCESSED = {
    "bias": (Sampling(logit_bias={3: 1.5, 8: -2.0, 11: -100.0}), {}),
    "allowed": (Sampling(allowed_token_ids=pack_ids([1, 4, 5, 11])), {}),
    "bad words": (Sampling(bad_words=words([4], [2, 7], [1, 2, 8], [9, 2, 0])), {}),
    "penalties": (Sampling(presence_penalty=0.7, frequency_penalty=-0.3, repetition_penalty=1.4), {}),
    "banned": (GREEDY, {"banned_ids": (0, 6, 9)}),
    "all": (
        Sampling(
            temperature=0.8, top_k=7, top_p=0.95, min_p=0.02, presence_penalty=-0.5, frequency_penalty=0.2,
            repetition_penalty=0.9, logit_bias={5: 2.0}, allowed_token_ids=pack_ids(range(1, 12)),
            bad_words=words([2, 4]),
        ),
        {"banned_ids": (3,)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", PROCESSED)
def test_chi_square_of_processors(kind: str) -> None:
    torch.manual_seed(4)
    logits = torch.randn(12)
    sampling, more = PROCESSED[kind]
    if sampling is GREEDY:
        sampling = Sampling()
    num_draws = 6000
    rows = [
        draw(sampling, index=i, history=[3, 3, 9, 5, 1, 5, 1, 2], num_prompt=3, **more)
        for i in range(num_draws)
    ]
    expected = torch.tensor(probabilities(changed_logits(logits.double().tolist(), rows[0]), sampling))
    assert (expected > 0).sum() > 1
    counts = torch.bincount(torch.tensor(ids_of(logits.expand(num_draws, -1), rows)), minlength=12).double()
    assert_drawn_from(counts, expected)


def test_neighbouring_counters_are_independent() -> None:
    """Pairs of draws at consecutive indexes, choices and seeds fall evenly over all pairs."""
    flat = torch.zeros(6000, 5)

    def drawn(seed: int, choice: int, shift: int) -> torch.Tensor:
        rows = [draw(Sampling(seed=seed), choice, i + shift) for i in range(6000)]
        return torch.tensor(ids_of(flat, rows))

    first = drawn(1, 0, 0)
    for other in (drawn(1, 0, 1), drawn(1, 1, 0), drawn(2, 0, 0)):
        pairs = torch.bincount(first * 5 + other, minlength=25).double()
        chi = ((pairs - 240) ** 2 / 240).sum()
        assert 5 < chi < 60, chi  # 24 degrees of freedom


penalties = st.sampled_from([0.0, 0.0, 2.0, -2.0, 0.3])
samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 1e-6, 1e-5, 0.3, 1.0, 2.0, 1e6]),
    top_k=st.sampled_from([0, 1, 2, 50, 127, 128, 129, 3000, 10**9]),
    top_p=st.sampled_from([1.0, 0.999999, 0.9, 0.3, 1e-9]),
    min_p=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    seed=st.integers(0, 2**64 - 1),
    presence_penalty=penalties,
    frequency_penalty=penalties,
    repetition_penalty=st.sampled_from([1.0, 1.0, 0.01, 1.3, 100.0]),
    logit_bias=st.dictionaries(st.integers(0, 3000), st.sampled_from([-100.0, -1.0, 5.0, 100.0]), max_size=4),
    allowed_token_ids=st.lists(st.integers(0, 3000), max_size=4).map(
        lambda ids: pack_ids([*ids, 1]) if ids else b""
    ),
    bad_words=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4), max_size=3).map(
        lambda w: words(*w)
    ),
)


@st.composite
def random_rows(draw_from: st.DrawFn) -> RowInput:
    history = draw_from(st.lists(st.integers(0, 5), max_size=12))
    return draw(
        draw_from(samplings),
        choice=draw_from(st.integers(0, 3)),
        index=draw_from(st.integers(0, 50)),
        history=history,
        num_prompt=min(len(history), 4),
        banned_ids=draw_from(st.sampled_from([(), (), (0,), (2, 5000)])),
    )


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(random_rows(), min_size=1, max_size=7),
    size=st.sampled_from([3, 64, 500, 9000]),
    seed=st.integers(0, 1000),
    is_coarse=st.booleans(),
)
def test_a_row_draws_the_same_alone_and_in_any_place(
    rows: list[RowInput], size: int, seed: int, is_coarse: bool
) -> None:
    """Whatever its parameters and those of the others; an error too is its own."""
    torch.manual_seed(seed)
    logits = torch.randn(len(rows), size) * 3
    if is_coarse:  # many ties, as bfloat16 makes them
        logits = logits.round()
    for row in rows:
        row.history = [id for id in row.history if id < size]
    before = logits.clone()
    together = sample(scan(logits), rows)
    assert torch.equal(logits, before), "others still need the model's own logits"
    backwards = sample(scan(logits.flip(0)), rows[::-1])
    for i, row in enumerate(rows):
        alone = sample(scan(logits[i : i + 1]), [row])
        mirrored = len(rows) - 1 - i
        assert alone.flaws.get(0) == together.flaws.get(i) == backwards.flaws.get(mirrored)
        changed = changed_logits(logits[i].tolist(), row)
        assert (max(changed) == -math.inf) == (i in together.flaws)
        if i in together.flaws:
            continue
        assert alone.ids[0] == together.ids[i] == backwards.ids[mirrored]
        assert changed[together.ids[i]] > -math.inf
        is_narrow = row.sampling.top_k == 1 or row.sampling.top_p < 0.01 or row.sampling.min_p == 1
        if row.sampling.temperature == 0 or is_narrow:
            assert changed[together.ids[i]] == pytest.approx(max(changed), abs=1e-4)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_rows_of_large_vocabularies_draw_the_same_in_every_batch(num_threads: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(32, 40_001) * torch.linspace(0.2, 4, 32)[:, None]
    kinds = [
        {},
        {"top_k": 50},
        {"top_p": 0.9},
        {"min_p": 0.05},
        {"top_p": 0.9999},
        {"top_k": 5000, "top_p": 0.7},
    ]
    rows = [draw(Sampling(seed=i, **kinds[i % 6]), index=i) for i in range(32)]
    threads = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        alone = [ids_of(logits[i : i + 1], rows[i : i + 1])[0] for i in range(32)]
        for size in (2, 7, 32):
            assert ids_of(logits[:size], rows[:size]) == alone[:size]
    finally:
        torch.set_num_threads(threads)
    assert len(set(alone)) > 20


@settings(max_examples=100, deadline=None)
@given(
    sampling=samplings,
    seed=st.integers(0, 1000),
    scale=st.sampled_from([0.0, 0.1, 1.0, 4.0]),
    size=st.sampled_from([2, 130, 2100, 20_000]),
)
def test_thresholds_keep_what_the_filters_keep(
    sampling: Sampling, seed: int, scale: float, size: int
) -> None:
    torch.manual_seed(seed)
    scores = torch.randn(size) * scale
    scores -= scores.max()
    sampling = Sampling(top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p)
    limit = thresholds(scan(scores[None]), torch.ones(1), [sampling])[0]
    assert limit <= 0
    kept = scores >= limit
    if scale == 0:  # all equal: all stay
        assert kept.all()
        return
    expected = torch.tensor(probabilities(scores.double().tolist(), sampling)) > 0
    differing = kept != expected
    assert scores.exp()[differing].sum() <= 2e-5 * scores.exp().sum()  # rounding at the nucleus's edge
    assert sampling.top_p < 1 or not differing.any()


@pytest.mark.parametrize("temperature", [1e-30, 1e-5, 1.0, 1e6, 1e38, math.inf])
def test_temperatures_at_their_bounds(temperature: float) -> None:
    torch.manual_seed(1)
    logits = torch.randn(400, 30) * 2
    rows = [draw(Sampling(temperature=temperature, seed=1), index=i) for i in range(400)]
    ids = torch.tensor(ids_of(logits, rows))
    if temperature <= 1e-5:
        assert torch.equal(ids, logits.argmax(-1))
    if temperature >= 1e6:  # flat
        assert_drawn_from(torch.bincount(ids, minlength=30).double(), torch.full((30,), 1 / 30))


def test_greedy_takes_the_first_of_equals() -> None:
    logits = torch.zeros(2, 400)
    logits[0, 30] = logits[0, 300] = 1
    assert ids_of(logits, [draw(GREEDY), draw(GREEDY)]) == [30, 0]


def test_rows_without_an_id_left_fail_alone() -> None:
    logits = torch.zeros(7, 20)
    logits[6, 3] = float("nan")
    rows = [
        draw(Sampling(allowed_token_ids=pack_ids([3])), banned_ids=(3,)),
        draw(GREEDY),
        draw(Sampling(allowed_token_ids=pack_ids([50, -1]))),
        draw(Sampling(logit_bias={4: math.nan})),
        draw(Sampling(logit_bias={4: math.inf}, temperature=0)),
        draw(Sampling(allowed_token_ids=pack_ids([3, 7])), banned_ids=(3,)),
        draw(GREEDY),
    ]
    made = sample(scan(logits), rows)
    assert set(made.flaws) == {0, 2, 3, 4, 6}
    assert made.ids[1] == 0
    assert made.ids[5] == 7
    assert "no id" in made.flaws[0]
    assert "penalties or logit_bias" in made.flaws[3]
    assert "the model" in made.flaws[6]


@pytest.mark.parametrize("size", [12, 65, 5000])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0, 10.0])
def test_few_groups_decide_as_all_do(size: int, scale: float) -> None:
    """The host's way, which rules groups out, and the way of a GPU."""
    torch.manual_seed(5)
    scanned = scan(torch.randn(200, size) * scale)
    keys = torch.tensor([noise_key(i, 0, i) for i in range(200)])
    for limit in (-math.inf, -3.0, 0.0):
        race = Race(scanned, torch.ones(200), torch.full((200,), limit), keys)
        assert torch.equal(race.winners(), race.winners_of_all())


def test_nucleus_beyond_the_prefix() -> None:
    logits = torch.zeros(3, 40_000)
    logits[:, 7] = 1.0
    rows = [draw(Sampling(top_p=0.9999, seed=s), index=s) for s in range(3)]
    assert len(set(ids_of(logits, rows))) == 3
    torch.manual_seed(2)
    scanned = scan(torch.randn(4, 60_000))
    for top_p in (0.5, 0.9, 0.99, 0.99999):
        samplings = [
            Sampling(top_p=top_p, top_k=k, min_p=m) for k, m in ((0, 0), (9000, 0), (0, 0.05), (9000, 0.02))
        ]
        limits = thresholds(scanned, temperatures_of(samplings, torch.device("cpu")), samplings)
        for row, sampling in enumerate(samplings):
            scores = (scanned.logits[row] - scanned.tops[row]).double()
            expected = (torch.tensor(probabilities(scores.tolist(), sampling)) > 0).sum()
            assert abs(int((scores >= limits[row]).sum()) - int(expected)) <= 3
