"""An event loop whose clock jumps to the next timer instead of waiting, and whose processes can be stopped.

What runs belongs to the `Owner` of its context, if any: while that one is stopped (SIGSTOP), its callbacks
and timers pile up, and run in their order when it goes on (SIGCONT).
"""

import asyncio
import contextvars
import heapq
import itertools
from collections import deque
from collections.abc import Callable, Coroutine
from typing import TypeVar, TypeVarTuple

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Owner:
    """A simulated process: whose callbacks these are."""

    def __init__(self) -> None:
        self.is_stopped = False
        self._backlog: list[asyncio.Handle] = []

    def go_on(self) -> None:
        """Run what piled up, in its order."""
        self.is_stopped = False
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)  # noqa: S101 - nothing else has owners
        backlog, self._backlog = self._backlog, []
        loop.put(backlog, self)

    def keep(self, handle: asyncio.Handle) -> None:
        """It came while the process was stopped."""
        self._backlog.append(handle)


OWNER: contextvars.ContextVar[Owner | None] = contextvars.ContextVar("owner", default=None)


class VirtualLoop(asyncio.SelectorEventLoop):
    """Starts at 0 s; without threads and sockets of others, of course."""

    def __init__(self) -> None:
        self._now_s = 0.0
        self._due: deque[tuple[asyncio.Handle, Owner | None]] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle, Owner | None]] = []
        self._order = itertools.count()
        super().__init__()

    def time(self) -> float:
        """Virtual seconds."""
        return self._now_s

    def put(self, handles: list[asyncio.Handle], owner: Owner) -> None:
        """Run these next."""
        self._due.extend((handle, owner) for handle in handles)

    def call_soon(
        self,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.Handle:
        """As on every loop."""
        handle = asyncio.Handle(callback, args, self, context)
        self._due.append((handle, OWNER.get() if context is None else context.get(OWNER)))
        return handle

    def call_later(
        self,
        delay: float,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        """As on every loop."""
        return self.call_at(self._now_s + max(delay, 0.0), callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        """As on every loop."""
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        owner = OWNER.get() if context is None else context.get(OWNER)
        heapq.heappush(self._timers, (when, next(self._order), handle, owner))
        return handle

    def _run_once(self) -> None:
        """What `run_forever` repeats: what is due, or else what is due next."""
        timers, due = self._timers, self._due
        while timers and timers[0][2].cancelled():
            heapq.heappop(timers)
        if not due:
            if not timers:
                raise RuntimeError("nothing will ever happen: a deadlock")
            self._now_s = max(self._now_s, timers[0][0])
        while timers and timers[0][0] <= self._now_s:
            _, _, timer, owner = heapq.heappop(timers)
            due.append((timer, owner))
        for _ in range(len(due)):
            handle, owner = due.popleft()
            if handle.cancelled():
                continue
            if owner is not None and owner.is_stopped:
                owner.keep(handle)
            else:
                handle._run()


def run(main: Coroutine[object, object, T]) -> T:
    """`asyncio.run` in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
