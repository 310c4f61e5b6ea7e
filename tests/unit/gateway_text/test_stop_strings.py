"""Stop strings: found wherever token boundaries fall, cut, and nothing of them given out before."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagebus.gateway.stop_strings import StopStrings
from pagebus.gateway.tokenizer import Tokenizer
from tests.support.tokenizers import make_tokenizer

LETTERS = st.text("ab", max_size=12)
STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=4)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    root = tmp_path_factory.mktemp("stop")
    kinds = ("byte_level", "llama2", "unigram")
    return {kind: Tokenizer.load(make_tokenizer(root / kind, kind)) for kind in kinds}


def _first(text: str, stops: list[str]) -> tuple[int, str] | None:
    """(start, stop) of the match that ends first; of those, the longest."""
    found = [
        (start + len(stop), start, stop)
        for stop in stops
        for start in range(len(text))
        if text.startswith(stop, start)
    ]
    return min(found)[1:] if found else None


@given(st.lists(LETTERS, max_size=6), STOPS)
@settings(max_examples=400)
def test_scan_in_parts_equals_a_search(parts: list[str], stops: list[str]) -> None:
    finder = StopStrings(stops)
    states, num_before = finder.initial, 0
    expected = _first("".join(parts), stops)
    for part in parts:
        states, match = finder.scan(part, states)
        if match is not None:
            assert expected == (num_before + match.end - len(match.stop), match.stop)
            return
        num_before += len(part)
        so_far = "".join(parts)[:num_before]
        beginnings = [stop[:n] for stop in stops for n in range(len(stop))]
        assert max(states, default=0) == max((len(b) for b in beginnings if so_far.endswith(b)), default=0)
    assert expected is None


def _reference(
    tokenizer: Tokenizer, ids: list[int], stops: list[str], include: bool
) -> tuple[str, str | None, int]:
    """Text, stop string and ids that count, from whole decodes of ever more ids."""
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count])
        match = _first(text, stops)
        if match is not None:
            start, stop = match
            return text[: start + (len(stop) if include else 0)], stop, count
    return tokenizer.decode(ids), None, len(ids)


PIECES = st.lists(st.sampled_from(["a", "b", "ab", " ", "é", "👨", "\n", ".", "the", " a"]), max_size=12)
TEXT_STOPS = st.lists(st.text("ab \n.é👨the", min_size=1, max_size=4), min_size=1, max_size=3)


@pytest.mark.parametrize("kind", ["byte_level", "llama2", "unigram"])
@given(data=st.data(), pieces=PIECES, stops=TEXT_STOPS, include=st.booleans())
@settings(max_examples=250, deadline=None)
def test_stream_equals_the_cut_of_a_whole_decode(
    tokenizers: dict[str, Tokenizer],
    kind: str,
    data: st.DataObject,
    pieces: list[str],
    stops: list[str],
    include: bool,
) -> None:
    tokenizer = tokenizers[kind]
    # encoded piece by piece, so that boundaries fall anywhere; broken characters among them
    ids = [i for piece in pieces for i in tokenizer.encode(piece, add_special_tokens=False)]
    ids = [i for i in ids if data.draw(st.integers(0, 9)) > 0]
    text, stop, num_ids = _reference(tokenizer, ids, stops, include)
    stream = tokenizer.stream(stops, include_stop=include)
    given_out, num_counted, found, at = "", 0, None, 0
    while at < len(ids) and found is None:
        step = data.draw(st.integers(1, 4))
        delta = stream.push(ids[at : at + step])
        given_out += delta.text
        num_counted += delta.num_ids
        found, at = delta.stop, at + step
        assert text.startswith(given_out)
    last = stream.finish()
    given_out += last.text
    assert (given_out, found or last.stop, num_counted) == (text, stop, num_ids)


def test_a_beginning_is_held_back_and_released(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_level"]
    a, b, x = (tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "abx")
    stream = tokenizer.stream(["abx"])
    assert [stream.push([i]).text for i in (x, a, b, b, a)] == ["x", "", "", "abb", ""]
    assert stream.finish().text == "a"


def test_after_a_stop_nothing_counts(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_level"]
    ids = [tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "xab"]
    stream = tokenizer.stream(["a"])
    delta = stream.push(ids)
    assert (delta.text, delta.stop, delta.num_ids) == ("x", "a", 2)
    assert (stream.push(ids).num_ids, stream.push(ids).text, stream.finish().text) == (0, "", "")


def test_newline_stops_at_once_in_a_byte_fallback_tokenizer(tokenizers: dict[str, Tokenizer]) -> None:
    """Its text is held until the run of bytes ends, but the stop string in it counts right away."""
    tokenizer = tokenizers["llama2"]
    ids = tokenizer.encode("yes\nno", add_special_tokens=False)
    newline = next(n for n in range(len(ids)) if tokenizer.token(ids[n]) == "<0x0A>")
    stream = tokenizer.stream(["\n"])
    deltas = [stream.push([i]) for i in ids]
    assert "".join(delta.text for delta in deltas) == "yes"
    assert [delta.stop for delta in deltas][newline] == "\n"


def test_stop_strings_before_min_tokens_are_text(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_level"]
    a, b = (tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "ab")
    stream = tokenizer.stream(["a"], min_tokens=3)
    deltas = [stream.push([i]) for i in (a, a, b, a)]
    assert ("".join(delta.text for delta in deltas), deltas[-1].stop) == ("aab", "a")


def test_an_empty_stop_string_is_refused(tokenizers: dict[str, Tokenizer]) -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        tokenizers["byte_level"].stream(["x", ""])


def test_long_stop_strings_cost_no_more_than_their_length(tokenizers: dict[str, Tokenizer]) -> None:
    """ "aaa...b" against a text of a's makes a search that starts again at each place quadratic."""
    finder = StopStrings(["a" * 50_000 + "b"])
    states, match = finder.scan("a" * 200_000 + "b", finder.initial)
    assert match is not None
    assert match.end == 200_001
    assert states[0] == 50_001
