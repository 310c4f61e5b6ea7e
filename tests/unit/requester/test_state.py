import random
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagebus.bus.messages import (
    Accepted,
    Cancel,
    ChoiceState,
    Failed,
    Rejected,
    TokenRow,
    pack_ids,
    unpack_ids,
)
from pagebus.requester.events import NewTokens, RequestFailed, RequestSpec
from pagebus.requester.state import RequestState
from pagebus.requester.timing import NEVER, Timing

TIMING = Timing(jitter_s=0.0)


def make(num_choices: int = 1, max_tokens: int = 10, timeout_s: float = 600.0, **more) -> RequestState:
    spec = RequestSpec(
        request_id="r",
        prompt=[1, 2, 3],
        num_choices=num_choices,
        max_tokens=max_tokens,
        timeout_s=timeout_s,
        **more,
    )
    return RequestState(
        spec, model="m", reply="out", life="life", now_s=0.0, timing=TIMING, rng=random.Random(0)
    )


def asked(**arguments) -> RequestState:
    state = make(**arguments)
    assert state.due_s == 0.0
    assert state.ask(0.0) is not None
    return state


def row(index: int, *ids: int, attempt: int = 1, choice: int = 0, finish=None) -> TokenRow:
    return TokenRow(
        request_id="r", attempt=attempt, choice=choice, index=index, ids=pack_ids(ids), finish_reason=finish
    )


def accepted(attempt: int = 1, epoch: int = 1, state="queued") -> Accepted:
    return Accepted(request_id="r", attempt=attempt, epoch=epoch, state=state)


def new(choice: int, index: int, ids: list[int], finish=None) -> NewTokens:
    return NewTokens(choice, index, array("i", ids), finish)


def test_the_first_attempt_says_everything():
    state = make(
        num_choices=2, max_tokens=5, min_tokens=2, stop_token_ids=[9], tenant="t", priority=3, timeout_s=8.0
    )
    generate = state.ask(0.5)
    assert generate.attempt == 1
    assert list(unpack_ids(generate.prompt)) == [1, 2, 3]
    assert generate.choices == (ChoiceState(index=0), ChoiceState(index=1))
    assert (generate.max_tokens, generate.min_tokens, generate.tenant, generate.priority) == (5, 2, "t", 3)
    assert list(unpack_ids(generate.stop_token_ids)) == [9]
    assert generate.time_left_ms == 7500
    assert (generate.reply, generate.life, generate.model) == ("out", "life", "m")


@pytest.mark.parametrize(
    ("index", "ids", "delivered"),
    [
        (2, [3], new(0, 2, [3])),  # next
        (0, [1, 2], None),  # doubled
        (1, [2], None),
        (0, [1, 2, 3, 4], new(0, 2, [3, 4])),  # overlapping
        (1, [2, 3], new(0, 2, [3])),
        (3, [4], None),  # a gap
    ],
)
def test_rows_after_two_ids(index, ids, delivered):
    state = asked()
    assert state.on_row(row(0, 1, 2), 1, 0.1) == new(0, 0, [1, 2])
    assert state.on_row(row(index, *ids), 1, 0.2) == delivered
    assert (state.due_s <= 0.2) == (index > 2)  # only a gap makes it ask again
    assert state.num_ids(0) == (2 if delivered is None else 2 + len(delivered.ids))


@pytest.mark.parametrize(
    "stale",
    [
        row(0, 1, attempt=2),
        row(0, 1, attempt=0),
        row(0, 1, choice=1),
        row(0, 1, choice=-1),
        row(5, 1, attempt=9),
    ],
)
def test_rows_of_other_attempts_and_choices_are_nothing(stale):
    state = asked()
    assert state.on_row(stale, 1, 0.1) is None
    assert not state.is_acknowledged
    assert state.num_stale_rows == 1


def test_a_row_of_broken_length_is_nothing():
    state = asked()
    broken = TokenRow(request_id="r", index=0, ids=b"\x01\x02\x03")
    assert state.on_row(broken, 1, 0.1) is None
    assert state.num_ids(0) == 0


