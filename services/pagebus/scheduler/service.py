"""The scheduler as a service: queues what arrives, drains it into the core, sends what the core wants sent.

One turn of the loop: receive all, plan once, send. It decides nothing itself.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from pagebus.bus import subjects
from pagebus.bus.messages import (
    AnyMessage,
    Cancel,
    DecodeError,
    Generate,
    Heartbeat,
    Hello,
    StepDone,
    decode,
    encode,
)
from pagebus.bus.protocol import Bus, BusError, Msg, NoRespondersError, Subscription
from pagebus.scheduler.actions import Action, Ended, Probe, SendPlan, SendReply
from pagebus.scheduler.book import CoreConfig
from pagebus.scheduler.core import SchedulerCore
from pagebus.scheduler.leadership import Leadership
from pagebus.settings.structs import SchedulerSettings
from pagebus.telemetry.tracing import RequestTimings

log = logging.getLogger(__name__)
_Result = TypeVar("_Result")

HEARTBEAT_INTERVAL_S = 0.5
TICK_INTERVAL_S = 0.05
PAUSE_S = 0.5
PROBE_TIMEOUT_S = 1.0
MAX_INBOX = 100_000
COUNTERS_INTERVAL_S = 30.0


def read_weights(texts: Iterable[str]) -> Mapping[str, float]:
    """Tenants' weights from NAME=WEIGHT. Raises `ValueError` with a sentence for a person."""
    weights = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not name or not 0 < weight < math.inf:
            raise ValueError(f"--tenant-weight {text!r}: NAME=WEIGHT with a weight above 0 is wanted")
        weights[name] = weight
    return weights


