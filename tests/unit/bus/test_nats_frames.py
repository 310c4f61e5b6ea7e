import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagebus.bus.nats_client import frame, parse_headers


def test_frames():
    assert frame("a.b", b"xy", "", None) == b"PUB a.b 2\r\nxy\r\n"
    assert frame("a.b", b"", "r.s", {}) == b"PUB a.b r.s 0\r\n\r\n"
    assert frame("a", b"xy", "r", {"k": "v"}) == b"HPUB a r 18 20\r\nNATS/1.0\r\nk: v\r\n\r\nxy\r\n"


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (b"NATS/1.0 503\r\n\r\n", {"Status": "503"}),
        (b"NATS/1.0 404 No Messages\r\n\r\n", {"Status": "404", "Description": "No Messages"}),
        (b"NATS/1.0 100 Idle\r\na:b\r\n\r\n", {"Status": "100", "Description": "Idle", "a": "b"}),
        (b"NATS/1.0\r\na:  b : c \r\n\r\n", {"a": "b : c"}),
        (b"NATS/1.0\r\na: \xff\r\n\r\n", {"a": "\ufffd"}),
    ],
)
def test_headers(block, expected):
    assert parse_headers(block) == expected


@given(st.binary(max_size=200))
def test_any_bytes_are_headers_or_a_value_error(block):
    try:
        parse_headers(block)
    except ValueError:
        return


_text = st.text(st.characters(min_codepoint=33, max_codepoint=126, blacklist_characters=":"), min_size=1)


@given(st.dictionaries(_text, _text, min_size=1))
def test_headers_come_back_as_they_were_sent(headers):
    sent = frame("a", b"", "", headers)
    block = sent.partition(b"\r\n")[2].removesuffix(b"\r\n")
    assert parse_headers(block) == headers
