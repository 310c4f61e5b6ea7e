"""Single tokens' texts and bytes, and where in the text each token begins."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagebus.gateway.tokenizer import Tokenizer
from tests.support.gateway import byte_model, ids
from tests.support.tokenizers import KINDS, make_tokenizer

TEXTS = ["hello there the end", "né 🙂 €uro\n\ttab", "a", "", "日本語 and   spaces .  ,"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Tokenizer]:
    made = {kind: make_tokenizer(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}
    return {kind: Tokenizer.load(path) for kind, path in made.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_bytes_are_the_text(tokenizers, kind):
    """Except for the space that Metaspace takes off the first token, and spaces tidied up."""
    tokenizer = tokenizers[kind]
    for text in TEXTS:
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        spelled = b"".join(tokenizer.texts.data(one) for one in token_ids).decode(errors="replace")
        whole = tokenizer.decode(token_ids, skip_special_tokens=False)
        assert spelled.replace(" ", "") == whole.replace(" ", "")
        for one in token_ids:
            assert tokenizer.texts.text(one) == tokenizer.texts.data(one).decode(errors="replace")


def test_halves_of_characters_special_and_unknown_ids(tmp_path):
    tokenizer = Tokenizer.load(byte_model(tmp_path))
    assert [tokenizer.texts.data(one) for one in ids("é")] == [b"\xc3", b"\xa9"]
    assert [tokenizer.texts.text(one) for one in ids("é")] == ["\ufffd", "\ufffd"]
    assert tokenizer.texts.text(256) == "<eos>"
    assert tokenizer.texts.text(259) == ""  # the model has logits for it, the tokenizer no token


@pytest.mark.parametrize("kind", KINDS)
def test_where_tokens_begin(tokenizers, kind):
    tokenizer = tokenizers[kind]
    for text in TEXTS:
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        stream = tokenizer.stream(has_offsets=True)
        delta = stream.push(token_ids)
        whole = delta.text + stream.finish().text
        assert whole == tokenizer.decode(token_ids)
        assert len(delta.offsets) == len(token_ids)
        assert list(delta.offsets) == sorted(delta.offsets)
        assert all(0 <= offset <= len(whole) for offset in delta.offsets)
        for number, (offset, one) in enumerate(zip(delta.offsets, token_ids, strict=True)):
            shown = tokenizer.texts.text(one)
            if number and "\ufffd" not in shown and " " not in shown and not shown.startswith("<"):
                assert whole[offset : offset + len(shown)] == shown


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    text=st.text(alphabet="ab e.🙂é\n", max_size=20),
    cuts=st.lists(st.integers(1, 4), max_size=8),
    stop=st.lists(st.text(alphabet="abe🙂", min_size=1, max_size=2), max_size=2),
)
def test_offsets_do_not_depend_on_the_pieces(tokenizers, kind, text, cuts, stop):
    tokenizer = tokenizers[kind]
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    found = []
    for sizes in ([len(token_ids) + 1], cuts):
        stream, left, got = tokenizer.stream(stop, has_offsets=True), token_ids, []
        for size in [*sizes, len(token_ids) + 1]:
            delta = stream.push(left[:size])
            assert len(delta.offsets) == delta.num_ids
            got += delta.offsets
            left = left[size:]
        found.append(got)
    assert found[0] == found[1]
    plain = tokenizer.stream(has_offsets=True).push(token_ids)
    assert found[0] == list(plain.offsets)[: len(found[0])]