async def run(
    settings: SchedulerSettings,
    bus: Bus,
    name: str,
    stop: asyncio.Event,
    on_ended: Callable[[RequestTimings], None] | None = None,
    *,
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """Schedule `settings.model_name` on `bus` as the instance `name` until `stop` is set.

    `on_ended` is told of every attempt that ended, on the loop; `on_ready` is called once this instance leads
    or stands by. Raises `BusError` where the subscriptions cannot be made.
    """
    await SchedulerService(settings, bus, name, on_ended).run(stop, on_ready)


class SchedulerService:
    """One scheduler instance: leads, or stands by and only listens for who leads."""

    def __init__(
        self,
        settings: SchedulerSettings,
        bus: Bus,
        name: str,
        on_ended: Callable[[RequestTimings], None] | None = None,
    ) -> None:
        self._bus = bus
        self._name = name
        self._model = settings.model_name
        self._on_ended = on_ended
        self._core = SchedulerCore(
            CoreConfig(
                model=self._model,
                horizon=settings.horizon,
                max_num_seqs=settings.max_num_seqs,
                max_num_batched_tokens=settings.max_num_batched_tokens,
                max_num_queued_reqs=settings.max_num_queued_reqs,
                max_model_len=settings.max_model_len,
                enable_prefix_caching=settings.enable_prefix_caching,
                tenant_weights=read_weights(settings.tenant_weight),
            )
        )
        self._leadership = Leadership(bus, self._model, name)
        self._inbox: deque[Msg] = deque()
        self._has_mail = asyncio.Event()
        self._probes: set[asyncio.Task[None]] = set()
        self._counters: Counter[str] = Counter()
        self._counted: Counter[str] = Counter()
        self._has_reconnected = False
        self._turn_s = self._tick_s = self._heartbeat_s = self._counters_s = time.monotonic()

    @property
    def core(self) -> SchedulerCore:
        """The state of this term, to be looked at only."""
        return self._core

    @property
    def counters(self) -> Counter[str]:
        """What happened that should seldom happen."""
        return self._counters + self._core.counters

    async def run(self, stop: asyncio.Event, on_ready: Callable[[], None] = lambda: None) -> None:
        """Start up, the main loop, shut down."""
        subscriptions: list[Subscription] = []
        tasks = [asyncio.create_task(self._leadership.run()), asyncio.create_task(self._wake_at(stop))]
        self._bus.on_reconnect(self._note_reconnect)
        try:
            for subject in (subjects.generate, subjects.hello, subjects.step_done, subjects.heartbeat):
                subscriptions.append(await self._bus.subscribe(subject(self._model), self._receive))
            on_ready()
            self._turn_s = time.monotonic()
            while not stop.is_set():
                await self._wait()
                await self._turn()
            await self._leave()
        finally:
            self._leadership.close()
            for task in (*tasks, *self._probes):
                task.cancel()
            await asyncio.gather(*tasks, *self._probes, return_exceptions=True)
            for subscription in subscriptions:
                with contextlib.suppress(BusError):
                    await subscription.unsubscribe()

    async def _note_reconnect(self) -> None:
        self._has_reconnected = True  # another may lead by now
        self._has_mail.set()

    async def _wake_at(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._has_mail.set()

    def _receive(self, message: Msg) -> None:
        if len(self._inbox) >= MAX_INBOX:
            self._counters["dropped_inbox_full"] += 1
            return
        self._inbox.append(message)
        self._has_mail.set()

    async def _wait(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TICK_INTERVAL_S):
                await self._has_mail.wait()
        self._has_mail.clear()

    async def _turn(self) -> None:
        """Receive all that is queued, plan once, send."""
        now_s = time.monotonic()
        if now_s - self._turn_s > PAUSE_S or self._has_reconnected:
            self._counters["paused"] += 1
            self._has_reconnected = False
            await self._leadership.check()
            self._core.on_reconnect(time.monotonic())
        self._follow_term()
        self._drain()
        self._follow_term()
        await self._send(self._run(self._plan) or [])
        self._run(self._core.settle)
        await self._beat()
        self._report_counters()
        self._turn_s = time.monotonic()

    async def _leave(self) -> None:
        """The last turn was the term's last: say so, so that a standby does not wait for our silence."""
        last = self._heartbeat(is_leaving=True) if 0 < self._core.epoch == self._leadership.epoch else None
        self._core.step_down()
        await self._leadership.leave()
        if last is not None:
            await self._publish(subjects.heartbeat(self._model), encode(last))

    def _follow_term(self) -> None:
        epoch = self._leadership.epoch
        if epoch == self._core.epoch:
            return
        if epoch:
            self._core.become_leader(epoch, time.monotonic())
            self._heartbeat_s = float("-inf")  # executors and requesters hear of it at once
        else:
            self._core.step_down()

    # -- receive ---------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        while self._inbox:
            mail = self._inbox.popleft()
            try:
                message = decode(mail.data)
            except DecodeError:
                self._counters["undecodable"] += 1
                continue
            try:
                self._handle(message, mail)
            except Exception:
                log.exception("a %s could not be handled", type(message).__name__)
                self._counters["handling_errors"] += 1
                self._core.on_fault(message, time.monotonic())

    def _handle(self, message: AnyMessage, mail: Msg) -> None:
        now_s = time.monotonic()
        match message:
            case StepDone():
                self._leadership.hear_epoch(message.epoch)
                self._core.on_step_done(message, now_s)
            case Generate():
                self._core.on_generate(message, now_s, mail.headers)
            case Cancel():
                self._core.on_cancel(message, now_s)
            case Hello():
                self._leadership.hear_epoch(message.epoch)
                self._follow_term()
                self._core.on_hello(message, now_s)
            case Heartbeat():
                self._leadership.hear_heartbeat(
                    message.scheduler, message.epoch, is_leaving=message.is_leaving
                )
                self._follow_term()
            case _:
                self._counters["unexpected"] += 1

    # -- plan ------------------------------------------------------------------------------------------------

    def _plan(self) -> list[Action]:
        now_s = time.monotonic()
        if now_s - self._tick_s >= TICK_INTERVAL_S:
            self._tick_s = now_s
            self._core.on_tick(now_s)
        return self._core.plan(now_s)

    def _run(self, part: Callable[[], _Result]) -> _Result | None:
        try:
            return part()
        except Exception:
            # Nothing is known for sure any more: begin a new term, in which requesters ask again.
            log.exception("planning failed")
            self._counters["planning_errors"] += 1
            self._leadership.step_down("planning failed")
            self._follow_term()
            return None

    # -- send ------------------------------------------------------------------------------------------------

    async def _send(self, actions: list[Action]) -> None:
        """Plans first: executors wait for them, requesters are only told."""
        for action in actions:
            if isinstance(action, SendPlan):
                await self._publish(subjects.plan(action.executor), encode(action.plan))
        for action in actions:
            match action:
                case SendReply(subject, message):
                    await self._publish(subject, encode(message))
                case Probe(executor):
                    task = asyncio.create_task(self._probe(executor))
                    self._probes.add(task)
                    task.add_done_callback(self._probes.discard)
                case Ended():
                    self._tell_ended(action)

    async def _probe(self, executor: str) -> None:
        """An empty plan, which an executor drops: whether anybody is there to do that."""
        try:
            await self._bus.request(subjects.plan(executor), b"", timeout_s=PROBE_TIMEOUT_S)
        except NoRespondersError:
            self._core.on_no_responders(executor, time.monotonic())
            self._has_mail.set()
        except BusError:
            pass  # nobody answers a probe: silence says nothing

    async def _publish(self, subject: str, data: bytes) -> None:
        # What is lost here comes again: plans after 0.2 s, requests by their requesters.
        try:
            await self._bus.publish(subject, data)
        except BusError as error:
            self._counters[f"unsent_{type(error).__name__}"] += 1

    def _tell_ended(self, ended: Ended) -> None:
        if self._on_ended is None:
            return
        offset_s = time.time() - time.monotonic()

        def wall_ns(at_s: float | None) -> int | None:
            return None if at_s is None else int((at_s + offset_s) * 1e9)

        timings = RequestTimings(
            request_id=ended.request_id,
            attempt=ended.attempt,
            headers=ended.headers,
            destination=subjects.generate(self._model),
            arrived_ns=int((ended.arrival_s + offset_s) * 1e9),
            scheduled_ns=wall_ns(ended.first_scheduled_s),
            first_token_ns=wall_ns(ended.first_token_s),
            ended_ns=int((ended.end_s + offset_s) * 1e9),
            num_prompt_tokens=ended.num_prompt_tokens,
            num_generated_tokens=ended.num_generated_tokens,
            num_preemptions=ended.num_preemptions,
            error=ended.code or None,
        )
        try:
            self._on_ended(timings)
        except Exception:
            self._counters["telemetry_errors"] += 1
            log.exception("telemetry failed")

    async def _beat(self) -> None:
        now_s = time.monotonic()
        if not self._core.epoch or now_s - self._heartbeat_s < HEARTBEAT_INTERVAL_S:
            return
        self._heartbeat_s = now_s
        await self._publish(subjects.heartbeat(self._model), encode(self._heartbeat()))

    def _heartbeat(self, *, is_leaving: bool = False) -> Heartbeat:
        return Heartbeat(
            scheduler=self._name,
            model=self._model,
            epoch=self._core.epoch,
            is_leaving=is_leaving,
            **self._core.figures._asdict(),
        )

    def _report_counters(self) -> None:
        now_s = time.monotonic()
        if now_s - self._counters_s < COUNTERS_INTERVAL_S:
            return
        self._counters_s = now_s
        counters = self._counters + self._core.counters
        new = counters - self._counted
        if new:
            log.warning("counted since the last line: %s", dict(new))
        self._counted = counters