def test_every_choice_ends_once():
    state = asked(num_choices=2)
    assert state.on_row(row(0, 1, finish="stop"), 1, 0.1) == new(0, 0, [1], "stop")
    assert state.on_row(row(0, 1, finish="stop"), 1, 0.1) is None
    assert state.on_row(row(1, 2, finish="stop"), 1, 0.1) is None
    assert not state.has_ended
    assert state.on_row(row(0, 5, choice=1, finish="length"), 1, 0.2) == new(1, 0, [5], "length")
    assert state.has_ended
    assert state.due_s == NEVER
    assert state.on_row(row(1, 5, choice=1), 1, 0.3) is None


def test_a_finish_reason_may_come_alone_but_never_before_its_ids():
    state = asked()
    state.on_row(row(0, 1, 2), 1, 0.1)
    assert state.on_row(row(1, finish="stop"), 1, 0.2) is None
    assert not state.has_ended
    assert state.on_row(row(2, finish="stop"), 1, 0.2) == new(0, 2, [], "stop")
    assert state.has_ended


def test_a_later_attempt_goes_on_where_it_stopped():
    state = asked(num_choices=3)
    state.on_row(row(0, 1, 2), 1, 0.1)
    state.on_row(row(0, 7, choice=1, finish="stop"), 1, 0.1)
    again = state.ask(1.0)
    assert again.attempt == 2
    assert again.choices == (
        ChoiceState(index=0, ids=pack_ids([1, 2])),
        ChoiceState(index=1, finish_reason="stop"),
        ChoiceState(index=2),
    )
    assert state.on_row(row(2, 3), 1, 1.1) is None  # of the first attempt
    assert state.on_row(row(2, 3, attempt=2), 1, 1.1) == new(0, 2, [3])


def test_what_is_not_acknowledged_is_sent_again_with_growing_patience():
    state = asked()
    times, now_s = [], 0.0
    for _ in range(5):
        now_s = state.due_s
        times.append(now_s)
        state.ask(now_s)
    assert times == [0.5, 1.5, 3.5, 5.5, 7.5]


def test_silence_and_signs():
    state = asked()
    state.on_accepted(accepted(), 0.5)
    assert state.due_s == 20.5
    state.on_accepted(accepted(), 15.5)
    assert state.due_s == 35.5
    state.on_accepted(accepted(attempt=2), 16.0)
    assert state.due_s == 35.5
    state.on_row(row(0, 1), 1, 17.0)
    assert state.due_s == 37.0


def test_running_without_a_token_while_signs_go_on():
    state = asked()
    now_s = 0.0
    while state.due_s > now_s and now_s < 1000.0:
        state.on_accepted(accepted(state="running"), now_s)
        now_s += 1.0
    assert now_s == 120.0


def test_a_retryable_failure_asks_again_after_a_growing_pause():
    state = asked()
    pauses, now_s = [], 0.0
    for attempt in range(1, 10):
        state.on_failed(
            Failed(request_id="r", attempt=attempt, code="x", message="", is_retryable=True), now_s
        )
        pauses.append(state.due_s - now_s)
        now_s = state.due_s
        state.ask(now_s)
    assert 0.025 <= pauses[0] <= 0.05
    assert all(pause <= 2.0 for pause in pauses)
    assert pauses[-1] >= 1.0
    state.on_row(row(0, 1, attempt=10), 1, now_s)
    state.on_failed(Failed(request_id="r", attempt=10, code="x", message="", is_retryable=True), now_s)
    assert state.due_s - now_s <= 0.05  # a token starts the count anew


def test_a_final_failure_and_a_rejection_end_it():
    state = asked()
    assert state.on_failed(Failed(request_id="r", attempt=2, code="x", message=""), 0.1) is None
    failure = state.on_failed(
        Failed(request_id="r", attempt=1, code="x", message="m", is_client_fault=True), 0.1
    )
    assert failure == RequestFailed("x", "m", True)
    assert state.has_ended
    assert state.on_failed(Failed(request_id="r", attempt=1, code="x", message="m"), 0.1) is None

    state = asked()
    assert state.on_rejected(Rejected(request_id="r", attempt=7, code="queue_full", message="")) is None
    rejected = Rejected(
        request_id="r", attempt=1, code="queue_full", message="m", is_client_fault=False, retry_after_s=2.0
    )
    assert state.on_rejected(rejected) == RequestFailed("queue_full", "m", False, 2.0)
    assert state.on_rejected(rejected) is None


