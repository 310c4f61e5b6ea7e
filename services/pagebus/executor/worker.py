"""The thread that builds the model and runs its steps back to back. It owns the `StepLoop` and never touches
asyncio but for `call_soon_threadsafe`; knows no bus.
"""

import asyncio
import queue
import threading
import time
from collections.abc import Callable

from pagebus.bus.messages import Plan
from pagebus.executor.batch import Runner
from pagebus.executor.lease import View
from pagebus.executor.pulse import Pulse
from pagebus.executor.step_loop import Command, EndRequesters, Event, HandOver, Hear, StepLoop, Stop, Stopped


class Worker:
    """Hand it plans from the loop; `on_event` is called on the loop with what comes out, in order."""

    def __init__(
        self,
        executor: str,
        build: Callable[[], Runner],
        on_event: Callable[[Event], None],
        *,
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._executor = executor
        self._build = build
        self._on_event = on_event
        self._loop = loop
        self._clock = clock
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._view = View(0, 0, 0, b"", has_gap=False, lives=frozenset())
        self._pulse = Pulse()
        # A daemon: a process that is told to stop while weights load does not wait for them.
        self._thread = threading.Thread(target=self._main, name="executor-steps", daemon=True)

    # -- the loop's side ---------------------------------------------------------------------------------

    @property
    def view(self) -> View:
        """The state after the last command (its `num_steps` may be behind); replaced whole by the thread."""
        return self._view

    @property
    def pulse(self) -> Pulse:
        """Whether a step is being computed, and whether it gets on; the model's own once it is loaded."""
        return self._pulse

    def start(self) -> None:
        """Start the thread: it builds the model first."""
        self._thread.start()

    def take_plan(self, plan: Plan) -> None:
        """Hand over a plan; it is applied after the running step."""
        self._commands.put(plan)

    def hear(self, epoch: int) -> None:
        """A leader of this epoch was heard."""
        self._commands.put(Hear(epoch))

    def end_requesters(self, lives: frozenset[str]) -> None:
        """Nobody listens on these life subjects any more."""
        self._commands.put(EndRequesters(lives))

    def hand_over(self) -> None:
        """Finish the running step, then end every row: they go on elsewhere."""
        self._commands.put(HandOver())

    def stop(self) -> None:
        """Finish the running step, then end; `Stopped` follows."""
        self._commands.put(Stop())

    # -- the thread's side -------------------------------------------------------------------------------

    def _main(self) -> None:
        error: BaseException | None = None
        left: list[Event] = []
        try:
            steps = StepLoop(self._executor, self._build(), self._clock)
            self._pulse = steps.pulse
            self._flush(steps.take_events())
            try:
                self._serve(steps)
            finally:
                left = steps.take_events()
        except BaseException as caught:  # handed to the loop, which raises it
            error = caught
        self._flush([*left, Stopped(error)])

    def _serve(self, steps: StepLoop) -> None:
        is_waiting = False
        while True:
            # 1. What the loop handed over; an idle thread waits for it.
            commands = self._receive(is_waiting)
            if any(isinstance(command, Stop) for command in commands):
                steps.finish()
                self._flush(steps.take_events())
                return
            # 2. The next step.
            steps.begin(commands)
            self._view = steps.view
            # 3. Publish what the step before made while this one computes.
            self._flush(steps.take_events())
            # 4. Compute it; or wait for the oldest one that was launched.
            if steps.due is not None:
                steps.run()
            is_waiting = steps.is_idle

    def _receive(self, is_waiting: bool) -> list[Command]:
        commands = [self._commands.get()] if is_waiting else []
        while True:
            try:
                commands.append(self._commands.get_nowait())
            except queue.Empty:
                return commands

    def _flush(self, events: list[Event]) -> None:
        if not events:
            return
        try:
            self._loop.call_soon_threadsafe(self._deliver, events)
        except RuntimeError:  # the loop is closed: nobody is left to tell
            self._commands.put(Stop())

    def _deliver(self, events: list[Event]) -> None:
        for event in events:
            self._on_event(event)
