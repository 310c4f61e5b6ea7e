"""What the gateway asks of a requester: to submit a request, and what the leader last said."""

from collections.abc import Callable
from typing import Protocol

from pagebus.bus.messages import Heartbeat
from pagebus.requester.events import Event, RequestSpec


class Ticket(Protocol):
    """A submitted request, as the requester gives it."""

    @property
    def num_cached_tokens(self) -> int | None:
        """How many of the prompt's tokens came from the prefix cache; None until it is told."""

    def end_choice(self, choice: int) -> None:
        """Stop one choice; no more events for it."""

    def cancel(self) -> None:
        """Stop everything; no more events."""


class Submitter(Protocol):
    """What is needed of a requester."""

    def submit(self, spec: RequestSpec, on_event: Callable[[Event], None]) -> Ticket:
        """Send a request; events come on the loop."""

    @property
    def heartbeat(self) -> Heartbeat | None:
        """The leader's newest heartbeat."""

    @property
    def heartbeat_age_s(self) -> float:
        """Seconds since it came; infinite without one."""