def test_a_new_leader_makes_it_ask_again():
    state = asked()
    state.on_leader(5, 0.1)
    assert state.due_s == 0.5  # who takes it is not known yet
    state.on_accepted(accepted(epoch=5), 0.2)
    state.on_leader(5, 0.3)
    assert state.due_s == 20.2
    state.on_leader(6, 0.4)
    assert state.due_s == 0.4
    state.ask(0.4, leader_epoch=6)
    state.on_accepted(accepted(attempt=2, epoch=5), 0.5)  # the old one, unaware
    assert not state.is_acknowledged
    state.on_row(row(0, 1, attempt=2), 5, 0.5)
    assert not state.is_acknowledged
    assert state.num_ids(0) == 1  # what it made is right all the same
    state.on_accepted(accepted(attempt=2, epoch=6), 0.6)
    assert state.is_acknowledged


def test_a_reconnect_makes_it_ask_again():
    state = asked()
    state.on_accepted(accepted(), 0.2)
    state.on_reconnect(3.0)
    assert state.due_s == 3.0


def test_what_was_asked_for_by_a_reconnect_is_lost_as_well():
    """The patience that grew while nobody answered is the one for who is slow, not for who was cut off."""
    state = asked()
    for _ in range(4):
        state.ask(state.due_s)
    state.on_reconnect(6.0)
    state.ask(6.0)
    assert state.due_s == 6.5


def test_the_deadline():
    state = asked(timeout_s=2.0)
    state.on_accepted(accepted(), 0.1)
    assert state.due_s == 2.0
    assert state.expire(1.9) is None
    assert state.expire(2.0).code == "timeout"
    assert state.has_ended
    assert state.expire(3.0) is None


def test_cancel_and_end_choice():
    state = asked(num_choices=2)
    assert state.end_choice(0) == Cancel(request_id="r", attempt=1, choices=(0,))
    assert state.end_choice(0) is None
    assert state.end_choice(2) is None
    assert state.on_row(row(0, 1), 1, 0.1) is None
    assert state.end_choice(1) == Cancel(request_id="r", attempt=1)
    assert state.has_ended
    assert state.cancel() is None

    state = asked()
    assert state.cancel() == Cancel(request_id="r", attempt=1)
    assert state.ask(1.0) is None


@pytest.mark.parametrize(
    ("ids", "expected"), [([1, 2, 3, 4, 5], "length"), ([1, 9], "stop"), ([9], None), ([1, 2], None)]
)
def test_a_lost_end_is_known_from_the_ids(ids, expected):
    state = asked(max_tokens=5, min_tokens=2, stop_token_ids=[9])
    state.on_row(row(0, *ids), 1, 0.1)
    assert state.complete() == ([] if expected is None else [NewTokens(0, len(ids), (), expected)])
    assert state.has_ended == (expected is not None)


# Any order, loss and doubling of rows of several attempts gives each id once, in order, or a typed end


