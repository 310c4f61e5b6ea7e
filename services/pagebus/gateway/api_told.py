"""What a gateway has told of a NATS client's request, so that it can tell it again without asking anybody.

It knows ids and reasons, nothing of subjects.
"""

import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence

from pagebus.bus.messages import FinishReason
from pagebus.gateway.event_ids import OPEN, Sent
from pagebus.gateway.generation_events import GenerationRequest, TextEvent
from pagebus.gateway.generations import Submit
from pagebus.gateway.sampling_params import TokenDetails
from pagebus.gateway.splitting import Splitter, one_by_one
from pagebus.requester.events import Event, NewTokens, RequestSpec

KEPT_S = 30.0
"""How long what ended is kept: its last events may have been lost."""
_MAX_ENDED = 1000


class _NoTicket:
    """Nothing runs, so nothing can be stopped."""

    num_cached_tokens: int | None = None

    def end_choice(self, choice: int) -> None:
        """Nothing to end."""

    def cancel(self) -> None:
        """Nothing to stop."""


class Told:
    """The ids of every choice of a running request. Log-probabilities are not kept."""

    def __init__(self, request: GenerationRequest, details: TokenDetails) -> None:
        self.request = request
        self.details = details
        self._ids = [array("i") for _ in range(request.num_choices)]
        self._reasons: list[FinishReason | None] = [None] * request.num_choices

    def note(self, event: TextEvent) -> None:
        """The request's next event."""
        ids = self._ids[event.choice]
        if event.index == len(ids):
            ids.extend(event.ids)
            self._reasons[event.choice] = event.finish_reason

    def can_tell(self, have: Sequence[int]) -> bool:
        """Whether somebody who has so many tokens of each choice can be told the rest from here."""
        details = self.details
        if details.num_logprobs is not None or details.num_prompt_logprobs is not None:
            return False
        return len(have) == len(self._ids) and all(map(int.__le__, have, map(len, self._ids)))

    def submit(self, have: Sequence[int]) -> Submit:
        """Gives what is known to a generation that only repeats."""

        def submit(spec: RequestSpec, on_event: Callable[[Event], None]) -> _NoTicket:
            take = Splitter(one_by_one(on_event), [Sent(OPEN, num_ids) for num_ids in have]).take
            for choice, (ids, reason) in enumerate(zip(self._ids, self._reasons, strict=True)):
                if ids or reason:
                    take(NewTokens(choice, 0, ids, reason))
            return _NoTicket()

        return submit


class Ended:
    """Requests that ended a moment ago, by the id that their client chose."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._told: OrderedDict[str, tuple[float, Told]] = OrderedDict()

    def add(self, identity: str, told: Told) -> None:
        """A request ended."""
        self.forget(identity)
        self._told[identity] = (self._clock() + KEPT_S, told)
        if len(self._told) > _MAX_ENDED:
            self._told.popitem(last=False)

    def forget(self, identity: str) -> None:
        """The id begins anew."""
        self._told.pop(identity, None)

    def get(self, identity: str) -> Told | None:
        """What was told of a request that ended, unless that is too long ago."""
        while self._told and next(iter(self._told.values()))[0] < self._clock():
            self._told.popitem(last=False)
        found = self._told.get(identity)
        return None if found is None else found[1]
