"""Who follows a request has exactly what its owner received, whatever was lost on the way to the owner."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagebus.bus.messages import Failed, PromptRow, Rejected, Sampling, TokenRow, pack_ids, unpack_ids
from pagebus.requester.events import NewTokens, PromptLogprobs, RequestFailed, RequestSpec
from pagebus.requester.following import Following
from pagebus.requester.ownership import OwnerProbe, read_probe
from pagebus.requester.state import RequestState
from pagebus.requester.timing import Timing
from tests.support.logprobs import made_up_all


def spec(num_choices: int = 1, num_logprobs: int | None = None, **fields: object) -> RequestSpec:
    sampling = Sampling(num_logprobs=num_logprobs)
    return RequestSpec(
        request_id="r", prompt=[1, 2, 3], num_choices=num_choices, sampling=sampling, max_tokens=30, **fields
    )


def row(attempt: int, index: int, *ids: int, choice: int = 0, finish: str | None = None) -> TokenRow:
    return TokenRow(
        request_id="r", attempt=attempt, choice=choice, index=index, ids=pack_ids(ids), finish_reason=finish
    )


def ids_of(following: Following, choice: int = 0) -> list[int]:
    return list(following.received()[choice].ids)


def followed(*rows: TokenRow, **fields: object) -> Following:
    following = Following(spec(**fields))
    for one in rows:
        following.take_row(one)
    return following


def test_rows_extend_and_overlaps_are_cut():
    following = followed(row(1, 0, 10, 11), row(1, 1, 11, 12), row(1, 0, 10))
    assert ids_of(following) == [10, 11, 12]
    (event,) = following.news()
    assert (event.index, list(event.ids), event.finish_reason) == (0, [10, 11, 12], None)
    assert following.news() == []


def test_a_higher_attempt_says_what_the_owner_had():
    following = followed(row(1, 0, 10, 11, 12, 13), row(2, 2, 22, 23), row(1, 4, 14))
    assert ids_of(following) == [10, 11, 22, 23]
    assert following.attempt == 2


def test_what_was_given_out_stays():
    following = followed(row(1, 0, 10, 11, 12))
    following.news()
    following.take_row(row(2, 1, 21, 22, 23))
    assert ids_of(following) == [10, 11, 12, 23]


def test_holes_show_until_they_are_filled():
    following = followed(row(1, 0, 10), row(1, 2, 12))
    assert following.has_hole
    assert ids_of(following) == [10]
    following.take_row(row(1, 1, 11))
    assert following.has_hole
    following.take_row(row(1, 2, 12, finish="stop"))
    assert not following.has_hole
    assert following.is_over


def test_an_end_that_its_owner_missed_is_taken_back():
    following = followed(row(1, 0, 10, 11, finish="stop"), row(2, 1, 21))
    assert not following.is_over
    assert ids_of(following) == [10, 21]


def test_failures():
    final = Failed(request_id="r", attempt=1, code="poison", message="m")
    again = Failed(request_id="r", attempt=1, code="executor_lost", message="m", is_retryable=True)
    following = followed(row(1, 0, 10))
    following.take_end(again)
    assert not following.is_over
    following.take_row(row(2, 1, 11))
    following.take_end(final)  # of an attempt that is over
    assert not following.is_over
    following.take_end(Rejected(request_id="r", attempt=3, code="queue_full", message="m", retry_after_s=2.0))
    assert following.is_over
    assert following.news()[-1] == RequestFailed("queue_full", "m", True, 2.0)


def test_bad_rows_change_nothing():
    following = followed(row(1, 0, 10))
    for bad in (
        row(1, 1, 11, choice=3),
        row(1, 1, 11, choice=-1),
        TokenRow(request_id="r", index=1, ids=b"abc"),
        TokenRow(request_id="r", index=1, ids=pack_ids([11]), logprobs=made_up_all([11, 12], 0, 1)),
    ):
        following.take_row(bad)
    assert ids_of(following) == [10]


def test_the_prompt_comes_before_ids():
    following = Following(
        RequestSpec(
            request_id="r", prompt=[1, 2, 3, 4], sampling=Sampling(num_prompt_logprobs=0), max_tokens=5
        )
    )
    told = [made_up_all([2], 1, 0), made_up_all([3, 4], 2, 0)]
    following.take_prompt(PromptRow(request_id="r", start=1, logprobs=told[0]))
    following.take_row(row(1, 0, 10))
    assert following.news() == [PromptLogprobs(1, told[0])]
    assert following.received()[0].ids == ()
    following.take_prompt(PromptRow(request_id="r", start=2, logprobs=told[1]))
    assert [type(event) for event in following.news()] == [PromptLogprobs, NewTokens]
    assert following.num_prompt_told == 4


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 1 << 32), num_choices=st.integers(1, 3), has_logprobs=st.booleans())
def test_what_the_owner_received_comes_first(seed: int, num_choices: int, has_logprobs: bool) -> None:
    """Each attempt makes other ids, so that a wrong one shows. Rows get lost on the way to the owner only."""
    rng = random.Random(seed)
    num_top = 1 if has_logprobs else None
    one = spec(num_choices, num_top)
    owner = RequestState(
        one, model="m", reply="o", life="l", now_s=0.0, timing=Timing(), rng=random.Random(seed)
    )
    following = Following(one)
    told: list[list[int]] = [[] for _ in range(num_choices)]
    underway: list[TokenRow] = []
    for _ in range(rng.randint(1, 8)):
        asked = owner.ask(0.0)
        if asked is None:
            break
        made = {
            choice.index: len(unpack_ids(choice.ids)) for choice in asked.choices if not choice.finish_reason
        }
        for _ in range(rng.randint(0, 12)):
            choice = rng.choice(list(made))
            index, num_ids = made[choice], rng.randint(1, 2)
            if index + num_ids > 30:
                break
            new = [asked.attempt * 1000 + choice * 100 + index + at for at in range(num_ids)]
            made[choice] += num_ids
            finish = "length" if made[choice] == 30 else None
            logprobs = None if num_top is None else made_up_all(new, index, num_top)
            underway.append(
                TokenRow(
                    request_id="r",
                    attempt=asked.attempt,
                    choice=choice,
                    index=index,
                    ids=pack_ids(new),
                    finish_reason=finish,
                    logprobs=logprobs,
                )
            )
            while underway and rng.random() < 0.8:
                sent = underway.pop(0)
                following.take_row(sent)
                if rng.random() < 0.85:
                    owner.on_row(sent, 1, 0.0)
        if rng.random() < 0.2:
            for event in following.news():
                assert isinstance(event, NewTokens)
                assert event.index == len(told[event.choice])
                told[event.choice] += event.ids
                # What was given out may be more than the owner has: it stays. Nothing to compare any more.
            return
    for choice in range(num_choices):
        have = list(owner.ids(choice))
        assert ids_of(following, choice)[: len(have)] == have
    for event in following.news():
        assert isinstance(event, NewTokens)
        assert event.index == len(told[event.choice])
        told[event.choice] += event.ids
        assert (event.logprobs is None) == (num_top is None)
        if event.logprobs is not None:
            assert event.logprobs == made_up_all(list(event.ids), event.index, 1)
    assert told == [ids_of(following, choice) for choice in range(num_choices)]


@pytest.mark.parametrize(
    "data", [b"", b"a b", b"a moved b", b"\xff", b"a.b", b"x" * 65, b"x" * 90, b" moved", b"*"]
)
def test_what_is_no_probe(data: bytes) -> None:
    assert read_probe(data) is None


def test_probes() -> None:
    for probe in (OwnerProbe("r-1"), OwnerProbe("r-1", is_taken_over=True)):
        assert read_probe(probe.encode()) == probe
