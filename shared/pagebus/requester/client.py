"""The thin client of a requester process: one reply subject, one life subject, one timer for all requests.

It moves messages between the bus and the state machines of `state.py`, tells callbacks, and decides nothing.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncGenerator, Callable, Mapping

from pagebus.bus import subjects
from pagebus.bus.messages import (
    Accepted,
    Cancel,
    DecodeError,
    Failed,
    Heartbeat,
    Rejected,
    Tokens,
    decode,
    encode,
)
from pagebus.bus.protocol import Bus, BusError, Msg, PayloadTooLargeError, Subscription
from pagebus.requester.events import Event, NewTokens, RequestFailed, RequestSpec
from pagebus.requester.state import RequestState

_log = logging.getLogger(__name__)

OnEvent = Callable[[Event], None]

_TICK_S = 0.02
_MAX_FORGOTTEN = 10_000
_CANCEL_INTERVAL_S = 1.0
_RECONNECT_JITTER_S = 0.2


class Ticket:
    """A submitted request in its owner's hands."""

    def __init__(self, requester: "Requester", state: RequestState, on_event: OnEvent) -> None:
        self._requester = requester
        self.state = state
        self.on_event = on_event

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self.state.spec.request_id

    def end_choice(self, choice: int) -> None:
        """Stop one choice (a stop string was found); no more events for it."""
        if self.state.end_choice(choice):
            self._requester._ended_by_owner(self, (choice,))

    def cancel(self) -> None:
        """Stop everything; no more events."""
        if not self.state.is_over:
            self.state.cancel()
            self._requester._ended_by_owner(self, ())


