"""Each processor is transformers' own where it has one, and a plain reference's everywhere."""

import math
from array import array
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pagebus.bus.messages import Sampling, pack_ids
from pagebus.executor.batch import RowInput
from pagebus.executor.filters import temperatures_of, thresholds
from pagebus.executor.logits_processors import flaw_of, is_changing, last_of_bad_words, processed
from pagebus.executor.scan import scan
from tests.support.draws import changed_logits, draw, words

SIZE = 300
HISTORY = [5, 17, 17, 250, 3, 9, 17, 9, 299, 0, 3]


def some_logits(num_rows: int = 1, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randn(num_rows, SIZE) * 3


def changed(logits: torch.Tensor, *rows: RowInput) -> torch.Tensor:
    return processed(scan(logits), rows)


def by_transformers(logits: torch.Tensor, *processors: LogitsProcessor) -> torch.Tensor:
    ids, scores = torch.tensor([HISTORY]), logits.clone()
    for processor in processors:
        scores = processor(ids, scores)
    return scores


@pytest.mark.parametrize("penalty", [0.01, 0.7, 1.3, 2.0, 100.0])
def test_repetition_penalty(penalty: float) -> None:
    logits = some_logits()
    row = draw(Sampling(repetition_penalty=penalty), history=array("i", HISTORY), num_prompt=4)
    expected = by_transformers(logits, RepetitionPenaltyLogitsProcessor(penalty))
    assert torch.equal(changed(logits, row), expected)


def test_bad_words() -> None:
    """One id, a word that matches, one that does not, and one longer than everything so far."""
    logits = some_logits()
    bad = [[44], [0, 3, 7], [3, 8], [9, 3, 11], [1] * 12 + [60], [3, 3], [0, 3, 299]]
    row = draw(Sampling(bad_words=words(*bad)), history=array("i", HISTORY), num_prompt=10)
    expected = by_transformers(logits, NoBadWordsLogitsProcessor(bad, eos_token_id=2))
    assert torch.equal(changed(logits, row), expected)
    assert torch.isneginf(expected).nonzero()[:, 1].tolist() == [3, 7, 8, 44, 299]


def test_bad_words_of_an_empty_history() -> None:
    assert last_of_bad_words(words([4, 5], [6]), []) == [6]
    assert last_of_bad_words(words([4, 5], [4]), array("i", [4])) == [5, 4]


def test_banned_ids_are_minimal_length() -> None:
    logits = some_logits()
    expected = by_transformers(
        logits,
        MinNewTokensLengthLogitsProcessor(prompt_length_to_skip=8, min_new_tokens=4, eos_token_id=[2, 7]),
    )
    assert torch.equal(changed(logits, draw(Sampling(), banned_ids=(2, 7))), expected)
    suppressed = by_transformers(logits, SuppressTokensLogitsProcessor([2, 7]))
    assert torch.equal(expected, suppressed)


def test_logit_bias() -> None:
    logits = some_logits()
    bias = {5: -100.0, 9: 100.0, 250: 0.25}
    expected = by_transformers(
        logits, SequenceBiasLogitsProcessor([[[id], value] for id, value in bias.items()])
    )
    assert torch.equal(changed(logits, draw(Sampling(logit_bias=bias))), expected)


def test_allowed_ids() -> None:
    logits = some_logits()
    kept = changed(logits, draw(Sampling(allowed_token_ids=pack_ids([250, 3, 3]))))
    assert torch.isfinite(kept).nonzero()[:, 1].tolist() == [3, 250]
    assert torch.equal(kept[0, [3, 250]], logits[0, [3, 250]])


@pytest.mark.parametrize("presence", [-2.0, 0.0, 0.6, 2.0])
@pytest.mark.parametrize("frequency", [-2.0, 0.0, 0.4, 2.0])
def test_presence_and_frequency_see_what_was_generated(presence: float, frequency: float) -> None:
    logits = some_logits()
    sampling = Sampling(presence_penalty=presence, frequency_penalty=frequency)
    row = draw(sampling, history=HISTORY, num_prompt=4)
    expected = logits.clone()
    for id, count in {3: 2, 9: 2, 17: 1, 299: 1, 0: 1}.items():
        expected[0, id] -= frequency * count
        expected[0, id] -= presence
    assert torch.allclose(changed(logits, row), expected, rtol=0, atol=1e-6)
    assert is_changing(row) == (presence != 0 or frequency != 0)


warpers: dict[str, tuple[Sampling, Callable[[], list[LogitsProcessor]]]] = {
    "temperature": (Sampling(temperature=0.7), lambda: [TemperatureLogitsWarper(0.7)]),
    "top_k": (Sampling(top_k=17), lambda: [TopKLogitsWarper(17)]),
    "top_k beyond": (Sampling(top_k=10**6), lambda: [TopKLogitsWarper(10**6)]),
    "top_p": (Sampling(top_p=0.9), lambda: [TopPLogitsWarper(0.9)]),
    "tiny top_p": (Sampling(top_p=1e-9), lambda: [TopPLogitsWarper(1e-9)]),
    "min_p": (Sampling(min_p=0.03), lambda: [MinPLogitsWarper(0.03)]),
    "all": (
        Sampling(temperature=1.4, min_p=0.002, top_k=40, top_p=0.95),
        lambda: [
            TemperatureLogitsWarper(1.4), MinPLogitsWarper(0.002), TopKLogitsWarper(40),
            TopPLogitsWarper(0.95),
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", warpers)
@pytest.mark.parametrize("seed", range(5))
def test_filters(kind: str, seed: int) -> None:
    """The same ids stay, with the same distances between their scores; ties do not occur here."""
    sampling, make = warpers[kind]
    scanned = scan(some_logits(seed=seed))
    temperatures = temperatures_of([sampling], torch.device("cpu"))
    limit = thresholds(scanned, temperatures, [sampling])
    scores = (scanned.logits - scanned.tops[:, None]) / temperatures[:, None]
    ours = scores.masked_fill(scores < limit[:, None], -math.inf)
    theirs = by_transformers(scanned.logits, *make())
    assert torch.allclose(ours, theirs - theirs.max(), rtol=0, atol=1e-5)


def test_ties_stay_together() -> None:
    """Where transformers' top-p and top-k differ: top-p there cuts equal logits by sorting order."""
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    for sampling in (Sampling(top_k=2), Sampling(top_p=0.6)):
        limit = thresholds(scan(logits), torch.ones(1), [sampling])
        assert (logits - 2 >= limit[:, None]).tolist() == [[True, True, True, True, False]]
    assert int(torch.isfinite(by_transformers(logits, TopKLogitsWarper(2))).sum()) == 4
    assert int(torch.isfinite(by_transformers(logits, TopPLogitsWarper(0.6))).sum()) < 4


ids = st.integers(0, SIZE - 1)
any_sampling = st.builds(
    Sampling,
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    repetition_penalty=st.floats(0.01, 100),
    logit_bias=st.dictionaries(st.integers(-2, SIZE + 2), st.floats(-100, 100), max_size=6),
    allowed_token_ids=st.lists(st.integers(-2, SIZE + 2), max_size=20).map(pack_ids),
    bad_words=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), max_size=5).map(
        lambda w: words(*w)
    ),
)


@settings(max_examples=100, deadline=None)
@given(
    samplings=st.lists(any_sampling, min_size=1, max_size=5),
    history=st.lists(st.one_of(ids, st.integers(0, 3)), max_size=30),
    num_prompt=st.integers(0, 10),
    banned=st.lists(st.integers(-1, SIZE + 5), max_size=3),
    seed=st.integers(0, 100),
)
def test_all_together_against_plain_python(
    samplings: list[Sampling], history: list[int], num_prompt: int, banned: list[int], seed: int
) -> None:
    rows = [
        draw(sampling, history=history[n:], num_prompt=num_prompt, banned_ids=banned[: n % 4])
        for n, sampling in enumerate(samplings)
    ]
    logits = some_logits(len(rows), seed)
    together = changed(logits, *rows)
    for n, row in enumerate(rows):
        expected = torch.tensor(changed_logits(logits[n].double().tolist(), row), dtype=torch.float64)
        assert torch.allclose(together[n].double(), expected, rtol=1e-5, atol=1e-4)
        assert torch.equal(together[n : n + 1], changed(logits[n : n + 1], row)), "others had a part in it"


def test_history_may_grow_afterwards() -> None:
    history = array("i", HISTORY)
    kept = changed(
        some_logits(), draw(Sampling(frequency_penalty=1.0, bad_words=words([1, 2])), history=history)
    )
    history.append(4)
    assert kept.shape == (1, SIZE)


def test_flaws() -> None:
    assert flaw_of(Sampling(bad_words=words([1], [2, 3]), allowed_token_ids=pack_ids([1]))) is None
    assert flaw_of(Sampling(bad_words=(b"",))) is not None
    assert flaw_of(Sampling(bad_words=(b"abcde",))) is not None
    assert flaw_of(Sampling(allowed_token_ids=b"abc")) is not None
