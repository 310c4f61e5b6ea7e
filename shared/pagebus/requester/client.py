"""What owns the requests of one process: sends them, feeds what arrives to their states, asks again in time.

Knows the bus and the pure `RequestState`; nothing of text, HTTP or who else serves the model.
"""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass

from pagebus.bus import messages, subjects
from pagebus.bus.messages import (
    Accepted,
    Cancel,
    DecodeError,
    Failed,
    Heartbeat,
    Message,
    Rejected,
    TokenRow,
    Tokens,
    unpack_ids,
)
from pagebus.bus.protocol import Bus, Msg, Subscription
from pagebus.requester.cancelled import Cancelled
from pagebus.requester.events import Event, NewTokens, RequestFailed, RequestSpec, check
from pagebus.requester.gathering import Gathering
from pagebus.requester.outbox import Outbox, Outgoing
from pagebus.requester.ownership import LIVE, NOT_HERE, read_probe
from pagebus.requester.state import RequestState
from pagebus.requester.timers import Timers
from pagebus.requester.timing import NEVER, Timing

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Live:
    """A request that runs: its state, its listener, and when the timer looks at it next (`timers.py`)."""

    state: RequestState
    on_event: Callable[[Event], None]
    timer_s: float = NEVER
    is_gathered: bool = False  # has ids that wait to be told (`gathering.py`)


class Ticket:
    """A request's handle for its owner."""

    def __init__(self, requester: "Requester", live: _Live) -> None:
        self._requester = requester
        self._live = live

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self._live.state.spec.request_id

    @property
    def has_ended(self) -> bool:
        """Whether no further event comes."""
        return self._live.state.has_ended

    @property
    def num_cached_tokens(self) -> int | None:
        """How many of the prompt's tokens came from the prefix cache; None until it is told."""
        return self._live.state.num_cached_tokens

    def end_choice(self, choice: int) -> None:
        """Stop this choice: no more events for it. The last one ends the request."""
        self._requester._finish(self._live, self._live.state.end_choice(choice))

    def cancel(self) -> None:
        """Stop everything: no more events."""
        self._requester._finish(self._live, self._live.state.cancel())