class Requester:
    """Owns the requests of this process for one model."""

    def __init__(
        self,
        bus: Bus,
        model: str,
        instance: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        """`instance` must be unique on the bus; it names the reply and the life subject."""
        self._bus = bus
        self._model = model
        self._clock = clock
        self._rng = rng or random.Random()  # noqa: S311 (spreads load, guards nothing)
        self._out = subjects.out(instance)
        self._life = subjects.life(instance)
        self._generate = subjects.generate(model)
        self._live: dict[str, Ticket] = {}
        self._forgotten: OrderedDict[str, float] = OrderedDict()  # ended ids -> when last cancelled
        self._unsent: deque[tuple[str, bytes, Mapping[str, str] | None, Ticket | None]] = deque()
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._subscriptions: list[Subscription] = []
        self._heartbeat_s = float("-inf")
        self._heartbeat: Heartbeat | None = None
        self.counters: Counter[str] = Counter()

    # -- life ------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Subscribe, and start to send and to keep time."""
        self._subscriptions = [
            await self._bus.subscribe(self._out, self._on_out),
            await self._bus.subscribe(self._life, self._on_probe),
            await self._bus.subscribe(subjects.heartbeat(self._model), self._on_heartbeat),
        ]
        self._bus.on_reconnect(self._on_reconnect)
        self._tasks = [asyncio.create_task(self._send_all()), asyncio.create_task(self._keep_time())]

    async def close(self) -> None:
        """Cancel what is live and stop."""
        for ticket in list(self._live.values()):
            ticket.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                while self._unsent:  # noqa: ASYNC110 (the sender empties it; a second at most)
                    await asyncio.sleep(0.005)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for subscription in self._subscriptions:
            with contextlib.suppress(BusError):
                await subscription.unsubscribe()

    @property
    def heartbeat(self) -> Heartbeat | None:
        """The newest leader's newest heartbeat."""
        return self._heartbeat

    @property
    def heartbeat_age_s(self) -> float:
        """Seconds since that came; infinite without one."""
        return self._clock() - self._heartbeat_s

    @property
    def num_live(self) -> int:
        """Requests that have not ended."""
        return len(self._live)

    # -- requests --------------------------------------------------------------------------------------------

    def submit(self, spec: RequestSpec, on_event: OnEvent) -> Ticket:
        """Send a request. `on_event` is called on the loop, in order; it must neither block nor raise."""
        subjects.part(spec.request_id)
        if spec.request_id in self._live:
            raise ValueError(f"request {spec.request_id} is live already")
        ticket = Ticket(self, RequestState(spec, self._clock(), self._rng), on_event)
        self._live[spec.request_id] = ticket
        self._ask(ticket)
        return ticket

    async def generate(self, spec: RequestSpec) -> AsyncGenerator[Event, None]:
        """The events of a request until it ends; leaving the iteration cancels it."""
        events: asyncio.Queue[Event] = asyncio.Queue()
        ticket = self.submit(spec, events.put_nowait)
        num_open = spec.num_choices
        try:
            while num_open:
                event = await events.get()
                if isinstance(event, RequestFailed):
                    num_open = 0
                elif event.finish_reason is not None:
                    num_open -= 1
                yield event
        finally:
            ticket.cancel()

    def _ask(self, ticket: Ticket) -> None:
        epoch = self._heartbeat.epoch if self._heartbeat else 0
        message = ticket.state.ask(
            model=self._model, reply=self._out, life=self._life, epoch=epoch, now_s=self._clock()
        )
        self.counters["asked"] += 1
        self.counters["asked_again"] += message.attempt > 1
        self._put(self._generate, encode(message), ticket.state.spec.headers or None, ticket)

    def _ended_by_owner(self, ticket: Ticket, choices: tuple[int, ...]) -> None:
        if ticket.state.is_over:
            self._forget(ticket)
            choices = ()
        self._cancel(ticket.request_id, ticket.state.attempt, choices)

    def _cancel(self, request_id: str, attempt: int, choices: tuple[int, ...] = ()) -> None:
        message = Cancel(request_id=request_id, attempt=attempt, choices=choices)
        self._put(self._generate, encode(message))

    def _forget(self, ticket: Ticket) -> None:
        self._live.pop(ticket.request_id, None)
        self._forgotten[ticket.request_id] = self._clock()
        if len(self._forgotten) > _MAX_FORGOTTEN:
            self._forgotten.popitem(last=False)

    def _tell(self, ticket: Ticket, event: Event | None) -> None:
        """Tell the owner; what its callback raises ends this request alone."""
        if ticket.state.is_over:
            self._forget(ticket)
        if event is None:
            return
        try:
            ticket.on_event(event)
        except Exception:
            _log.exception("the callback of request %s failed", ticket.request_id)
            self.counters["callback_failed"] += 1
            ticket.cancel()

    # -- messages --------------------------------------------------------------------------------------------

    def _on_out(self, msg: Msg) -> None:
        try:
            message = decode(msg.data)
        except DecodeError:
            self.counters["undecodable"] += 1
            return
        if isinstance(message, Tokens):
            self._on_tokens(message)
            return
        if not isinstance(message, Accepted | Rejected | Failed):
            self.counters["unexpected"] += 1
            return
        ticket = self._live.get(message.request_id)
        if ticket is None:
            if isinstance(message, Accepted):
                self._on_unknown(message.request_id, message.attempt)
            return
        match message:
            case Accepted():
                ticket.state.on_accepted(message, self._clock())
            case Rejected():
                self._tell(ticket, ticket.state.on_rejected(message))
            case Failed():
                self._tell(ticket, ticket.state.on_failed(message, self._clock()))

    def _on_tokens(self, message: Tokens) -> None:
        now_s = self._clock()
        for row in message.rows:
            ticket = self._live.get(row.request_id)
            if ticket is None:
                if row.finish_reason is None:
                    self._on_unknown(row.request_id, row.attempt)
                continue
            event = ticket.state.on_row(row, message.epoch, now_s)
            if event is not None:
                self._tell(ticket, event)

    def _on_unknown(self, request_id: str, attempt: int) -> None:
        """Somebody works for a request that is not ours (any more): stop that, once a second at most."""
        now_s = self._clock()
        if now_s - self._forgotten.get(request_id, float("-inf")) >= _CANCEL_INTERVAL_S:
            self._forgotten[request_id] = now_s
            self.counters["cancelled_unknown"] += 1
            self._cancel(request_id, attempt)

    def _on_probe(self, msg: Msg) -> None:
        if msg.reply:
            self._put(msg.reply, b"")

    def _on_heartbeat(self, msg: Msg) -> None:
        try:
            beat = decode(msg.data)
        except DecodeError:
            self.counters["undecodable"] += 1
            return
        if not isinstance(beat, Heartbeat) or (self._heartbeat and beat.epoch < self._heartbeat.epoch):
            return
        is_new_term = self._heartbeat is None or beat.epoch > self._heartbeat.epoch
        self._heartbeat, self._heartbeat_s = beat, self._clock()
        if is_new_term:
            for ticket in self._live.values():
                ticket.state.on_epoch(beat.epoch, self._heartbeat_s)

    async def _on_reconnect(self) -> None:
        """Messages may have been lost meanwhile."""
        for ticket in self._live.values():
            ticket.state.ask_soon(self._clock(), _RECONNECT_JITTER_S)

    # -- tasks -----------------------------------------------------------------------------------------------

    def _put(
        self,
        subject: str,
        data: bytes,
        headers: Mapping[str, str] | None = None,
        ticket: Ticket | None = None,
    ) -> None:
        self._unsent.append((subject, data, headers, ticket))
        self._wake.set()

    async def _send_all(self) -> None:
        """One sender keeps a request's messages in order."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._unsent:
                subject, data, headers, ticket = self._unsent[0]
                try:
                    await self._bus.publish(subject, data, headers=headers)
                except PayloadTooLargeError as error:
                    self._on_too_large(ticket, error)
                except (BusError, ValueError):
                    self.counters["unsent"] += 1
                    if ticket is not None and not ticket.state.is_over:
                        ticket.state.on_unsent(self._clock())
                self._unsent.popleft()

    def _on_too_large(self, ticket: Ticket | None, error: PayloadTooLargeError) -> None:
        if ticket is not None and not ticket.state.is_over:
            ticket.state.cancel()
            self._tell(ticket, RequestFailed("prompt_too_large", str(error), is_client_fault=True))

    async def _keep_time(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            self.tick()

    def tick(self) -> None:
        """Do what is due by time; the timer calls it."""
        now_s = self._clock()
        for ticket in [ticket for ticket in self._live.values() if ticket.state.is_due(now_s)]:
            failure = ticket.state.expire(now_s)
            if failure is not None:
                self._cancel(ticket.request_id, ticket.state.attempt)
                self._tell(ticket, failure)
            else:
                self._ask(ticket)


__all__ = ["Event", "NewTokens", "RequestFailed", "RequestSpec", "Requester", "Ticket"]
