"""The clients of a run: what they ask for, when they lose patience, and what they must get."""

import enum
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from pagebus.bus.messages import FinishReason, Sampling
from pagebus.executor.fake import FakeModel, fake_sequence
from pagebus.requester.events import Event, NewTokens, ReceivedChoice, RequestFailed, RequestSpec
from pagebus.sim.scenario import Scenario

RAISING_ID = 600
"""A step that computes this id raises; the model itself makes none above 511."""
LONG_S = 300.0
TERM_ATTEMPTS = 65536
"""Each owner's attempts begin at a multiple of this."""
LATE_S = 1.0
"""A request ends at its deadline, or so much later at most."""


class ViolationError(AssertionError):
    """Something happened that must never happen."""


class Manner(enum.Enum):
    """What a client does besides waiting."""

    PATIENT = "patient"
    CANCELS = "cancels"
    ENDS_CHOICE = "ends a choice"  # as a stop string does
    SHORT = "short deadline"


@dataclass
class Client:
    """One request's owner and reader: checks every event."""

    spec: RequestSpec
    expected: list[list[int]]
    manner: Manner
    start_s: float
    patience_s: float  # after its start, until it cancels
    end_at: int = 0  # ids of choice 0 after which it ends that choice
    poison_index: int | None = None  # who makes this id of choice 0 dies
    raises: bool = False
    gateway: str = ""
    term: int = 0
    asked_term: int = -1  # the newest that was submitted
    received: list[list[int]] = field(default_factory=list)
    finishes: list[FinishReason | None] = field(default_factory=list)
    deadline_s: float = 0.0
    ended_s: float | None = None
    failure: str | None = None
    is_orphan: bool = False

    @property
    def name(self) -> str:
        """The request's id."""
        return self.spec.request_id

    @property
    def is_open(self) -> bool:
        """Whether somebody waits for its end."""
        return self.ended_s is None and not self.is_orphan

    @property
    def ending(self) -> str:
        """How it ended, in a word."""
        return self.failure or ("orphan" if self.is_orphan else "finished")

    def begin(self) -> None:
        """Nothing is here yet."""
        self.received = [[] for _ in self.expected]
        self.finishes = [None for _ in self.expected]

    def as_received(self) -> tuple[ReceivedChoice, ...]:
        """What another owner is told."""
        pairs = zip(self.received, self.finishes, strict=True)
        return tuple(ReceivedChoice(tuple(ids), reason) for ids, reason in pairs)

    def take(self, event: Event, now_s: float) -> RequestFailed | None:
        """Check an event; gives back a failure, which others judge."""
        if self.ended_s is not None:
            raise ViolationError(f"{self.name}: an event after its end: {event}")
        if isinstance(event, RequestFailed):
            self.ended_s, self.failure = now_s, event.code
            return event
        if isinstance(event, NewTokens):
            self._take_ids(event)
            if all(self.finishes):
                self.ended_s = now_s
        return None

    def _take_ids(self, event: NewTokens) -> None:
        received, expected = self.received[event.choice], self.expected[event.choice]
        where = f"{self.name} choice {event.choice}"
        if self.finishes[event.choice] is not None:
            raise ViolationError(f"{where}: more after its end: {event}")
        if event.index != len(received):
            raise ViolationError(f"{where}: index {event.index} after {len(received)} ids")
        received.extend(event.ids)
        if received != expected[: len(received)]:
            raise ViolationError(f"{where}: wrong ids at {event.index}")
        if event.finish_reason is None:
            return
        self.finishes[event.choice] = event.finish_reason
        is_stopped = expected[-1] in self.spec.stop_token_ids and len(expected) >= self.spec.min_tokens
        reason = "stop" if is_stopped else "length"
        if received != expected or event.finish_reason != reason:
            raise ViolationError(
                f"{where} ended with {event.finish_reason} after {len(received)} of {len(expected)} ids"
            )


def draw_clients(rng: random.Random, scenario: Scenario, model: FakeModel) -> list[Client]:
    """All requests of a run."""
    bases = [[rng.randrange(400) for _ in range(64)] for _ in range(2)]
    clients = [_draw(rng, scenario, model, bases, number) for number in range(scenario.num_requests)]
    for client in rng.sample(clients, min(scenario.num_poison, len(clients))):
        client.poison_index = rng.randrange(len(client.expected[0]))
    for client in rng.sample(clients, min(scenario.num_raising, len(clients))):
        if client.poison_index is None:
            client.raises = True
            prompt = [*client.spec.prompt[:-1], RAISING_ID]
            client.spec = _replaced(client.spec, prompt)
    return clients


def _replaced(spec: RequestSpec, prompt: Sequence[int]) -> RequestSpec:
    return RequestSpec(
        request_id=spec.request_id,
        prompt=prompt,
        num_choices=spec.num_choices,
        sampling=spec.sampling,
        stop_token_ids=spec.stop_token_ids,
        max_tokens=spec.max_tokens,
        min_tokens=spec.min_tokens,
        priority=spec.priority,
        tenant=spec.tenant,
        timeout_s=spec.timeout_s,
    )


def _draw(
    rng: random.Random, scenario: Scenario, model: FakeModel, bases: list[list[int]], number: int
) -> Client:
    base = rng.choice(bases)
    prompt = base[: rng.randint(0, len(base))] + [rng.randrange(3) for _ in range(rng.randint(1, 16))]
    max_tokens = rng.randint(1, scenario.max_tokens)
    num_choices = rng.choice((1, 1, 1, 2, 3))
    sampling = Sampling(
        temperature=rng.choice((0.0, 1.0)),
        seed=number,
        presence_penalty=rng.choice((0.0, 0.0, 0.0, 0.5)),
    )
    stops: tuple[int, ...] = ()
    min_tokens = 0
    if rng.random() < 0.2:
        whole = fake_sequence(prompt, max_tokens, model=model, sampling=sampling)
        stops = (rng.choice(whole),)
        min_tokens = rng.choice((0, max_tokens // 2))
    expected = [
        fake_sequence(
            prompt,
            max_tokens,
            model=model,
            sampling=sampling,
            choice=choice,
            stop_token_ids=stops,
            min_tokens=min_tokens,
        )
        for choice in range(num_choices)
    ]
    manner = Manner.PATIENT
    if rng.random() < scenario.share_impatient:
        manner = rng.choice((Manner.CANCELS, Manner.ENDS_CHOICE, Manner.SHORT))
    spec = RequestSpec(
        request_id=f"q{number}",
        prompt=prompt,
        num_choices=num_choices,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        sampling=sampling,
        stop_token_ids=stops,
        priority=rng.choice((0, 0, 0, 1)),
        tenant=rng.choice(("", "", "t")),
        timeout_s=rng.uniform(0.5, 5.0) if manner is Manner.SHORT else LONG_S,
    )
    return Client(
        spec=spec,
        expected=expected,
        manner=manner,
        start_s=rng.choice((0.0, 1.5)) + rng.uniform(0.0, scenario.trouble_s * 0.8),
        patience_s=rng.choice((0.0, rng.uniform(0.0, 0.1), rng.uniform(0.0, 5.0))),
        end_at=rng.randint(1, len(expected[0])),
    )
