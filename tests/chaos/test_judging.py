"""The judge itself: every wrong history is found, and a bar that is not reached is told."""

from collections import Counter

import pytest

from pagebus.bus.messages import Sampling
from tests.chaos.history import StreamHistory, percentile
from tests.chaos.load import Marks, Repetition, judge
from tests.chaos.report import COMPLETE, Bar, Row, table
from tests.chaos.specs import StreamSpec

SPEC = StreamSpec(
    name="s", path="requester", prompt=(5, 6, 7), num_choices=2, sampling=Sampling(seed=3), max_tokens=6
)


def told(history: StreamHistory, choice: int, start: int, end: int, *, now_s: float = 1.0) -> None:
    """Ids [start, end) of a choice, as they must be."""
    expected = SPEC.expected[choice]
    reason = expected.finish_reason if end == len(expected.ids) else None
    history.tokens(choice, start, expected.ids[start:end], "", reason, now_s)


def complete() -> StreamHistory:
    history = StreamHistory(SPEC)
    history.begin(0.0)
    for choice in range(2):
        told(history, choice, 0, 4)
        told(history, choice, 4, 6, now_s=3.0)
    history.end(4.0)
    return history


def test_a_right_history_has_no_flaw() -> None:
    history = complete()
    assert history.is_complete
    assert history.violations() == []
    assert history.stalls(0.5) == 2.0
    assert history.stalls(3.5) == 0.0


def test_lost_doubled_and_changed_ids_are_found() -> None:
    lost = StreamHistory(SPEC)
    told(lost, 0, 0, 2)
    told(lost, 0, 4, 6)
    assert "2 ids lost" in lost.violations()[0]
    doubled = StreamHistory(SPEC)
    told(doubled, 0, 0, 4)
    told(doubled, 0, 3, 6)
    assert "1 ids doubled" in doubled.violations()[0]
    changed = StreamHistory(SPEC)
    ids = SPEC.expected[1].ids
    changed.tokens(1, 0, [ids[0], ids[1] + 1], "", None, 1.0)
    assert f"id 1 is {ids[1] + 1} instead of {ids[1]}" in changed.violations()[0]
    swapped = StreamHistory(SPEC)
    swapped.tokens(0, 0, SPEC.expected[1].ids, "", None, 1.0)
    assert "id 0 is" in swapped.violations()[0]


def test_wrong_ends_are_found() -> None:
    twice = complete()
    twice.end(5.0)
    assert "ended 2 times" in twice.violations()[0]
    late = complete()
    late.tokens(0, 6, [1], "", None, 5.0)
    assert "tokens after the end" in late.violations()[0]
    early = StreamHistory(SPEC)
    for choice in range(2):
        told(early, choice, 0, 4)
    early.end(2.0)
    flaws = " ".join(early.violations())
    assert "without a finish reason" in flaws
    assert "4 ids instead of 6" in flaws


@pytest.mark.parametrize("text", ["abx", "ab", "abcd"])
def test_a_wrong_text_is_found(text: str) -> None:
    spec = StreamSpec(
        name="t", path="http", prompt=(9,), num_choices=1, sampling=Sampling(temperature=0.0), max_tokens=3
    )
    (expected,) = spec.expected
    history = StreamHistory(spec)
    history.tokens(0, 0, expected.ids, expected.text or "", expected.finish_reason, 1.0)
    history.end(1.0)
    assert history.violations() == []
    history.choices[0].texts = [text]
    assert "the text differs" in history.violations()[0]


def test_a_missed_bar_is_told() -> None:
    right, failed = complete(), StreamHistory(SPEC)
    failed.fail("timeout", "nobody answered", 9.0)
    result = Repetition("4/x/1")
    marks = Marks(struck_s=0.5, counts=Counter(late_plans_obeyed=0))
    judge(result, [right, failed], marks)
    row = Row(
        "x", "a fault", (*COMPLETE, Bar("stall_max_s", 1.5), Bar("late_plans_obeyed", 0, is_exact=True))
    )
    assert row.missed[0] == "no repetition ran"
    row.repetitions.append(result)
    assert row.missed == ["incomplete = 0", "stall_max_s < 1.5"]
    assert "MISSED" in table([row])
    assert "[4/x/1] s (requester): timeout: nobody answered" in table([row])
    row.slack = 2.0
    assert row.missed == ["incomplete = 0"]


def test_percentiles() -> None:
    assert percentile([], 0.99) == 0.0
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([float(number) for number in range(100)], 0.99) == 99.0