class Requester:
    """One per process: one reply subject, one life subject, one timer for all requests."""

    def __init__(
        self,
        bus: Bus,
        *,
        model: str,
        instance: str,
        timing: Timing | None = None,
        rng: random.Random | None = None,
        stream_interval: int = 1,
    ) -> None:
        """`instance` names this process on the bus and must be unique: `[A-Za-z0-9_-]{1,64}`.
        `stream_interval`: how ids are put together, see `Gathering`.

        `on_doubt` may be set: it is called with the id of a request that is asked for again, and with one
        that another process says it owns now (`ownership.py`). Ids in `expected` count as running here: their
        requests are about to be submitted.
        """
        self.counters: Counter[str] = Counter()
        self.heartbeat: Heartbeat | None = None
        self.instance = instance
        self.on_doubt: Callable[[str], None] = lambda request_id: None
        self.expected: set[str] = set()
        self._bus = bus
        self._model = model
        self._generate_subject = subjects.generate(model)
        self._reply = subjects.out(instance)
        self._life = subjects.life(instance)
        self._timing = timing or Timing()
        self._rng = rng or random.Random()  # noqa: S311
        self._live: dict[str, _Live] = {}
        self._heartbeat_at_s = -NEVER
        self._cancelled = Cancelled()
        self._subscriptions: list[Subscription] = []
        self._outbox = Outbox(bus, self.counters)
        self._gathering = Gathering(stream_interval, self._tell_news)
        self._timers = Timers(self._live, self._act)
        self._is_closed = False

    async def start(self) -> None:
        """Subscribe; raises `BusError`."""
        self._loop = asyncio.get_running_loop()
        self._outbox.open()
        for subject, handler in (
            (self._reply, self._on_message),
            (self._life, self._on_probe),
            (subjects.heartbeat(self._model), self._on_heartbeat),
        ):
            self._subscriptions.append(await self._bus.subscribe(subject, handler))
        self._bus.on_reconnect(self._on_reconnect)

    async def close(self) -> None:
        """Cancel what runs (its listeners get a `RequestFailed`), send what is pending, unsubscribe."""
        self._is_closed = True
        self._gathering.close()
        for live in list(self._live.values()):
            self._tell_news(live)
            self._finish(live, live.state.cancel())
            self._deliver(live, RequestFailed("shutting_down", "this server is stopping"))
        self._timers.close()
        for subscription in self._subscriptions:
            await subscription.unsubscribe()
        await self._outbox.close()

    @property
    def heartbeat_age_s(self) -> float:
        """Seconds since the newest heartbeat; infinite when none was heard."""
        return NEVER if self.heartbeat is None else self._loop.time() - self._heartbeat_at_s

    @property
    def num_live(self) -> int:
        """Requests that have not ended."""
        return len(self._live)

    def submit(self, spec: RequestSpec, on_event: Callable[[Event], None]) -> Ticket:
        """Send a request. `on_event` is called on the loop, in order, never from within this call.

        Raises `ValueError` for an id that is malformed or runs already, or a count that makes no sense.
        """
        if self._is_closed or not self._outbox.is_open:
            raise RuntimeError("the requester is not started, or closed")
        check(spec)
        if spec.request_id in self._live:
            raise ValueError(f"request {spec.request_id} runs already")
        state = RequestState(
            spec,
            model=self._model,
            reply=self._reply,
            life=self._life,
            now_s=self._loop.time(),
            timing=self._timing,
            rng=self._rng,
        )
        self._live[spec.request_id] = live = _Live(state, on_event)
        self._ask(live)
        return Ticket(self, live)

    def is_live(self, request_id: str) -> bool:
        """Whether the request runs here."""
        return request_id in self._live or request_id in self.expected

    def release(self, request_id: str) -> RequestState | None:
        """Stop owning a request that another process owns now: nothing is cancelled, and no more events come.
        What was received of it; None where it does not run here."""
        if (live := self._live.get(request_id)) is not None:
            self._tell_news(live)
        if live is None or self._live.pop(request_id, None) is None:
            return None
        live.state.has_ended = True
        return live.state

    async def generate(self, spec: RequestSpec) -> AsyncGenerator[Event, None]:
        """The request's events; the last is a `RequestFailed` or ends the last choice. Leaving it cancels."""
        events: asyncio.Queue[Event] = asyncio.Queue()
        ticket = self.submit(spec, events.put_nowait)
        num_open = spec.num_choices
        try:
            while num_open:
                event = await events.get()
                yield event
                if isinstance(event, RequestFailed):
                    return
                num_open -= isinstance(event, NewTokens) and event.finish_reason is not None
        finally:
            ticket.cancel()

    # What arrives

    def _on_message(self, msg: Msg) -> None:
        match self._decoded(msg):
            case Tokens() as message:
                self._on_tokens(message)
            case Accepted() as message:
                if (live := self._live.get(message.request_id)) is not None:
                    live.state.on_accepted(message, self._loop.time())
                    self._watch(live)
            case Rejected() as message:
                if (live := self._live.get(message.request_id)) is not None:
                    self._fail(live, live.state.on_rejected(message))
            case Failed() as message:
                if (live := self._live.get(message.request_id)) is not None:
                    self.counters["failed_attempts"] += 1
                    self._fail(live, live.state.on_failed(message, self._loop.time()))
                    self._watch(live)
            case message:
                self.counters["unexpected"] += message is not None

    def _decoded(self, msg: Msg) -> messages.AnyMessage | None:
        try:
            return messages.decode(msg.data)
        except DecodeError:
            self.counters["undecodable"] += 1
            return None

    def _on_tokens(self, tokens: Tokens) -> None:
        now_s = self._loop.time()
        for prompt in tokens.prompts:  # before the rows, whose ids come after the prompt
            if (live := self._known(prompt, now_s)) is not None:
                self._tell(live, live.state.on_prompt(prompt, tokens.epoch, now_s))
        epoch, gathering = tokens.epoch, self._gathering
        for row in tokens.rows:
            live = self._live.get(row.request_id)
            if live is not None:
                if gathering.is_on:
                    if live.state.take_next(row, epoch, now_s):
                        gathering.add(live)
                        continue
                elif live.state.take_next(row, epoch, now_s, is_told=True):
                    self._deliver(live, NewTokens(row.choice, row.index, unpack_ids(row.ids)))
                    continue
            self._take_row(row, epoch, now_s)

    def _take_row(self, row: TokenRow, epoch: int, now_s: float) -> None:
        """A row that is not simply the next ids of somebody here."""
        if (live := self._known(row, now_s)) is not None:
            self._tell_news(live)
            event = live.state.on_row(row, epoch, now_s)
            self._tell(live, () if event is None else (event,))

    def _on_probe(self, msg: Msg) -> None:
        """An executor asks whether anybody is here, or another owner of requests about one of them."""
        probe = read_probe(msg.data)
        if probe is not None and probe.is_taken_over:
            self.on_doubt(probe.request_id)
        if msg.reply:
            is_live = probe is not None and self.is_live(probe.request_id)
            self._outbox.put(Outgoing(msg.reply, b"" if probe is None else LIVE if is_live else NOT_HERE))

    def _on_heartbeat(self, msg: Msg) -> None:
        message = self._decoded(msg)
        if not isinstance(message, Heartbeat):
            self.counters["unexpected"] += message is not None
            return
        if self.heartbeat is not None and message.epoch < self.heartbeat.epoch:
            return  # a leader that does not know yet that it is none
        is_new_leader = self.heartbeat is None or message.epoch > self.heartbeat.epoch
        self.heartbeat = message
        self._heartbeat_at_s = self._loop.time()
        if is_new_leader:
            for live in list(self._live.values()):
                live.state.on_leader(message.epoch, self._heartbeat_at_s)
                self._watch(live)

    async def _on_reconnect(self) -> None:
        now_s = self._loop.time()
        for live in list(self._live.values()):
            live.state.on_reconnect(now_s)
            self._watch(live)

    # What is done

    def _ask(self, live: _Live) -> None:
        """Send the next attempt, after ending what has all its ids already."""
        self._tell_news(live)
        for event in live.state.complete():
            self._forget_if_ended(live)
            self._deliver(live, event)
        generate = live.state.ask(self._loop.time(), self.heartbeat.epoch if self.heartbeat else 0)
        if generate is None:
            return
        is_first = generate.attempt == live.state.spec.first_attempt
        self.counters["asked" if is_first else "asked_again"] += 1
        if not is_first:
            self.on_doubt(generate.request_id)
        self._outbox.put(
            Outgoing(
                self._generate_subject,
                messages.encode(generate),
                dict(live.state.spec.headers),
                lambda failure: self._cannot_send(live, failure),
            )
        )
        self._watch(live)

    def _known(self, row: TokenRow | messages.PromptRow, now_s: float) -> _Live | None:
        """Whose row it is. Where nobody here holds the request, say so, once a second at most."""
        live = self._live.get(row.request_id)
        if live is None:
            self.counters["unknown_rows"] += 1
            if self._cancelled.is_due(row.request_id, now_s):
                self._cancelled.note(row.request_id, now_s)
                self._publish_message(Cancel(request_id=row.request_id, attempt=row.attempt))
        return live

    def _tell_news(self, live: _Live, at_least: int = 1) -> None:
        """The ids that were gathered; they come before anything else."""
        for event in live.state.news(at_least):
            self._deliver(live, event)

    def _tell(self, live: _Live, events: Sequence[Event]) -> None:
        self._forget_if_ended(live)
        for event in events:
            if live.state.is_wanted(event):
                self._deliver(live, event)
        self._watch(live)

    def _finish(self, live: _Live, cancel: Cancel | None) -> None:
        """The owner stopped something: tell the scheduler."""
        self._forget_if_ended(live)
        if cancel is not None:
            if not cancel.choices:
                self._cancelled.note(cancel.request_id, self._loop.time())
            self._publish_message(cancel)

    def _fail(self, live: _Live, failure: RequestFailed | None) -> None:
        if failure is not None:
            self._tell_news(live)
            self.counters["failed"] += 1
            self._forget_if_ended(live)
            self._deliver(live, failure)

    def _deliver(self, live: _Live, event: Event) -> None:
        try:
            live.on_event(event)
        except Exception:
            self.counters["listener_errors"] += 1
            _log.exception("a request's listener failed; the request is cancelled")
            self._finish(live, live.state.cancel())

    def _forget_if_ended(self, live: _Live) -> None:
        request_id = live.state.spec.request_id
        if live.state.has_ended and self._live.get(request_id) is live:
            del self._live[request_id]

    # The timer

    def _watch(self, live: _Live) -> None:
        self._timers.watch(live, live.state.spec.request_id)

    def _act(self, live: _Live, now_s: float) -> None:
        failure = live.state.expire(now_s)
        if failure is None:
            self._ask(live)
            return
        self._publish_message(Cancel(request_id=live.state.spec.request_id, attempt=live.state.attempt))
        self._fail(live, failure)

    # Sending

    def _publish_message(self, message: Message) -> None:
        self._outbox.put(Outgoing(self._generate_subject, messages.encode(message)))

    def _cannot_send(self, live: _Live, failure: RequestFailed) -> None:
        state = live.state
        self._publish_message(Cancel(request_id=state.spec.request_id, attempt=state.attempt))
        self._fail(live, state.fail(failure))
