"""What comes out in parts is one decode of all ids, for every kind of decoder; nothing is given out too
early."""

import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders

from pagebus.gateway.detokenizer import DetokenizerFactory, clean_up_spaces
from pagebus.gateway.tokenizer import Tokenizer
from tests.support.tokenizers import KINDS, Kind, make_tokenizer, random_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tokenizers")
    for kind in KINDS:
        make_tokenizer(root / kind, kind)
    return root


def _in_parts(tokenizer: Tokenizer, ids: list[int], rng: random.Random, skip: bool) -> list[str]:
    stream = tokenizer.detokenizer(skip)
    parts, at = [], 0
    while at < len(ids):
        step = rng.choice((1, 1, 1, 2, 7))
        parts.append(stream.push(ids[at : at + step]))
        at += step
    return [*parts, stream.finish()]


@pytest.mark.parametrize("kind", KINDS)
def test_parts_equal_one_decode(folder: Path, kind: Kind) -> None:
    tokenizer = Tokenizer.load(folder / kind)
    rng = random.Random(f"parts {kind}")
    byte_ids = [i for i in range(tokenizer.vocab_size) if (tokenizer.token(i) or "").startswith("<0x")]
    for _ in range(400):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randint(0, 25))]
        if rng.random() < 0.4:  # a real text, perhaps cut inside a character
            ids = tokenizer.encode(random_text(rng))[: rng.randint(0, 60)]
        if byte_ids and rng.random() < 0.4:  # runs of bytes, broken ones among them
            at = rng.randint(0, len(ids))
            ids[at:at] = rng.choices(byte_ids, k=rng.randint(1, 6))
        for skip in (True, False):
            assert "".join(_in_parts(tokenizer, ids, rng, skip)) == tokenizer.decode(ids, skip), (ids, skip)


@pytest.mark.parametrize("kind", ["byte_level", "llama2", "gemma"])
def test_no_half_character_is_given_out(folder: Path, kind: Kind) -> None:
    tokenizer = Tokenizer.load(folder / kind)
    text = "Zürich 👨‍👩‍👧‍👦 ก็ 猫𝔘 ẍ̧ end"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) > len(text)  # several ids a character
    stream = tokenizer.detokenizer()
    given = ""
    for token_id in ids:
        given += stream.push([token_id])
        assert "\ufffd" not in given
        assert text.startswith(given)
    assert given + stream.finish() == text


@pytest.mark.parametrize("kind", ["byte_level", "llama2"])
def test_a_character_that_stays_broken_is_shown(folder: Path, kind: Kind) -> None:
    tokenizer = Tokenizer.load(folder / kind)
    ids = tokenizer.encode("a👨", add_special_tokens=False)[:-1]
    stream = tokenizer.detokenizer()
    assert "\ufffd" not in stream.push(ids)
    assert stream.finish().endswith("\ufffd")


def test_a_valid_run_of_bytes_waits_for_its_end(folder: Path) -> None:
    """One bad byte makes U+FFFD of the whole run: its text must not be given out before the run is over."""
    tokenizer = Tokenizer.load(folder / "llama2")
    newline, bad = (_id(tokenizer, f"<0x{byte}>") for byte in ("0A", "FF"))
    letter = _id(tokenizer, "a")
    stream = tokenizer.detokenizer()
    assert [stream.push([newline]), stream.tail(), stream.push([letter])] == ["", "\n", "\na"]
    stream = tokenizer.detokenizer()
    assert [stream.push([newline]), stream.push([bad]), stream.tail(), stream.push([letter])] == [
        "", "", "", "\ufffd\ufffda",
    ]  # fmt: skip
    assert tokenizer.decode([newline, bad, letter]) == "\ufffd\ufffda"


def _id(tokenizer: Tokenizer, token: str) -> int:
    return next(i for i in range(tokenizer.vocab_size) if tokenizer.token(i) == token)


def test_special_tokens_are_skipped_or_shown(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder / "byte_level")
    ids = tokenizer.encode("hi<|im_end|>")
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>hi<|im_end|>"


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        decoders.WordPiece(),
        decoders.Metaspace(prepend_scheme="never"),
        decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()]),
        decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)]),
        decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 3, 0)]),
        decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()]),
        decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback()]),
    ],
    ids=str,
)
@pytest.mark.parametrize("has_cleanup", [False, True])
def test_other_decoders(folder: Path, decoder: decoders.Decoder | None, has_cleanup: bool) -> None:
    library = Library.from_file(str(folder / "llama2" / "tokenizer.json"))
    document = json.loads(library.to_str())
    document["decoder"] = json.loads(decoder.__getstate__()) if decoder is not None else None
    library = Library.from_str(json.dumps(document))
    factory = DetokenizerFactory(library, has_cleanup)
    rng = random.Random(3)
    marks = [
        library.token_to_id(token)
        for token in ("▁", ".", ",", "'", "s", "m", "?")
        if library.token_to_id(token)
    ]
    for _ in range(300):
        ids = rng.choices(range(library.get_vocab_size()), k=rng.randint(0, 20))
        if rng.random() < 0.5:
            ids = rng.choices(marks, k=rng.randint(0, 20))
        stream = factory.make()
        text = "".join(stream.push([token_id]) for token_id in ids) + stream.finish()
        whole = library.decode(ids, skip_special_tokens=True)
        assert text == (clean_up_spaces(whole) if has_cleanup else whole), ids


def test_a_decoder_that_changes_what_was_said_breaks_nothing(folder: Path) -> None:
    """Here no stream can be exact: byte runs that become invalid, under a decoder without a plan."""
    library = Library.from_file(str(folder / "llama2" / "tokenizer.json"))
    library.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    ids = [library.token_to_id(token) for token in ("<0x4F>", "<0xFF>", "a", "▁", "b")]
    stream = DetokenizerFactory(library, False).make()
    text = "".join(stream.push([token_id]) for token_id in ids) + stream.finish()
    assert len(text) == len(library.decode(ids))
    assert text.endswith("a b")


def test_space_cleanup_follows_the_settings(tmp_path: Path) -> None:
    """On: for Unigram; ignored for BPE, which it would corrupt."""
    unigram = Tokenizer.load(
        make_tokenizer(tmp_path / "u", "unigram", settings={"clean_up_tokenization_spaces": True})
    )
    bpe = Tokenizer.load(
        make_tokenizer(tmp_path / "b", "byte_level", settings={"clean_up_tokenization_spaces": True})
    )
    text = "it 's here , she does n't know . "
    assert unigram.decode(unigram.encode(text)).strip() == "it's here, she doesn't know."
    assert bpe.decode(bpe.encode(text)) == text
    ids = unigram.encode(text)
    stream = unigram.detokenizer()
    assert "".join(stream.push([token_id]) for token_id in ids) + stream.finish() == unigram.decode(ids)
