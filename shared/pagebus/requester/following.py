"""One request, seen by somebody who does not own it: what its owner received, put together again from the
messages that were sent to the owner. Pure; knows neither logs nor subjects.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from pagebus.bus.messages import (
    DecodeError,
    Failed,
    FinishReason,
    Logprobs,
    PromptRow,
    Rejected,
    TokenRow,
    unpack_ids,
)
from pagebus.requester.events import Event, NewTokens, ReceivedChoice, RequestFailed, RequestSpec
from pagebus.requester.packed_logprobs import cut, is_whole
from pagebus.requester.prompt_part import PromptPart


@dataclass
class _Piece:
    """Ids that came together, from `index` on."""

    index: int
    num_ids: int
    logprobs: Logprobs | None


@dataclass
class _Choice:
    """One choice. Ids below `num_told` were given out and change no more; `pieces` are the others."""

    ids: "array[int]"
    finish_reason: FinishReason | None = None
    attempt: int = 0
    num_told: int = 0
    num_seen: int = 0  # ids that this attempt is known to have made
    is_end_told: bool = False
    pieces: list[_Piece] = field(default_factory=list)


class Following:
    """Grows by all rows of a request, in the order in which they were sent; `news` gives each event once.

    An owner that asks again says which ids it has. So the first row of a higher attempt, at index i, makes
    what a lower one made from i on void (nobody received it):

    ```
    attempt 1   0 1 2 3 4 5        the owner received 0 1 2 3
    attempt 2           4 5 6 7
    ```

    Rows of an attempt lower than the highest are stale, as they are for the owner. A row past the next index
    is left out: before it is a hole.
    """

    def __init__(self, spec: RequestSpec) -> None:
        self.num_cached_tokens: int | None = None
        self.num_rows = 0  # that brought something
        self._num_prompt = len(spec.prompt)
        self._num_logprobs = spec.sampling.num_logprobs
        received = spec.received or (ReceivedChoice(),) * spec.num_choices
        self._choices = [
            _Choice(
                array("i", choice.ids),
                choice.finish_reason,
                num_told=len(choice.ids),
                is_end_told=choice.finish_reason is not None,
            )
            for choice in received
        ]
        has_prompt = spec.sampling.num_prompt_logprobs is not None
        self._prompt = PromptPart(len(spec.prompt), has_prompt, spec.num_prompt_told)
        self._has_prompt_hole = False
        self._attempt = 0
        self._failure: RequestFailed | None = None
        self._news: list[Event] = []

    @property
    def attempt(self) -> int:
        """The highest attempt seen; 0 before the first row."""
        return self._attempt

    @property
    def has_hole(self) -> bool:
        """Whether something is missing before what was seen already."""
        if self._has_prompt_hole and not self._prompt.is_told:
            return True
        return any(
            choice.num_seen > len(choice.ids) and choice.finish_reason is None for choice in self._choices
        )

    @property
    def num_prompt_told(self) -> int:
        """Positions of the prompt that are told, the first included."""
        return self._prompt.num_told

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to come: all choices ended and the prompt is told, or it failed."""
        if self._failure is not None:
            return True
        return self._prompt.is_told and all(choice.finish_reason for choice in self._choices)

    def received(self) -> list[ReceivedChoice]:
        """What is here of every choice, for who asks for the rest."""
        if not self._prompt.is_told:  # ids are given out after the prompt only
            return [
                ReceivedChoice((), choice.finish_reason if choice.is_end_told else None)
                for choice in self._choices
            ]
        return [ReceivedChoice(choice.ids[:], choice.finish_reason) for choice in self._choices]

    def end_choice(self, choice: int) -> None:
        """The reader has enough of this choice."""
        if 0 <= choice < len(self._choices):
            one = self._choices[choice]
            one.finish_reason = one.finish_reason or "stop"
            one.is_end_told = True
            one.pieces.clear()

    def take_row(self, row: TokenRow) -> None:
        """New ids of a choice."""
        if self._is_stale(row.attempt) or not 0 <= row.choice < len(self._choices):
            return
        choice = self._choices[row.choice]
        try:
            ids = unpack_ids(row.ids)
        except DecodeError:
            return
        has_logprobs = row.logprobs is not None
        if row.logprobs is not None and not is_whole(row.logprobs, len(ids)):
            return
        if ids and has_logprobs != (self._num_logprobs is not None):
            return
        if row.attempt > choice.attempt:
            if choice.attempt:  # the first attempt that is seen at all replaces nothing
                self._cut(choice, row.index)
            choice.attempt, choice.num_seen = row.attempt, 0
        if choice.is_end_told:
            return
        if row.choice == 0 and row.num_cached is not None and self.num_cached_tokens is None:
            self.num_cached_tokens = max(0, min(row.num_cached, self._num_prompt))
        have = len(choice.ids)
        choice.num_seen = max(choice.num_seen, row.index + max(len(ids), row.finish_reason is not None))
        if row.index > have:
            return
        new = ids[have - row.index :] if row.index < have else ids
        if new and choice.finish_reason is None:
            logprobs = None if row.logprobs is None else cut(row.logprobs, have - row.index, len(ids))
            choice.ids.extend(new)
            choice.pieces.append(_Piece(have, len(new), logprobs))
            self.num_rows += 1
        if row.finish_reason and choice.finish_reason is None and row.index + len(ids) == len(choice.ids):
            choice.finish_reason = row.finish_reason
            self.num_rows += 1

    def take_prompt(self, row: PromptRow) -> None:
        """Log-probabilities of the prompt."""
        if self._is_stale(row.attempt):
            return
        if self._prompt.is_gap(row):
            self._has_prompt_hole = True
            return
        told = self._prompt.take(row)
        if told is not None:
            self._has_prompt_hole = False
            self.num_rows += 1
            self._news.append(told)

    def take_end(self, message: Failed | Rejected) -> None:
        """An attempt that ended: the whole request, unless it may be asked for again."""
        if self._is_stale(message.attempt) or self.is_over:
            return
        match message:
            case Failed(is_retryable=False):
                failure = RequestFailed(message.code, message.message, message.is_client_fault)
            case Rejected():
                failure = RequestFailed(
                    message.code, message.message, message.is_client_fault, message.retry_after_s
                )
            case _:
                return
        self._failure = failure

    def news(self) -> list[Event]:
        """What was not given out yet, in an order that an owner might have received it in."""
        events, self._news = self._news, []
        if self._prompt.is_told:
            for index, choice in enumerate(self._choices):
                events += self._news_of(index, choice)
        if self._failure is not None:
            events.append(self._failure)
        return events

    def _is_stale(self, attempt: int) -> bool:
        if attempt < self._attempt:
            return True
        self._attempt = attempt
        return False

    def _cut(self, choice: _Choice, index: int) -> None:
        """Ids from `index` on were never received, but for what was given out here."""
        end = max(index, choice.num_told)
        if end >= len(choice.ids) or choice.is_end_told:
            return
        del choice.ids[end:]
        choice.finish_reason = None
        kept = [piece for piece in choice.pieces if piece.index < end]
        for piece in kept:
            piece.num_ids = min(piece.num_ids, end - piece.index)
            if piece.logprobs is not None:
                piece.logprobs = cut(piece.logprobs, 0, piece.num_ids)
        choice.pieces = kept

    def _news_of(self, index: int, choice: _Choice) -> list[Event]:
        if choice.is_end_told or (not choice.pieces and choice.finish_reason is None):
            return []
        pieces, choice.pieces = choice.pieces, []
        if all(piece.logprobs is None for piece in pieces):
            pieces = [_Piece(choice.num_told, len(choice.ids) - choice.num_told, None)]
        events: list[Event] = []
        for piece in pieces:
            is_last = piece.index + piece.num_ids == len(choice.ids)
            ids: Sequence[int] = choice.ids[piece.index : piece.index + piece.num_ids]
            reason = choice.finish_reason if is_last else None
            events.append(NewTokens(index, piece.index, ids, reason, piece.logprobs))
        choice.num_told = len(choice.ids)
        choice.is_end_told = choice.finish_reason is not None
        return events
