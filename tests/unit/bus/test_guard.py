import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagebus.bus import guard
from pagebus.bus.protocol import InvalidMessageError, PayloadTooLargeError


@pytest.mark.parametrize(
    "subject", ["a", "a.b", "pagebus.out.gateway-1", "_INBOX_client.x.1", "$KV.pagebus.leader.m"]
)
def test_plain_subjects_pass(subject):
    guard.check_publish(subject)
    guard.check_subscribe(subject)


@pytest.mark.parametrize(
    "subject",
    [
        "",
        ".",
        "a.",
        ".a",
        "a..b",
        "a b",
        "a\tb",
        "a\r\nPUB x 0\r\n",
        "a\x00",
        "ü.a",
        "a\xff",
        "a" * 513,
        "a.\u202e",
    ],
)
def test_broken_subjects_are_refused_everywhere(subject):
    with pytest.raises(InvalidMessageError):
        guard.check_publish(subject)
    with pytest.raises(InvalidMessageError):
        guard.check_subscribe(subject)


@pytest.mark.parametrize("subject", ["*", ">", "a.*", "a.>", "*.b", "a.*.c"])
def test_wildcards_are_for_subscriptions_only(subject):
    guard.check_subscribe(subject)
    with pytest.raises(InvalidMessageError):
        guard.check_publish(subject)


@pytest.mark.parametrize("subject", [">.a", "a.>.b", "a*", "a.b>", "**"])
def test_misplaced_wildcards_are_refused(subject):
    with pytest.raises(InvalidMessageError):
        guard.check_subscribe(subject)


@pytest.mark.parametrize(
    ("pattern", "subject", "expected"),
    [
        ("a.b", "a.b", True),
        ("a.b", "a.c", False),
        ("a.*", "a.b", True),
        ("a.*", "a", False),
        ("a.*", "a.b.c", False),
        ("a.>", "a.b.c", True),
        ("a.>", "a", False),
        (">", "a", True),
        ("*.*", "a.b", True),
        ("*.b.>", "a.b", False),
        ("a.b.c", "a.b", False),
    ],
)
def test_matches(pattern, subject, expected):
    assert guard.matches(pattern, subject) is expected


_parts = st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=4)


@given(_parts, st.data())
def test_a_pattern_made_from_a_subject_matches_it(parts, data):
    pattern = [data.draw(st.sampled_from([part, "*"])) for part in parts]
    cut = data.draw(st.integers(0, len(parts) - 1))
    assert guard.matches(".".join(pattern), ".".join(parts))
    assert guard.matches(".".join([*pattern[:cut], ">"]), ".".join(parts))
    assert not guard.matches(".".join([*pattern, "*"]), ".".join(parts))


def test_header_size_is_what_the_wire_takes():
    headers = {"traceparent": "00-" + "a" * 32, "x": ""}
    block = "NATS/1.0\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items()) + "\r\n"
    assert guard.headers_size(headers) == len(block)
    assert guard.headers_size(None) == guard.headers_size({}) == 0


@pytest.mark.parametrize(
    "headers",
    [{"a": "b\r\nc: d"}, {"a\r\n": "b"}, {"": "b"}, {"a b": "c"}, {"a": "ü"}, {"a:": "b"}, {"a": "\x00"}],
)
def test_headers_that_would_break_a_line_are_refused(headers):
    with pytest.raises(InvalidMessageError):
        guard.headers_size(headers)


def test_a_payload_over_the_limit_says_both_numbers():
    guard.check_size(10, 10)
    with pytest.raises(PayloadTooLargeError) as caught:
        guard.check_size(11, 10)
    assert (caught.value.size, caught.value.max_payload) == (11, 10)
