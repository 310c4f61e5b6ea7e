"""What a reader has of one request's events, and what is new in the next one. Pure.

Events may be lost, come again, or come in other portions after a request was joined again: the index of the
tokens tells.
"""

from collections.abc import Iterator, Sequence

import msgspec

from pagebus.bus.messages import ApiTokens

MAX_EARLY = 100_000
"""Most events that may wait for what was lost before them."""


class Reading:
    """`take` each event and pass on what it gives; ask for the rest where `has_gap`."""

    def __init__(self, num_choices: int | None = None) -> None:
        """`num_choices` None: it is not known, and what was told before the first event is not missed."""
        self.have_prompt = 0  # places of the prompt's log-probabilities
        self._num_choices = num_choices
        self._have: dict[int, int] = dict.fromkeys(range(num_choices or 0), 0)
        self._ended: set[int] = set()
        self._early: dict[int, dict[int, ApiTokens]] = {}
        self._num_early = 0
        self._has_cut = False

    @property
    def have(self) -> Sequence[int]:
        """Tokens of every choice so far."""
        return [self._have[choice] for choice in sorted(self._have)]

    @property
    def has_gap(self) -> bool:
        """Whether something is missing before what came already."""
        return self._has_cut or self._num_early > 0

    @property
    def is_complete(self) -> bool:
        """Whether every choice ended; where their number is not known, whether nothing is missing."""
        if self._num_choices is None:
            return not self.has_gap
        return len(self._ended) >= self._num_choices

    def take(self, event: ApiTokens) -> Iterator[ApiTokens]:
        """What is new: the event, nothing, or it and others that waited for it."""
        if event.prompt_logprobs is not None:
            yield from self._take_prompt(event)
            return
        choice = event.choice
        if choice in self._ended:
            return
        have = self._have.setdefault(choice, event.index)
        if event.index > have:
            self._keep(event)
            return
        if event.index < have:
            # Text cannot be cut at a token; what comes again when asked for comes token by token.
            self._has_cut |= event.index + len(event.token_ids) > have
            return
        early = self._early.get(choice, {})
        following: ApiTokens | None = event
        while following is not None:
            self._has_cut = False
            self._have[choice] = following.index + len(following.token_ids)
            if following.finish_reason is not None:
                self._ended.add(choice)
                self._num_early -= len(early)
                early.clear()
            yield following
            following = early.pop(self._have[choice], None)
            self._num_early -= following is not None
        for index in [index for index in early if index < self._have[choice]]:
            del early[index]
            self._num_early -= 1

    def _take_prompt(self, event: ApiTokens) -> Iterator[ApiTokens]:
        told = event.prompt_logprobs or []
        start = self.have_prompt if event.prompt_start is msgspec.UNSET else event.prompt_start
        if start > self.have_prompt:
            self._has_cut = True
            return
        new = told[self.have_prompt - start :]
        if new:
            yield msgspec.structs.replace(event, prompt_logprobs=new, prompt_start=self.have_prompt)
            self.have_prompt += len(new)

    def _keep(self, event: ApiTokens) -> None:
        early = self._early.setdefault(event.choice, {})
        if self._num_early < MAX_EARLY and event.index not in early:
            early[event.index] = event
            self._num_early += 1
