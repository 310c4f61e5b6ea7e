"""What the core asks of the world: messages to send, and requests that ended. Knows not how they go."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from pagebus.bus.messages import Accepted, Failed, Plan, Rejected, Tokens

Outcome = Literal["finished", "cancelled", "failed", "replaced"]


class SendPlan(NamedTuple):
    """Send `plan` to one executor, now; the same object again means the same bytes again."""

    executor: str
    plan: Plan


class SendReply(NamedTuple):
    """Send a message to a requester's reply subject."""

    subject: str
    message: Accepted | Rejected | Failed | Tokens


class Probe(NamedTuple):
    """Find out whether anybody listens for this executor's plans; `on_no_responders` if nobody does."""

    executor: str


class Ended(NamedTuple):
    """One attempt ended. All times are the core's monotonic seconds; None where it never came so far."""

    request_id: str
    attempt: int
    outcome: Outcome
    code: str  # of the failure; "" otherwise
    finish_reasons: tuple[str, ...]  # one a choice that this attempt ended
    arrival_s: float
    first_scheduled_s: float | None
    first_token_s: float | None  # when the first id made by this attempt was reported
    end_s: float
    num_prompt_tokens: int
    num_generated_tokens: int  # made by this attempt, over all choices
    num_preemptions: int
    headers: Mapping[str, str]  # trace context of the Generate


Action = SendPlan | SendReply | Probe | Ended
