"""What owners of requests say to each other on their life subjects. An executor's probe is empty. Pure.

```
probe    "<request id>"         does it run with you?          answer  "live" or "not here"
         "<request id> moved"   it is mine now, read the record
```
"""

from dataclasses import dataclass

from pagebus.bus import subjects

LIVE = b"live"
NOT_HERE = b"not here"

_MOVED = "moved"
_MAX_BYTES = 80


@dataclass(frozen=True)
class OwnerProbe:
    """A probe about one request; `is_taken_over`: its sender says that it owns the request now."""

    request_id: str
    is_taken_over: bool = False

    def encode(self) -> bytes:
        """The probe's payload."""
        return (self.request_id + (f" {_MOVED}" if self.is_taken_over else "")).encode()


def read_probe(data: bytes) -> OwnerProbe | None:
    """The probe in a payload; None for an executor's, and for what is none."""
    if not data or len(data) > _MAX_BYTES or not data.isascii():
        return None
    request_id, _, word = data.decode("ascii").partition(" ")
    if not subjects.is_part(request_id) or word not in ("", _MOVED):
        return None
    return OwnerProbe(request_id, word == _MOVED)
