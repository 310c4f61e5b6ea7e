"""What every bus checks before it sends: subjects, headers and sizes. Knows no connection."""

import re
from collections.abc import Mapping

from pagebus.bus.protocol import InvalidMessageError, PayloadTooLargeError

MAX_SUBJECT_CHARS = 512

_TOKEN = r"[!-)+\-/-=?-~]+"  # printable ASCII without space, '*', '.', '>'  # noqa: S105
_PUBLISH = re.compile(rf"{_TOKEN}(\.{_TOKEN})*")
_SUBSCRIBE = re.compile(rf"((\*|{_TOKEN})\.)*(>|\*|{_TOKEN})")
_HEADER_NAME = re.compile(r"[!-9;-~]{1,128}")
_HEADER_VALUE = re.compile(r"[ -~\t]*")
_HEADER_FRAME = len("NATS/1.0\r\n\r\n")


def check_publish(subject: str) -> None:
    """Raises `InvalidMessageError` unless `subject` is one plain subject: no wildcard, no empty part."""
    if len(subject) > MAX_SUBJECT_CHARS or not _PUBLISH.fullmatch(subject):
        raise InvalidMessageError(f"{subject[:80]!r} is no subject to publish on")


def check_subscribe(subject: str) -> None:
    """Raises `InvalidMessageError` unless `subject` is a subject, wildcards allowed as whole parts."""
    if len(subject) > MAX_SUBJECT_CHARS or not _SUBSCRIBE.fullmatch(subject):
        raise InvalidMessageError(f"{subject[:80]!r} is no subject to subscribe to")


def headers_size(headers: Mapping[str, str] | None) -> int:
    """Bytes that `headers` take on the wire; raises `InvalidMessageError` for what would break a line."""
    if not headers:
        return 0
    size = _HEADER_FRAME
    for name, value in headers.items():
        if not _HEADER_NAME.fullmatch(name) or not _HEADER_VALUE.fullmatch(value):
            raise InvalidMessageError(f"header {name[:80]!r} holds what a header line cannot")
        size += len(name) + len(value) + len(": \r\n")
    return size


def check_size(num_bytes: int, max_payload: int) -> None:
    """Raises `PayloadTooLargeError` if payload and headers of `num_bytes` exceed `max_payload`."""
    if num_bytes > max_payload:
        raise PayloadTooLargeError(num_bytes, max_payload)


def matches(pattern: str, subject: str) -> bool:
    """Whether a subscription to `pattern` receives `subject`."""
    if pattern == subject:
        return True
    wanted, parts = pattern.split("."), subject.split(".")
    for position, part in enumerate(wanted):
        if part == ">":
            return len(parts) > position
        if position >= len(parts) or part not in ("*", parts[position]):
            return False
    return len(wanted) == len(parts)
