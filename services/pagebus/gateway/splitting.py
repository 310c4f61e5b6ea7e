"""Splits what comes of a request where a reader's own part of it ends, so that the text layer makes the rest
apart from what the reader has. Pure.
"""

from collections.abc import Callable, Sequence

from pagebus.gateway.event_ids import OPEN, Sent
from pagebus.requester.events import Event, NewTokens
from pagebus.requester.packed_logprobs import cut


class Splitter:
    """Passes a request's events on; the text of the first ids never depends on what follows in one event."""

    def __init__(self, on_event: Callable[[Event], None], sent: Sequence[Sent]) -> None:
        self._on_event = on_event
        self._sent: list[Sent | None] = [choice if choice.stage >= OPEN else None for choice in sent]

    def take(self, event: Event) -> None:
        """One event in, one or two out."""
        if isinstance(event, NewTokens) and (sent := self._sent[event.choice]) is not None:
            end = event.index + len(event.ids)
            if end >= sent.num_ids:
                self._sent[event.choice] = None
            if event.index < sent.num_ids and (
                sent.num_ids < end or (sent.num_ids == end and self._ends_later(event, sent))
            ):
                for part in split(event, sent.num_ids - event.index):
                    self._on_event(part)
                return
        self._on_event(event)

    def _ends_later(self, event: NewTokens, sent: Sent) -> bool:
        """Whether the reader has the ids, but not what their end settled. A stop id's text is never sent, so
        it stays with its reason."""
        return event.finish_reason == "length" and sent.stage == OPEN


def split(event: NewTokens, num_ids: int) -> tuple[NewTokens, NewTokens]:
    """The first `num_ids` ids, and the rest with the finish reason."""
    logprobs = event.logprobs
    end = len(event.ids)
    return (
        NewTokens(
            event.choice,
            event.index,
            event.ids[:num_ids],
            None,
            None if logprobs is None else cut(logprobs, 0, num_ids),
        ),
        NewTokens(
            event.choice,
            event.index + num_ids,
            event.ids[num_ids:],
            event.finish_reason,
            None if logprobs is None else cut(logprobs, num_ids, end),
        ),
    )


def one_by_one(on_event: Callable[[Event], None]) -> Callable[[Event], None]:
    """Passes events on one id at a time, so that every place in the text is an event's end."""

    def take(event: Event) -> None:
        while isinstance(event, NewTokens) and len(event.ids) > 1:
            first, event = split(event, 1)
            on_event(first)
        on_event(event)

    return take
