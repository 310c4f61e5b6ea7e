"""Who may use which route: Bearer keys, compared by hash in constant time; every route but a few needs one.

It looks at the path as the server parsed it from the request line, never at a URL rebuilt from headers.
"""

import hashlib
import hmac
from collections.abc import Iterable, Sequence

OPEN_PATHS = frozenset({"/health", "/ready", "/version"})
"""Exact paths that need no key; everything else does, also what does not exist."""


class Keys:
    """The keys that clients may send. Without any, everybody may do everything."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    @property
    def is_open(self) -> bool:
        """Whether no key is asked for."""
        return not self._digests

    def allow(self, path: str, headers: Sequence[tuple[bytes, bytes]]) -> bool:
        """Whether a request for `path` with these headers may go on."""
        return self.is_open or path in OPEN_PATHS or self.tenant(headers) is not None

    def tenant(self, headers: Sequence[tuple[bytes, bytes]]) -> str | None:
        """A short name for the key that was sent ("" where none is asked for), or None for a wrong one.

        Exactly one `authorization` header counts: two are an attempt to confuse a proxy. All keys are
        compared, whichever fits, so that the time taken tells nothing.
        """
        if self.is_open:
            return ""
        values = [value for name, value in headers if name == b"authorization"]
        if len(values) != 1:
            return None
        scheme, _, key = values[0].strip().partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        is_known = False
        for known in self._digests:
            is_known |= hmac.compare_digest(known, digest)
        if scheme.lower() != b"bearer" or not is_known:
            return None
        return digest.hex()[:16]
