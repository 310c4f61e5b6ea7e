"""The executor on the bus: plans in; steps, tokens, failures and hellos out; requesters probed.

Owns no state of plans (the worker's thread does) and no tensors.
"""

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from pagebus.bus import subjects
from pagebus.bus.messages import (
    DecodeError,
    Heartbeat,
    Hello,
    Message,
    Plan,
    StepDone,
    decode,
    encode,
)
from pagebus.bus.protocol import (
    Bus,
    Msg,
    NoRespondersError,
    NotConnectedError,
    RequestTimeoutError,
    Subscription,
)
from pagebus.executor.batch import Runner
from pagebus.executor.fake import build_fake_runner
from pagebus.executor.lease import View
from pagebus.executor.liveness import Answer, Probes
from pagebus.executor.reports import REPEAT_INTERVAL_S, Outbox, Report
from pagebus.executor.step_loop import Acknowledge, Event, HelloWanted, Ready, Stopped
from pagebus.executor.worker import Worker
from pagebus.settings.structs import ExecutorSettings

_log = logging.getLogger(__name__)

HELLO_INTERVAL_S = 1.0
HELLO_SPACING_S = 0.05  # many plans after one gap ask for one snapshot, not for many
PROBE_INTERVAL_S = 0.5
PROBE_TIMEOUT_S = 0.4
DRAIN_TIMEOUT_S = 2.0
# The default of 5 ms is as long as a step: a thread that wants the interpreter back would wait for it.
SWITCH_INTERVAL_S = 1e-4

Build = Callable[[ExecutorSettings, Path], Runner]


def build(settings: ExecutorSettings, path: Path) -> Runner:
    """The model of `settings`: the fake one, or the one in directory `path`."""
    if settings.fake:
        return build_fake_runner(settings)
    from pagebus.executor.model_runner import build_runner  # loads torch: not for the fake model

    return build_runner(settings, path)


class Steps(Protocol):
    """Runs a model's steps. Events go to the callback that it was made with, in order and on the loop."""

    @property
    def view(self) -> View:
        """The state after the last command."""

    def start(self) -> None:
        """Build the model; `Ready` follows."""

    def take_plan(self, plan: Plan) -> None:
        """Hand over a plan; it is applied after the running step."""

    def hear(self, epoch: int) -> None:
        """A leader of this epoch was heard."""

    def end_requesters(self, lives: frozenset[str]) -> None:
        """Nobody listens on these life subjects any more."""

    def stop(self) -> None:
        """Finish the running step, then end; `Stopped` follows."""


class MakeSteps(Protocol):
    """`Worker`, or what stands for it."""

    def __call__(
        self,
        executor: str,
        build: Callable[[], Runner],
        on_event: Callable[[Event], None],
        *,
        loop: asyncio.AbstractEventLoop,
    ) -> Steps:
        """Make it; nothing runs before `start`."""


async def run(
    settings: ExecutorSettings,
    bus: Bus,
    path: Path,
    name: str,
    stop: asyncio.Event,
    *,
    build: Build = build,
    clock: Callable[[], float] = time.monotonic,
    make_steps: MakeSteps = Worker,
) -> None:
    """Serve until `stop`; then the running step is finished and sent. Raises what `build` raises.

    `make_steps` gives what runs the steps: a thread of its own, or, in a simulation, timers.
    """
    switch_interval_s = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        await _Service(settings, bus, path, name, build, clock, make_steps).serve(stop)
    finally:
        sys.setswitchinterval(switch_interval_s)


async def _until(event: asyncio.Event) -> None:
    await event.wait()


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():  # it may have been cancelled together with `serve`
        future.set_result(None)


