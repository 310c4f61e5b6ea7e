"""The executor on the bus: plans in; steps, tokens, failures and hellos out; requesters probed.

Owns no state of plans (the worker's thread does) and no tensors.
"""

import asyncio
import contextlib
import gc
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pagebus.bus import subjects
from pagebus.bus.messages import (
    DecodeError,
    ExecutorPhase,
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
from pagebus.executor.building import Build, build, until_outgrown
from pagebus.executor.endings import Endings
from pagebus.executor.liveness import Answer, Probes
from pagebus.executor.reports import REPEAT_INTERVAL_S, Outbox, Report
from pagebus.executor.step_loop import Acknowledge, Event, HelloWanted, Ready, Stopped
from pagebus.executor.steps import MakeSteps
from pagebus.executor.watchdog import INTERVAL_S, Watchdog, end_process
from pagebus.executor.worker import Worker
from pagebus.settings.structs import ExecutorSettings

_log = logging.getLogger(__name__)

HELLO_INTERVAL_S = 1.0
HELLO_SPACING_S = 0.05  # many plans after one gap ask for one snapshot, not for many
PROBE_INTERVAL_S = 0.5
PROBE_TIMEOUT_S = 0.4
LAST_STEP_S = 2.0
"""How long the end waits for a step under way, and then for what is not sent."""
DRAIN_POLL_S = 0.02
# The default of 5 ms is as long as a step: a thread that wants the interpreter back would wait for it.
SWITCH_INTERVAL_S = 1e-4


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
    on_ready: Callable[[], None] = lambda: None,
    on_hang: Callable[[], None] = end_process,
) -> None:
    """Serve until `stop`, then drain: rows end, or are handed over, within `settings.drain_timeout_s`.

    Raises what `build` raises, and `BrokenModelError`. `make_steps` gives what runs the steps: a thread of
    its own, or, in a simulation, timers. `on_ready` is called when a scheduler has taken it in, `on_hang`
    where a step makes no progress for `settings.watchdog_s`.
    """
    switch_interval_s = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        is_outgrown = True
        while is_outgrown:  # once more, as a new executor, where a model can have better kernels now
            service = _Service(settings, bus, path, name, build, clock, make_steps)
            service.on_ready, service.on_hang = on_ready, on_hang
            is_outgrown = await service.serve(stop)
            del service
            gc.collect()  # the model's memory
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
        self._endings = Endings()
        self._outgoing: asyncio.Queue[tuple[str, Message]] = asyncio.Queue()
        self._hello_wanted = asyncio.Event()
        self._last_done: StepDone | None = None
        self._num_unsent = self._num_waiting = 0
        self._is_draining = self._is_known = False
        self.on_ready: Callable[[], None] = lambda: None
        self.on_hang: Callable[[], None] = end_process

    async def serve(self, stop: asyncio.Event) -> bool:
        """Load, subscribe, serve, drain: in this order. True where that is to be done once more."""
        self._worker.start()
        subscriptions: list[Subscription] = []
        stopping = asyncio.create_task(_until(stop))
        try:
            await self._load(stopping)
            ready = self._ready
            if ready is None:
                self._raise_worker_error()
                return False
            subscriptions.append(await self._bus.subscribe(subjects.plan(self._name), self._on_plan))
            heartbeats = subjects.heartbeat(self._model)
            subscriptions.append(await self._bus.subscribe(heartbeats, self._on_heartbeat))
            self._bus.on_reconnect(self._on_reconnect)
            self._hello_wanted.set()
            works = (self._publish(), self._greet(ready), self._repeat(), self._probe(), self._watch())
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(work) for work in works]
                outgrown = group.create_task(until_outgrown(lambda: self._worker.view.num_live))
                ends = {stopping, self._stopped, outgrown}
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                is_outgrown = outgrown.done()
                await self._drain()
                for task in (*tasks, outgrown):
                    task.cancel()
            if self._worker_error is None:  # else it died, perhaps of what it ran: it must look like that
                await self._send(self._hello_subject, self._hello(ready, "left"))
        finally:
            stopping.cancel()
            self._worker.stop()
            for subscription in subscriptions:
                await subscription.unsubscribe()
        self._raise_worker_error()
        return is_outgrown and not stop.is_set()

    async def _load(self, stopping: asyncio.Task[None]) -> None:
        """Say each second that the model loads, until it is there, or never will be."""
        ends = {stopping, self._loaded, self._stopped}
        while not any(end.done() for end in ends):
            await self._send(self._hello_subject, self._hello(None, "loading"))
            await asyncio.wait(ends, timeout=HELLO_INTERVAL_S, return_when=asyncio.FIRST_COMPLETED)

    async def _drain(self) -> None:
        """Rows end or leave; what is left after the grace period is told to go on elsewhere; then the end."""
        self._is_draining = True
        self._hello_wanted.set()
        await self._until_empty(self._settings.drain_timeout_s)
        if self._worker.view.num_live:
            self._worker.hand_over()
            await self._until_empty(LAST_STEP_S)
        self._worker.stop()
        await asyncio.wait({self._stopped}, timeout=LAST_STEP_S)
        try:
            await asyncio.wait_for(self._outgoing.join(), LAST_STEP_S)
        except TimeoutError:
            _log.warning("%d messages were not sent before the end", self._outgoing.qsize())
        await self._wait_for(lambda: not len(self._outbox), 2 * REPEAT_INTERVAL_S)

    async def _until_empty(self, timeout_s: float) -> None:
        await self._wait_for(lambda: self._stopped.done() or not self._worker.view.num_live, timeout_s)

    async def _wait_for(self, condition: Callable[[], bool], timeout_s: float) -> None:
        end_s = self._clock() + timeout_s
        while not condition() and self._clock() < end_s:  # noqa: ASYNC110 - a thread's state
            await asyncio.sleep(DRAIN_POLL_S)

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
                    self._tell(reply, tokens)
                for reply, failed in event.failures:
                    self._tell(reply, failed)
                self._tell(self._done_subject, event.done)
                self._outbox.add(event.done, self._clock())
                self._last_done = event.done
                self._note_known()
            case Acknowledge():
                self._tell(self._done_subject, event.done)
                self._note_known()
            case HelloWanted():
                self._hello_wanted.set()
            case Ready():
                self._ready = event
                _resolve(self._loaded)
            case Stopped():
                self._worker_error = event.error
                _resolve(self._stopped)

    def _note_known(self) -> None:
        """A plan was taken: a scheduler counts this executor."""
        if not self._is_known:
            self._is_known = True
            self.on_ready()

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
        if self._stopped.done():
            return  # another one took this one's place
        self._hello_wanted.set()
        for subject, message in self._endings.kept:
            await self._send(subject, message)

    # -- to the bus --------------------------------------------------------------------------------------

    def _tell(self, subject: str, message: Message) -> None:
        """Send now; where something waits already, or the bus is far behind, after all that was told."""
        if self._num_waiting or not self._send_now(subject, message):
            self._num_waiting += 1
            self._outgoing.put_nowait((subject, message))

    def _send_now(self, subject: str, message: Message) -> bool:
        try:
            if not self._bus.publish_now(subject, encode(message)):
                return False
        except Exception as error:
            self._note_failure(subject, message, error)
        self._endings.note(subject, message, self._clock())
        return True

    async def _publish(self) -> None:
        """Send in order. What cannot be sent is dropped: `StepDone`s are repeated, requesters see a gap."""
        while True:
            subject, message = await self._outgoing.get()
            self._endings.note(subject, message, self._clock())
            try:
                await self._send(subject, message)
            finally:
                self._num_waiting -= 1
                self._outgoing.task_done()

    async def _send(self, subject: str, message: Message) -> None:
        try:
            await self._bus.publish(subject, encode(message))
        except Exception as error:
            self._note_failure(subject, message, error)

    def _note_failure(self, subject: str, message: Message, error: Exception) -> None:
        """One message that cannot be sent must not end the service."""
        if isinstance(error, NotConnectedError):
            self._num_unsent += 1
        else:
            _log.error("could not send a %s to %s", type(message).__name__, subject, exc_info=error)

    async def _greet(self, ready: Ready) -> None:
        """Say `Hello` each second, and at once when asked to."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._hello_wanted.wait(), HELLO_INTERVAL_S)
            self._hello_wanted.clear()
            if self._bus.is_connected:
                self._endings.forget(self._clock())
                if self._num_unsent:
                    _log.warning("%d messages were not sent while the bus was away", self._num_unsent)
                    self._num_unsent = 0
            await self._send(self._hello_subject, self._hello(ready, self._phase))
            await asyncio.sleep(HELLO_SPACING_S)

    @property
    def _phase(self) -> ExecutorPhase:
        if self._is_draining:
            return "draining"
        return "compiling" if self._worker.pulse.is_compiling else "serving"

    def _hello(self, ready: Ready | None, phase: ExecutorPhase) -> Hello:
        view, done, pulse = self._worker.view, self._last_done, self._worker.pulse
        is_current = done is not None and done.epoch == view.epoch and view.plan > 0
        return Hello(
            executor=self._name,
            model=self._model,
            epoch=view.epoch,
            plan=view.plan,
            num_steps=max(view.num_steps, done.num_steps) if done and is_current else view.num_steps,
            handles=view.handles,
            pool=ready.pool if ready else (),
            max_model_len=ready.max_model_len if ready else 0,
            max_num_seqs=self._settings.max_num_seqs,
            has_gap=view.has_gap,
            state=phase,
            progress=pulse.count,
            slowest_ms=int(pulse.slowest_s * 1000),
        )

    async def _watch(self) -> None:
        """Give up a process in which a step hangs: nothing else can end it."""
        watchdog = Watchdog(self._settings.watchdog_s)
        while True:
            await asyncio.sleep(INTERVAL_S)
            if watchdog.is_hung(self._worker.pulse, self._clock()):
                self.on_hang()

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
            probes.keep_only(set(lives), began_s)
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
