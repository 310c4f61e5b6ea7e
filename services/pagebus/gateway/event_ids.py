"""The ids of a stream's events: how much of every choice a reader has once it has the event. Pure.

```
id       part "." part ...            one part a choice, in order; then ".u" once the usage was sent
part     (empty)                      nothing yet
         r                            the role, while an echo is still to come
         12                           what opens the choice, and the text that the first 12 tokens settle
         12e                          all of its text (which the 12th token or the end of the choice settled)
         12f                          its finish reason too
```
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from pagebus.gateway.errors import ApiError, invalid

NOTHING, ROLE, OPEN, TEXT, FINISH = range(5)
"""How far a choice was sent: ..., its role, all that opens it, all of its text, its finish reason."""

MAX_CHOICES = 64
"""Streams of more choices have no ids: every event would name all of them."""

_USAGE = "u"
_PART = re.compile(r"(?P<role>r)|(?P<count>0|[1-9][0-9]{0,9})(?P<stage>[ef]?)", re.ASCII)
_STAGES = {"": OPEN, "e": TEXT, "f": FINISH}
_MAX_ID_CHARS = 1024


class Sent(NamedTuple):
    """How much of a choice a reader has."""

    stage: int = NOTHING
    num_ids: int = 0

    @property
    def part(self) -> str:
        """Its part of an event's id."""
        if self.stage <= ROLE:
            return "r" if self.stage == ROLE else ""
        return f"{self.num_ids}{'' if self.stage == OPEN else 'e' if self.stage == TEXT else 'f'}"


class Position(NamedTuple):
    """How much of a stream a reader has."""

    choices: tuple[Sent, ...]
    has_usage: bool = False


def start(num_choices: int) -> Position:
    """Nothing yet."""
    return Position((Sent(),) * num_choices)


def read_position(text: str, num_choices: int, max_tokens: int) -> Position:
    """The position that an event id (or a client's `after`) names. Raises a 400 for what is no id of a stream
    with these choices, or lies past `max_tokens`."""
    parts = text.split(".") if len(text) <= _MAX_ID_CHARS else []
    has_usage = len(parts) == num_choices + 1 and parts[-1] == _USAGE
    if has_usage:
        parts.pop()
    if len(parts) != num_choices:
        raise _malformed(text, f"it must name {num_choices} choice(s)")
    choices = []
    for part in parts:
        found = _PART.fullmatch(part)
        if found is None and part:
            raise _malformed(text, f"{part[:20]!r} names no place in a choice")
        if found is None or found["role"]:
            choices.append(Sent(NOTHING if found is None else ROLE))
            continue
        num_ids = int(found["count"])
        if num_ids > max_tokens:
            raise past_the_end(max_tokens)
        choices.append(Sent(_STAGES[found["stage"]], num_ids))
    if has_usage and any(choice.stage != FINISH for choice in choices):
        raise _malformed(text, "the usage follows the end of every choice")
    return Position(tuple(choices), has_usage)


def past_the_end(num_tokens: int) -> ApiError:
    """A 400 for a reader that says that it has more than there is."""
    return invalid(
        f"this lies past the end of the stream: a choice has {num_tokens} tokens",
        "after",
        "after_out_of_range",
    )


def _malformed(text: str, why: str) -> ApiError:
    return invalid(f"{text[:80]!r} is no event id of this stream: {why}", "after", "invalid_event_id")


class IdLines:
    """The `id:` lines of one stream's events, in the order in which they are sent."""

    def __init__(self, sent: Sequence[Sent]) -> None:
        self._parts = [choice.part.encode() for choice in sent]

    def before(self, choice: int, part: bytes, event: bytes) -> bytes:
        """The event with its id, after which a reader has `part` of this choice."""
        parts = self._parts
        parts[choice] = part
        return b"id: %b\n%b" % (part if len(parts) == 1 else b".".join(parts), event)

    def plain(self, choice: int, num_ids: int, event: bytes) -> bytes:
        """The same after so many ids of this choice and nothing more."""
        if len(self._parts) == 1:  # what comes after has a part of its own
            return b"id: %d\n%b" % (num_ids, event)
        return self.before(choice, b"%d" % num_ids, event)

    def usage_line(self) -> bytes:
        """The line of the usage's event."""
        return b"id: %b.%b\n" % (b".".join(self._parts), _USAGE.encode())
