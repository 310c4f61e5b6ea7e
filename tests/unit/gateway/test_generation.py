"""A generation's events and books, without HTTP."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagebus.bus.messages import Sampling
from pagebus.gateway.counters import Counters
from pagebus.gateway.errors import ApiError
from pagebus.gateway.generation_events import Finished, GenerationRequest, TextEvent
from pagebus.gateway.generations import Generations
from pagebus.gateway.tokenizer import Tokenizer
from pagebus.requester.events import NewTokens, RequestFailed
from tests.support.gateway import EOS, MAX_MODEL_LEN, MODEL, ScriptedRequester, Submitted, byte_model, ids


class Direct(ScriptedRequester):
    """Keeps requests and plays nothing by itself."""

    def submit(self, spec, on_event) -> Submitted:
        request = Submitted(spec, on_event)
        self.submitted.append(request)
        self.script(request)
        return request


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return Tokenizer.load(byte_model(tmp_path_factory.mktemp("model")))


class Bench:
    """Generations with everything they said."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.requester = Direct()
        self.counters = Counters()
        self.generations = Generations(self.requester, tokenizer, self.counters, model=MODEL)
        self.events = []

    def start(self, **fields):
        fields = {"request_id": "r", "prompt": ids("hi"), "sampling": Sampling(seed=1), **fields}
        return self.generations.start(GenerationRequest(**fields), self.events.append)

    def text(self, choice: int = 0) -> str:
        events = [e for e in self.events if isinstance(e, TextEvent) and e.choice == choice]
        return "".join(event.text for event in events)


def test_events_end_with_finished(tokenizer):
    bench = Bench(tokenizer)
    bench.start(num_choices=2)
    request = bench.requester.submitted[0]
    request.tokens(ids("ab"), choice=1)
    request.tokens([EOS], choice=1, finish="stop")
    request.tokens(ids("c"), choice=0, finish="length")
    assert bench.text(0) == "c"
    assert bench.text(1) == "ab"
    assert isinstance(bench.events[-1], Finished)
    assert bench.events[-1].usage.num_generated_tokens == 4
    assert bench.generations.num_live == 0
    assert not request.is_cancelled
    request.on_event(NewTokens(0, 1, ids("late"), None))
    assert isinstance(bench.events[-1], Finished)


def test_a_stop_string_ends_one_choice_only(tokenizer):
    bench = Bench(tokenizer)
    bench.start(num_choices=2, stop=["xy"])
    request = bench.requester.submitted[0]
    request.tokens(ids("axyzz"), choice=0)
    assert request.ended_choices == [0]
    request.on_event(NewTokens(0, 5, ids("more"), None))
    request.tokens(ids("b"), choice=1, finish="length")
    assert (bench.text(0), bench.text(1)) == ("a", "b")
    assert bench.events[-1].usage.num_generated_tokens == 4  # a, x, y and b


def test_a_stop_string_in_what_was_held_back_at_the_end(tokenizer):
    bench = Bench(tokenizer)
    bench.start(stop=["xy"])
    bench.requester.submitted[0].tokens(ids("ax"))
    assert bench.text() == "a"
    bench.requester.submitted[0].tokens([], finish="length")
    assert bench.text() == "ax"
    assert [e.finish_reason for e in bench.events[:-1]][-1] == "length"


def test_events_during_submit(tokenizer):
    bench = Bench(tokenizer)
    bench.requester.script = lambda request: request.tokens(ids("axyb"))
    bench.start(stop=["xy"])
    assert bench.text() == "a"
    assert isinstance(bench.events[-1], Finished)
    assert bench.requester.submitted[0].is_cancelled  # nothing is left running
    assert bench.generations.num_live == 0


def test_cancel_is_silent_and_happens_once(tokenizer):
    bench = Bench(tokenizer)
    generation = bench.start()
    generation.cancel()
    generation.cancel()
    assert bench.events == []
    assert bench.requester.submitted[0].is_cancelled
    assert bench.counters.finished["abort"] == 1
    assert bench.generations.num_live == 0


def test_fail_all(tokenizer):
    bench = Bench(tokenizer)
    for _ in range(3):
        bench.start()
    bench.generations.fail_all("gone", "x")
    assert bench.events == [RequestFailed("gone", "x")] * 3
    assert bench.generations.num_live == 0


def test_draining_refuses(tokenizer):
    bench = Bench(tokenizer)
    bench.generations.is_closed = True
    with pytest.raises(ApiError) as error:
        bench.start()
    assert error.value.status == 503
    assert bench.requester.submitted == []


def test_eos_unless_ignored(tokenizer):
    bench = Bench(tokenizer)
    bench.start(stop_token_ids=[65])
    bench.start(stop_token_ids=[65], ignore_eos=True)
    assert [request.spec.stop_token_ids for request in bench.requester.submitted] == [[65, EOS], [65]]


@pytest.mark.parametrize(
    ("given_max", "default", "length", "expected"),
    [(None, None, 2, MAX_MODEL_LEN - 2), (None, 16, 2, 16), (None, 16, MAX_MODEL_LEN - 3, 3), (7, 16, 2, 7)],
)
def test_max_tokens(tokenizer, given_max, default, length, expected):
    bench = Bench(tokenizer)
    bench.start(prompt=[1] * length, max_tokens=given_max, default_max_tokens=default)
    assert bench.requester.submitted[0].spec.max_tokens == expected


@given(
    text=st.text(alphabet="abxy€🙂", max_size=30),
    cuts=st.lists(st.integers(1, 5), max_size=40),
    stop=st.lists(st.text(alphabet="abxy€", min_size=1, max_size=3), max_size=3),
)
def test_pieces_do_not_matter(tokenizer, text, cuts, stop):
    """However the ids are dealt out, text and counts are those of one single delivery."""
    results = []
    for sizes in ([len(ids(text)) + 1], cuts):
        bench = Bench(tokenizer)
        bench.start(stop=stop)
        request = bench.requester.submitted[0]
        left = ids(text)
        for size in sizes:
            request.tokens(left[:size])
            left = left[size:]
        request.tokens(left)
        request.tokens([], finish="length")
        assert isinstance(bench.events[-1], Finished)
        reason = [event.finish_reason for event in bench.events[:-1]][-1]
        results.append((bench.text(), bench.events[-1].usage, reason))
        indices = [(e.index, len(e.ids)) for e in bench.events[:-1]]
        assert all(a[0] + a[1] == b[0] for a, b in itertools.pairwise(indices))
    assert results[0] == results[1]
    whole = results[0][0]
    assert text.startswith(whole)
    assert not any(one in whole for one in stop)
