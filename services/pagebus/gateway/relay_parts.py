"""The parts of a relay: one request of its record, the handle that its generation holds, and how long
readers wait.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pagebus.gateway.submitter import Ticket
from pagebus.requester.events import Event, RequestSpec
from pagebus.requester.following import Following

Change = Literal["settled", "owner", "replaced"]
"""A relay has read all that there is while its owner lives; owns the requests; owns them no longer."""


@dataclass(frozen=True, kw_only=True)
class RelayTiming:
    """When a reader doubts, in seconds."""

    silence_s: float = 1.0  # without news: look whether the owner still holds the request
    hole_s: float = 0.3  # something is missing: read the log again
    hole_patience_s: float = 1.0  # still missing: ask for it as the new owner
    deaf_patience_s: float = 3.0  # the owner's process is there and does not answer: taken as gone
    retry_s: float = 0.5  # the bus could not answer


@dataclass(eq=False)
class Part:
    """One of the record's requests."""

    spec: RequestSpec
    on_event: Callable[[Event], None]
    ticket: Ticket | None = None  # while it is owned
    following: Following | None = None  # while it is read
    num_cached: int | None = None  # as the first owner was told
    is_over: bool = False


class RelayTicket:
    """A request's handle for its generation, whoever owns the request now."""

    def __init__(self, part: Part) -> None:
        self._part = part

    @property
    def num_cached_tokens(self) -> int | None:
        """How many of the prompt's tokens came from the prefix cache; None until it is told."""
        part = self._part
        if part.num_cached is None and part.ticket is not None:
            return part.ticket.num_cached_tokens
        if part.num_cached is None and part.following is not None:
            return part.following.num_cached_tokens
        return part.num_cached

    def end_choice(self, choice: int) -> None:
        """Stop one choice; no more events for it."""
        if self._part.ticket is not None:
            self._part.ticket.end_choice(choice)
        elif self._part.following is not None:
            self._part.following.end_choice(choice)

    def cancel(self) -> None:
        """No more events; what this gateway owns is stopped, what another one owns is not."""
        self._part.is_over = True
        if self._part.ticket is not None:
            self._part.ticket.cancel()