class _Service:
    def __init__(
        self,
        settings: ExecutorSettings,
        bus: Bus,
        path: Path,
        name: str,
        build: Build,
        clock: Callable[[], float],
        make_steps: MakeSteps,
    ) -> None:
        self._settings = settings
        self._bus = bus
        self._name = subjects.part(name)
        self._model = settings.model_name
        self._done_subject = subjects.step_done(self._model)
        self._hello_subject = subjects.hello(self._model)
        self._clock = clock
        loop = asyncio.get_running_loop()
        self._worker = make_steps(name, lambda: build(settings, path), self._on_event, loop=loop)
        self._loaded: asyncio.Future[None] = loop.create_future()
        self._stopped: asyncio.Future[None] = loop.create_future()
        self._ready: Ready | None = None
        self._worker_error: BaseException | None = None
        self._outbox = Outbox()
        self._outgoing: asyncio.Queue[tuple[str, Message]] = asyncio.Queue()
        self._hello_wanted = asyncio.Event()
        self._last_done: StepDone | None = None
        self._num_unsent = 0

    async def serve(self, stop: asyncio.Event) -> None:
        """Load, subscribe, serve, drain: in this order."""
        self._worker.start()
        subscriptions: list[Subscription] = []
        stopping = asyncio.create_task(_until(stop))
        try:
            await asyncio.wait({stopping, self._loaded, self._stopped}, return_when=asyncio.FIRST_COMPLETED)
            ready = self._ready
            if ready is None:
                self._raise_worker_error()
                return
            subscriptions.append(await self._bus.subscribe(subjects.plan(self._name), self._on_plan))
            heartbeats = subjects.heartbeat(self._model)
            subscriptions.append(await self._bus.subscribe(heartbeats, self._on_heartbeat))
            self._bus.on_reconnect(self._on_reconnect)
            self._hello_wanted.set()
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(work)
                    for work in (self._publish(), self._greet(ready), self._repeat(), self._probe())
                ]
                await asyncio.wait({stopping, self._stopped}, return_when=asyncio.FIRST_COMPLETED)
                await self._drain()
                for task in tasks:
                    task.cancel()
        finally:
            stopping.cancel()
            self._worker.stop()
            for subscription in subscriptions:
                await subscription.unsubscribe()
        self._raise_worker_error()

    async def _drain(self) -> None:
        self._worker.stop()
        await self._stopped
        try:
            await asyncio.wait_for(self._outgoing.join(), DRAIN_TIMEOUT_S)
        except TimeoutError:
            _log.warning("%d messages were not sent before the end", self._outgoing.qsize())

    def _raise_worker_error(self) -> None:
        error = self._worker_error
        if isinstance(error, Exception):
            raise error
        if error is not None:  # SystemExit and the like, raised in a thread, must not look like a normal end
            raise RuntimeError(f"the executor's thread ended: {type(error).__name__}: {error}") from error

    # -- from the worker, on the loop --------------------------------------------------------------------

    def _on_event(self, event: Event) -> None:
        match event:
            case Report():
                for reply, tokens in event.tokens.items():
                    self._outgoing.put_nowait((reply, tokens))
                for reply, failed in event.failures:
                    self._outgoing.put_nowait((reply, failed))
                self._outgoing.put_nowait((self._done_subject, event.done))
                self._outbox.add(event.done, self._clock())
                self._last_done = event.done
            case Acknowledge():
                self._outgoing.put_nowait((self._done_subject, event.done))
            case HelloWanted():
                self._hello_wanted.set()
            case Ready():
                self._ready = event
                _resolve(self._loaded)
            case Stopped():
                self._worker_error = event.error
                _resolve(self._stopped)

    # -- from the bus ------------------------------------------------------------------------------------

    def _on_plan(self, msg: Msg) -> None:
        if not msg.data:
            return  # a probe: that it could be delivered is the answer
        try:
            plan = decode(msg.data)
        except DecodeError as error:
            _log.warning("dropped what came as a plan: %s", error)
            return
        if isinstance(plan, Plan) and plan.executor == self._name:
            self._outbox.acknowledge(plan.epoch, plan.num_steps_acknowledged)
            self._worker.take_plan(plan)

    def _on_heartbeat(self, msg: Msg) -> None:
        try:
            heartbeat = decode(msg.data)
        except DecodeError as error:
            _log.warning("dropped what came as a heartbeat: %s", error)
            return
        is_ours = isinstance(heartbeat, Heartbeat) and heartbeat.model == self._model
        if isinstance(heartbeat, Heartbeat) and is_ours and heartbeat.epoch > self._worker.view.epoch:
            self._worker.hear(heartbeat.epoch)

    async def _on_reconnect(self) -> None:
        self._hello_wanted.set()

    # -- to the bus --------------------------------------------------------------------------------------

    async def _publish(self) -> None:
        """Send in order. What cannot be sent is dropped: `StepDone`s are repeated, requesters see a gap."""
        while True:
            subject, message = await self._outgoing.get()
            try:
                await self._send(subject, message)
            finally:
                self._outgoing.task_done()

    async def _send(self, subject: str, message: Message) -> None:
        try:
            await self._bus.publish(subject, encode(message))
        except NotConnectedError:
            self._num_unsent += 1
        except Exception:  # one message that cannot be sent must not end the service
            _log.exception("could not send a %s to %s", type(message).__name__, subject)
        else:
            if self._num_unsent:
                _log.warning("%d messages were not sent while the bus was away", self._num_unsent)
                self._num_unsent = 0

    async def _greet(self, ready: Ready) -> None:
        """Say `Hello` each second, and at once when asked to."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._hello_wanted.wait(), HELLO_INTERVAL_S)
            self._hello_wanted.clear()
            await self._send(self._hello_subject, self._hello(ready))
            await asyncio.sleep(HELLO_SPACING_S)

    def _hello(self, ready: Ready) -> Hello:
        view, done = self._worker.view, self._last_done
        is_current = done is not None and done.epoch == view.epoch and view.plan > 0
        return Hello(
            executor=self._name,
            model=self._model,
            epoch=view.epoch,
            plan=view.plan,
            num_steps=max(view.num_steps, done.num_steps) if done and is_current else view.num_steps,
            handles=view.handles,
            pool=ready.pool,
            max_model_len=ready.max_model_len,
            max_num_seqs=self._settings.max_num_seqs,
            has_gap=view.has_gap,
        )

    async def _repeat(self) -> None:
        while True:
            await asyncio.sleep(REPEAT_INTERVAL_S / 4)
            for done in self._outbox.due(self._clock()):
                await self._send(self._done_subject, done)

    async def _probe(self) -> None:
        """Twice a second one empty request to every requester that has rows here."""
        probes = Probes()
        while True:
            began_s = self._clock()
            lives = sorted(self._worker.view.lives)
            probes.keep_only(set(lives))
            answers = await asyncio.gather(*(self._ask(life) for life in lives))
            gone = [
                life
                for life, answer in zip(lives, answers, strict=True)
                if probes.note(life, answer, self._clock())
            ]
            if gone:
                _log.info("%d requesters are gone: their rows end", len(gone))
                self._worker.end_requesters(frozenset(gone))
            await asyncio.sleep(max(0.0, PROBE_INTERVAL_S - (self._clock() - began_s)))

    async def _ask(self, life: str) -> Answer:
        try:
            await self._bus.request(life, b"", timeout_s=PROBE_TIMEOUT_S)
        except NoRespondersError:
            return Answer.NO_RESPONDERS
        except RequestTimeoutError:
            return Answer.SILENCE
        except NotConnectedError:
            return Answer.UNKNOWN
        except Exception:  # a subject that no bus takes: it never answers
            _log.exception("could not probe %s", life)
            return Answer.SILENCE
        return Answer.ALIVE
