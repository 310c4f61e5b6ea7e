"""Stored streams for tests without a bus: what was admitted is kept, and read again from rows in portions."""

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pagebus.bus.messages import PromptRow, TokenRow, pack_ids
from pagebus.gateway.jobs import Job
from pagebus.gateway.stored_streams import Admission
from pagebus.gateway.stream_record import Segment, StreamRecord, record_of
from pagebus.requester.events import Event, RequestFailed, RequestSpec
from pagebus.requester.following import Following
from tests.support.gateway import VOCAB_SIZE, ScriptedRequester, Submitted
from tests.support.logprobs import made_up_all

END_NAMES = ("stop", "length")


@dataclass(frozen=True)
class Made:
    """All ids of a choice that an executor made, and how it ended."""

    ids: Sequence[int]
    finish: str


def rows_of(spec: RequestSpec, made: Sequence[Made], rng: random.Random) -> list[PromptRow | TokenRow]:
    """The log of a request: choices by turns, in portions, asked for again at times (what the owner had not
    received by then comes again, under the next attempt)."""
    num_top, num_prompt_top = spec.sampling.num_logprobs, spec.sampling.num_prompt_logprobs
    rows: list[PromptRow | TokenRow] = []
    if num_prompt_top is not None:
        for start in range(1, len(spec.prompt), 3):
            told = made_up_all(list(spec.prompt)[start : start + 3], start, num_prompt_top, VOCAB_SIZE)
            rows.append(PromptRow(request_id=spec.request_id, start=start, logprobs=told))
    at, attempt = [0] * len(made), 1
    open_choices = list(range(len(made)))
    while open_choices:
        if rng.random() < 0.1:
            attempt += 1
            at = [rng.randint(max(0, index - 3), index) if index else 0 for index in at]
            open_choices = [c for c in range(len(made)) if c in open_choices or at[c] < len(made[c].ids)]
        choice = rng.choice(open_choices)
        whole = made[choice].ids
        end = min(len(whole), at[choice] + rng.randint(1, 3))
        new = whole[at[choice] : end]
        is_last = end == len(whole)
        rows.append(
            TokenRow(
                request_id=spec.request_id,
                attempt=attempt,
                choice=choice,
                index=at[choice],
                ids=pack_ids(new),
                finish_reason=made[choice].finish if is_last else None,
                logprobs=None if num_top is None else made_up_all(new, at[choice], num_top, VOCAB_SIZE),
                num_cached=2,
            )
        )
        at[choice] = end
        if is_last:
            open_choices.remove(choice)
    return rows


def play_all(made: Sequence[Made], rng: random.Random) -> Callable[[Submitted], None]:
    """A script for the owner: the choices by turns, in portions."""

    def play(request: Submitted) -> None:
        request.num_cached_tokens = 2
        left = {choice: list(one.ids) for choice, one in enumerate(made)}
        while left:
            choice = rng.choice(list(left))
            size = rng.randint(1, 3)
            new, left[choice] = left[choice][:size], left[choice][size:]
            is_last = not left[choice]
            request.tokens(new, choice=choice, finish=made[choice].finish if is_last else None)
            if is_last:
                del left[choice]

    return play


@dataclass
class ReadTicket:
    """One request's handle."""

    following: Following

    @property
    def num_cached_tokens(self) -> int | None:
        return self.following.num_cached_tokens

    def end_choice(self, choice: int) -> None:
        self.following.end_choice(choice)

    def cancel(self) -> None:
        pass


@dataclass
class ReadRelay:
    """A reader: gives what `rows` say, in portions."""

    record: StreamRecord
    made: Sequence[Made]
    rng: random.Random
    is_owner: bool = False
    parts: list[tuple[Following, RequestSpec, Callable[[Event], None]]] = field(default_factory=list)

    def submit(self, spec: RequestSpec, on_event: Callable[[Event], None]) -> ReadTicket:
        following = Following(spec)
        self.parts.append((following, spec, on_event))
        return ReadTicket(following)

    def start(self) -> None:
        asyncio.get_running_loop().call_soon(self._play)

    def _play(self) -> None:
        for following, spec, on_event in self.parts:
            for row in rows_of(spec, self.made, self.rng):
                if isinstance(row, PromptRow):
                    following.take_prompt(row)
                else:
                    following.take_row(row)
            for event in following.news():
                on_event(event)
            if not following.is_over:
                on_event(RequestFailed("not_over", "something is missing in the rows"))


@dataclass
class OwnRelay:
    """An owner: everything is the requester's."""

    requester: ScriptedRequester
    is_owner: bool = True

    def submit(self, spec: RequestSpec, on_event: Callable[[Event], None]) -> Submitted:
        return self.requester.submit(spec, on_event)

    def start(self) -> None:
        pass


class FakeStreams:
    """In place of `StoredStreams`: one record, read as `made` says."""

    def __init__(self, requester: ScriptedRequester, made: Sequence[Made], rng: random.Random) -> None:
        self.requester = requester
        self.made = made
        self.rng = rng
        self.record: StreamRecord | None = None

    async def admit(self, job: Job) -> Admission:
        self.record = record_of(job, Segment("g", 1), 1e12)
        return Admission(job, OwnRelay(self.requester))

    async def find(self, tenant: str, answer_id: str) -> ReadRelay | None:
        assert self.record is not None
        return ReadRelay(self.record, self.made, self.rng) if answer_id == self.record.id else None

    def submitted(self, relay: object) -> None:
        pass

    def forget(self, relay: object) -> None:
        pass

    def void(self, relay: object) -> None:
        pass
