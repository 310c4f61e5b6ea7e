"""Identities of requests: our own random ones, and the client's `x-request-id` made harmless."""

import re
import secrets

LOCATOR_CHARS = 24

_ALLOWED = re.compile(r"[A-Za-z0-9._:@/+=-]{1,128}")


def new_request_id() -> str:
    """A random 128-bit id, fit to be a part of a subject; it never comes from a client."""
    return secrets.token_hex(16)


def new_answer_id(locator: str = "") -> str:
    """The part of an answer's id after its prefix: where its record lies (`LOCATOR_CHARS`), random if it is
    not given, and 64 random bits that only its reader knows."""
    return (locator or secrets.token_hex(LOCATOR_CHARS // 2)) + secrets.token_hex(8)


def echoed_request_id(header: bytes | None) -> str:
    """The client's `x-request-id` if it is short and harmless in a header and a log, else a new id."""
    if header is not None:
        text = header.decode("latin-1").strip()
        if _ALLOWED.fullmatch(text):
            return text
    return new_request_id()
