"""The text of one choice on its way to the client: detokenized, cut at the first stop string, nothing given
out early.

Knows neither requests nor HTTP.
"""

from collections.abc import Sequence
from typing import NamedTuple

from pagebus.gateway.detokenizer import Detokenizer
from pagebus.gateway.stop_strings import StopMatch, StopStrings


class TextDelta(NamedTuple):
    """What some ids brought. `stop`: the stop string that they completed, which ends the choice. `num_ids`:
    how many of them count, up to and with the one that completed it. `offsets`: of these, where that is asked
    for, how many complete characters of the text lie before each."""

    text: str
    stop: str | None
    num_ids: int
    offsets: Sequence[int] = ()


class TextStream:
    """One choice. The stream stops at the first id after which the decoded text holds a stop string; of
    several, the one that is complete first counts (of those that end at the same place, the longest). Not for
    two threads at once.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        has_offsets: bool = False,
    ) -> None:
        """`include_stop` leaves the stop string in the text; stop strings complete before `min_tokens` ids
        are text.

        Raises ValueError for an empty stop string."""
        self._detokenizer = detokenizer
        self._stops = StopStrings(stop)
        self._include_stop, self._min_tokens = include_stop, min_tokens
        self._has_offsets = has_offsets
        self.is_plain = not self._stops and not has_offsets
        self.push_plain = detokenizer.push
        """The next ids' text, where `is_plain`: every id counts, and none of them ends the choice."""
        self._num_ids = 0
        self._num_characters = 0  # that the detokenizer gave out
        self._is_stopped = False
        # The text, as far as it is not given out:   [ _held | _ahead ]
        # _held is settled, its end may begin a stop string; _ahead would follow if no id came (the
        # detokenizer's tail): stop strings are found in it, but it is not given out, since later ids may
        # still change it.
        self._held, self._states = "", self._stops.initial
        self._ahead, self._ahead_states = "", self._stops.initial

    @property
    def offset(self) -> int:
        """Complete characters of the text so far, held back ones and stop strings included."""
        return self._num_characters + len(self._detokenizer.tail())

    def push(self, ids: Sequence[int]) -> TextDelta:
        """The next ids. After a stop nothing counts any more."""
        if self._is_stopped:
            return TextDelta("", None, 0)
        if self.is_plain:
            return TextDelta(self.push_plain(ids), None, len(ids))
        offsets: list[int] = []
        for index, token_id in enumerate(ids):
            self._num_ids += 1
            if self._has_offsets:
                offsets.append(self.offset)
            text = self._detokenizer.push((token_id,))
            self._num_characters += len(text)
            match = self._settle(text) or self._look_ahead()
            if match is not None:
                return TextDelta(self._cut(match), match.stop, index + 1, offsets)
        return TextDelta(self._release(max(self._states, default=0)), None, len(ids), offsets)

    def finish(self) -> TextDelta:
        """The rest, when no more ids come; it may still complete a stop string."""
        if self._is_stopped:
            return TextDelta("", None, 0)
        self._is_stopped = True
        rest = self._detokenizer.finish()
        if not self._stops:
            return TextDelta(rest, None, 0)
        match = self._settle(rest)
        if match is not None:
            return TextDelta(self._cut(match), match.stop, 0)
        return TextDelta(self._release(0), None, 0)

    def _settle(self, text: str) -> StopMatch | None:
        """Takes settled text in; a match's end counts from the start of `_held`."""
        if not text:
            return None
        match = self._scan_after_held(text)
        self._held += text
        self._states = self._ahead_states
        self._ahead, self._ahead_states = "", self._states
        return match

    def _look_ahead(self) -> StopMatch | None:
        tail = self._detokenizer.tail()
        return self._scan_after_held(tail) if tail != self._ahead else None

    def _scan_after_held(self, text: str) -> StopMatch | None:
        """Scans what follows `_held`, going on where `_ahead` was scanned already; `_ahead` is then
        `text`."""
        num_scanned = len(self._ahead) if text.startswith(self._ahead) else 0
        states = self._ahead_states if num_scanned else self._states
        is_armed = self._num_ids >= self._min_tokens
        self._ahead_states, match = self._stops.scan(text[num_scanned:], states, is_armed)
        self._ahead = text
        if match is None:
            return None
        return StopMatch(match.stop, len(self._held) + num_scanned + match.end)

    def _cut(self, match: StopMatch) -> str:
        self._is_stopped = True
        text = self._held + self._ahead
        return text[: match.end if self._include_stop else match.end - len(match.stop)]

    def _release(self, num_kept: int) -> str:
        at = len(self._held) - num_kept
        text, self._held = self._held[:at], self._held[at:]
        return text
