"""Log-probabilities in the requester: cut to what is new, the prompt's once and in order, none lost at the
end."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagebus.bus.messages import (
    Cancel,
    ChoiceState,
    Logprobs,
    PromptRow,
    Sampling,
    TokenRow,
    pack_ids,
    unpack_ids,
)
from pagebus.requester.events import NewTokens, PromptLogprobs, RequestSpec
from pagebus.requester.packed_logprobs import cut, is_whole, num_tokens, unpack
from pagebus.requester.state import RequestState
from pagebus.requester.timing import Timing
from tests.support.logprobs import made_up, made_up_all

PROMPT = list(range(100, 110))


def make(num_choices: int = 1, max_tokens: int = 5, prompt=PROMPT, timeout_s: float = 600.0, **more):
    sampling = Sampling(**{"num_logprobs": 2, "num_prompt_logprobs": 1, **more})
    spec = RequestSpec(
        request_id="r", prompt=prompt, num_choices=num_choices, max_tokens=max_tokens, sampling=sampling,
        timeout_s=timeout_s,
    )  # fmt: skip
    timing = Timing(jitter_s=0.0)
    return RequestState(
        spec, model="m", reply="out", life="life", now_s=0.0, timing=timing, rng=random.Random(0)
    )


def row(index: int, *ids: int, attempt: int = 1, choice: int = 0, finish=None, **more) -> TokenRow:
    return TokenRow(
        request_id="r", attempt=attempt, choice=choice, index=index, ids=pack_ids(ids), finish_reason=finish,
        logprobs=made_up_all(ids, index, 2), **more,
    )  # fmt: skip


def prompt_row(start: int, end: int, attempt: int = 1) -> PromptRow:
    told = made_up_all(PROMPT[start:end], start, 1)
    return PromptRow(request_id="r", attempt=attempt, start=start, logprobs=told)


def test_packing_is_told_apart_by_hand():
    packed = Logprobs(
        num_top=1,
        ids=pack_ids([7, 9, 8, 8]),
        values=bytes.fromhex("000080bf000000bf000000c0000000c0"),  # -1, -0.5, -2, -2 in float32
        ranks=pack_ids([2, 1]),
    )
    first, second = unpack(packed)
    assert (first.token_id, first.logprob, first.rank, first.top) == (7, -1.0, 2, [(9, -0.5)])
    assert (second.token_id, second.logprob, second.rank, second.top) == (8, -2.0, 1, [(8, -2.0)])
    assert num_tokens(packed) == 2
    assert is_whole(packed)
    assert is_whole(packed, 2)
    assert not is_whole(packed, 3)
    for broken in (
        Logprobs(num_top=0, ids=packed.ids, values=packed.values, ranks=packed.ranks),
        Logprobs(num_top=-1, ids=b"", values=b"", ranks=packed.ranks),
        Logprobs(num_top=1, ids=packed.ids[:-1], values=packed.values, ranks=packed.ranks),
        Logprobs(num_top=1, ids=packed.ids, values=packed.values[4:], ranks=packed.ranks),
        Logprobs(num_top=1, ids=packed.ids, values=packed.values, ranks=packed.ranks + b"x"),
    ):
        assert not is_whole(broken)


@given(count=st.integers(0, 9), num_top=st.integers(0, 3), start=st.integers(-3, 12), end=st.integers(-3, 12))
def test_a_cut_is_a_slice(count, num_top, start, end):
    whole = made_up_all(list(range(count)), 0, num_top)
    some = cut(whole, start, end)
    assert is_whole(some)
    assert unpack(some) == unpack(whole)[max(start, 0) : max(end, 0)]


def test_overlapping_rows_are_cut_together_with_their_log_probabilities():
    state = make(num_prompt_logprobs=None)
    state.ask(0.0)
    assert unpack(state.on_row(row(0, 1, 2), 1, 0.1).logprobs) == [made_up(1, 0, 2), made_up(2, 1, 2)]
    event = state.on_row(row(1, 2, 3, 4), 1, 0.1)
    assert list(event.ids) == [3, 4]
    assert unpack(event.logprobs) == [made_up(3, 2, 2), made_up(4, 3, 2)]


def test_a_row_with_broken_log_probabilities_is_nothing():
    state = make(num_prompt_logprobs=None)
    state.ask(0.0)
    broken = TokenRow(request_id="r", index=0, ids=pack_ids([1, 2]), logprobs=made_up_all([1], 0, 2))
    assert state.on_row(broken, 1, 0.1) is None
    assert state.num_ids(0) == 0
    state = make()
    state.ask(0.0)
    told = made_up_all(PROMPT[1:4], 1, 1)
    bad = Logprobs(num_top=1, ids=told.ids, values=told.values[:-4], ranks=told.ranks)
    assert state.on_prompt(PromptRow(request_id="r", start=1, logprobs=bad), 1, 0.1) == []


@pytest.mark.parametrize(
    ("start", "end", "told"),
    [
        (4, 6, (4, 6)),  # next
        (1, 4, None),  # doubled
        (2, 7, (4, 7)),  # overlapping
        (0, 5, (4, 5)),  # position 0 is nothing to tell
        (5, 7, None),  # a gap
        (4, 10, (4, 10)),  # all that is left
    ],
)
def test_prompt_rows_after_position_three(start, end, told):
    state = make()
    state.ask(0.0)
    assert state.on_prompt(prompt_row(1, 4), 1, 0.1) == [PromptLogprobs(1, made_up_all(PROMPT[1:4], 1, 1))]
    events = state.on_prompt(prompt_row(start, end), 1, 0.2)
    want = (
        [] if told is None else [PromptLogprobs(told[0], made_up_all(PROMPT[told[0] : told[1]], told[0], 1))]
    )
    assert events == want
    assert (state.due_s <= 0.2) == (start > 4)


def test_prompt_rows_of_other_attempts_are_nothing():
    state = make()
    state.ask(0.0)
    assert state.on_prompt(prompt_row(1, 4, attempt=2), 1, 0.1) == []
    assert state.num_stale_rows == 1
    assert not state.is_acknowledged


def test_what_exceeds_the_prompt_is_cut_off():
    state = make(prompt=PROMPT[:3])
    state.ask(0.0)
    (event,) = state.on_prompt(prompt_row(1, 9), 1, 0.1)
    assert num_tokens(event.logprobs) == 2
    assert state.is_prompt_told


@pytest.mark.parametrize("prompt", [[5], []])
def test_a_prompt_of_one_id_has_nothing_to_tell(prompt):
    state = make(prompt=prompt, max_tokens=1)
    assert state.is_prompt_told
    assert state.ask(0.0).sampling.num_prompt_logprobs is None
    assert state.on_row(row(0, 1, finish="length"), 1, 0.1).finish_reason == "length"
    assert state.has_ended


def test_ids_wait_for_the_prompt_and_the_last_one_does_not_end_the_request():
    state = make(max_tokens=2)
    state.ask(0.0)
    assert len(state.on_prompt(prompt_row(1, 4), 1, 0.1)) == 1
    assert state.on_row(row(0, 1), 1, 0.2) is None  # positions 4 to 9 must have been lost
    assert state.due_s == 0.2
    assert state.on_row(row(1, 2, finish="length"), 1, 0.3) is None
    assert not state.has_ended
    again = state.ask(0.4)
    assert again.choices == (ChoiceState(index=0, ids=pack_ids([1])),)  # it makes its last id once more
    assert again.sampling.num_prompt_logprobs == 1
    assert len(state.on_prompt(prompt_row(1, 6, attempt=2), 1, 0.5)) == 1
    told, *held = state.on_prompt(prompt_row(6, 10, attempt=2), 1, 0.6)
    assert told.start == 6
    assert [(list(event.ids), event.index, event.finish_reason) for event in held] == [
        ([1], 0, None), ([2], 1, "length")
    ]  # fmt: skip
    assert state.has_ended
    assert state.on_row(row(1, 2, attempt=2, finish="length"), 1, 0.7) is None


def test_an_executor_that_tells_nothing_of_the_prompt_is_not_hammered():
    state = make(max_tokens=10_000, timeout_s=60.0)
    now_s, num_asked = 0.0, 0
    while (failure := state.expire(now_s)) is None:
        state.ask(now_s)
        num_asked += 1
        for _ in range(3):
            now_s += 0.01
            state.on_row(row(state.num_ids(0), 1, attempt=state.attempt), 1, now_s)
        now_s = max(now_s, state.due_s)
    assert failure.code == "timeout"
    assert 25 < num_asked < 45


def test_another_choices_ids_are_no_sign_of_a_loss():
    state = make(num_choices=2)
    state.ask(0.0)
    assert state.on_row(row(0, 1, choice=1), 1, 0.1) is None
    assert state.due_s > 10
    events = state.on_prompt(prompt_row(1, 10), 1, 0.2)
    assert [type(event) for event in events] == [PromptLogprobs, NewTokens]
    assert state.on_row(row(1, 2, choice=1), 1, 0.3).index == 1


def test_a_choice_that_its_owner_ends_leaves_nothing_behind():
    state = make(num_choices=2, max_tokens=1)
    state.ask(0.0)
    state.on_row(row(0, 1, choice=0, finish="length"), 1, 0.1)
    state.on_row(row(0, 1, choice=1, finish="length"), 1, 0.1)
    assert state.end_choice(0) is None
    assert not state.has_ended
    assert state.end_choice(1) == Cancel(request_id="r", attempt=1)
    assert state.has_ended
    assert state.on_prompt(prompt_row(1, 10), 1, 0.2) == []


@pytest.mark.parametrize(
    ("rows", "cached"),
    [
        ([row(0, 1, num_cached=3), row(1, 2, num_cached=5)], 3),
        ([row(0, 1), row(1, 2, num_cached=2)], 2),
        ([row(0, 1, choice=1, num_cached=8), row(0, 1, num_cached=4)], 4),
        ([row(0, 1, num_cached=99)], 10),
        ([row(0, 1, num_cached=-1)], 0),
        ([row(0, 1, num_cached=3, attempt=2)], None),
    ],
)
def test_cached_tokens(rows, cached):
    state = make(num_choices=2, num_prompt_logprobs=None)
    state.ask(0.0)
    for one in rows:
        state.on_row(one, 1, 0.1)
    assert state.num_cached_tokens == cached


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_choices=st.integers(1, 3),
    max_tokens=st.integers(1, 12),
    length=st.integers(1, 12),
    loss=st.floats(0, 0.6),
    chunk=st.integers(1, 5),
)
def test_everything_once_and_in_order_whatever_is_lost(seed, num_choices, max_tokens, length, loss, chunk):
    """Rows and prompt rows are lost, doubled and reordered over several attempts."""
    rng = random.Random(seed)
    prompt = PROMPT[:length]
    state = make(num_choices, max_tokens, prompt, timeout_s=1e6)
    wire = []
    told, got, ends = [], [[] for _ in range(num_choices)], [0] * num_choices

    def send(message, at_s: float) -> None:
        for _ in range(rng.choice([1, 1, 1, 2])):
            if rng.random() >= loss:
                wire.append((at_s + rng.random() * rng.choice([0.01, 0.01, 3.0]), message))

    def take(event) -> None:
        if isinstance(event, PromptLogprobs):
            assert event.start == 1 + len(told)
            assert not any(got)
            told.extend(unpack(event.logprobs))
            return
        assert len(told) == len(prompt) - 1
        assert event.index == len(got[event.choice])
        assert ends[event.choice] == 0
        if event.ids:
            assert [one.token_id for one in unpack(event.logprobs)] == list(event.ids)
            got[event.choice] += unpack(event.logprobs)
        ends[event.choice] += event.finish_reason is not None

    def answer(generate, now_s: float) -> None:
        """What an executor says: the prompt with the first open choice, then ids."""
        is_first, num_top = True, generate.sampling.num_prompt_logprobs
        for choice in generate.choices:
            if choice.finish_reason is not None:
                continue
            at_s = now_s
            for start in range(1, len(prompt), chunk) if is_first and num_top is not None else ():
                at_s += 0.01
                logprobs = made_up_all(prompt[start : start + chunk], start, num_top)
                send(PromptRow(request_id="r", attempt=state.attempt, start=start, logprobs=logprobs), at_s)
            is_first = False
            for index in range(len(unpack_ids(choice.ids)), max_tokens, chunk):
                ids = [10 * choice.index + i for i in range(index, min(index + chunk, max_tokens))]
                at_s += 0.01
                finish = "length" if index + chunk >= max_tokens else None
                one = row(index, *ids, attempt=state.attempt, choice=choice.index, finish=finish)
                send(one, at_s)

    now_s = 0.0
    while not state.has_ended:
        wire.sort(key=lambda entry: entry[0])
        if wire and wire[0][0] < state.due_s:
            at_s, message = wire.pop(0)
            now_s = max(now_s, at_s)
            if isinstance(message, PromptRow):
                for event in state.on_prompt(message, 1, now_s):
                    take(event)
            elif (event := state.on_row(message, 1, now_s)) is not None:
                take(event)
            continue
        now_s = max(now_s, state.due_s)
        assert now_s < 1e6
        for event in state.complete():
            take(event)
        if (generate := state.ask(now_s)) is not None:
            answer(generate, now_s)
    assert told == [made_up(one, at, 1) for at, one in enumerate(prompt) if at > 0]
    for choice, made in enumerate(got):
        assert made == [made_up(10 * choice + index, index, 2) for index in range(max_tokens)]
    assert ends == [1] * num_choices