def token(choice: int, index: int) -> int:
    return choice * 1000 + index


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_choices=st.integers(1, 4),
    max_tokens=st.integers(1, 30),
    loss=st.floats(0, 0.9),
    chunk=st.integers(1, 4),
)
def test_each_id_once_and_in_order_or_a_typed_failure(seed, num_choices, max_tokens, loss, chunk):
    rng = random.Random(seed)
    state = make(num_choices=num_choices, max_tokens=max_tokens, timeout_s=120.0)
    wire: list[tuple[float, TokenRow | Accepted | Failed]] = []
    got: list[list[int]] = [[] for _ in range(num_choices)]
    ends = [0] * num_choices
    failure = None

    def send(message, at_s: float) -> None:
        for _ in range(rng.choice([1, 1, 1, 2])):
            if rng.random() >= loss:
                wire.append((at_s + rng.random() * rng.choice([0.01, 0.01, 3.0]), message))

    def take(event: NewTokens | None) -> None:
        if event is None:
            return
        assert event.index == len(got[event.choice])
        assert ends[event.choice] == 0
        got[event.choice].extend(event.ids)
        ends[event.choice] += event.finish_reason is not None

    now_s = 0.0
    while not state.has_ended:
        wire.sort(key=lambda entry: entry[0])
        if wire and wire[0][0] < state.due_s:
            now_s, message = wire.pop(0)
            now_s = max(now_s, 0.0)
            if isinstance(message, TokenRow):
                take(state.on_row(message, 1, now_s))
            elif isinstance(message, Accepted):
                state.on_accepted(message, now_s)
            else:
                assert state.on_failed(message, now_s) is None
            continue
        now_s = max(now_s, state.due_s)
        failure = state.expire(now_s)
        if failure is not None:
            break
        for event in state.complete():
            take(event)
        generate = state.ask(now_s)
        if generate is None:
            break
        send(accepted(generate.attempt), now_s)
        for choice in generate.choices:
            if choice.finish_reason is not None:
                continue
            have = list(unpack_ids(choice.ids))
            assert have == got[choice.index]
            at_s = now_s
            for index in range(len(have), max_tokens, chunk):
                ids = [token(choice.index, i) for i in range(index, min(index + chunk, max_tokens))]
                at_s += 0.01
                finish = "length" if index + chunk >= max_tokens else None
                send(row(index, *ids, attempt=generate.attempt, choice=choice.index, finish=finish), at_s)
        if rng.random() < 0.2:
            lost = Failed(
                request_id="r", attempt=generate.attempt, code="lost", message="", is_retryable=True
            )
            send(lost, now_s + rng.random())
    for choice, ids in enumerate(got):
        assert ids == [token(choice, index) for index in range(len(ids))]
    if failure is None:
        assert all(len(ids) == max_tokens for ids in got)
        assert ends == [1] * num_choices
    else:
        assert failure.code == "timeout"
        assert now_s >= 120.0


def test_what_schedulers_suspect_rides_along_until_it_got_on() -> None:
    state = make(max_tokens=200)
    first = state.ask(0.0)
    assert first is not None
    assert (first.is_suspect, first.num_sole_suspect_deaths) == (False, 0)
    for deaths in (0, 1, 1):  # one death proves nothing
        failed = Failed(
            request_id=state.spec.request_id,
            attempt=state.attempt,
            code="executor_lost",
            message="",
            is_retryable=True,
            is_suspect=True,
            was_sole_suspect=deaths > 0,
        )
        state.on_failed(failed, 1.0)
        again = state.ask(2.0)
        assert again is not None
        assert again.is_suspect == (deaths > 0)
    assert again.num_sole_suspect_deaths == 2
    for num_ids, is_suspect in ((1, True), (33, False)):
        have = state.num_ids(0)
        row = TokenRow(
            request_id=state.spec.request_id,
            attempt=state.attempt,
            index=have,
            ids=pack_ids(range(100, 100 + num_ids)),
        )
        assert state.on_row(row, 1, 3.0)
        cleared = state.ask(4.0)
        assert cleared is not None
        assert (cleared.is_suspect, cleared.num_sole_suspect_deaths) == (is_suspect, 0)


def test_a_scheduler_may_clear_a_suspect() -> None:
    state = make(max_tokens=200)
    for attempt in (1, 2):
        state.ask(0.0)
        failed = Failed(
            request_id=state.spec.request_id,
            attempt=attempt,
            code="executor_lost",
            message="",
            is_retryable=True,
            is_suspect=True,
        )
        state.on_failed(failed, 1.0)
    suspect = state.ask(2.0)
    assert suspect is not None
    assert suspect.is_suspect
    state.on_accepted(Accepted(request_id=state.spec.request_id, attempt=3, epoch=1, is_cleared=True), 3.0)
    cleared = state.ask(4.0)
    assert cleared is not None
    assert not cleared.is_suspect
