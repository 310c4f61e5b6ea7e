"""`HandScheduler` on a bus: plans as steps are reported, snapshots on `Hello`, ids out of `Tokens`."""

import asyncio
from collections import defaultdict
from collections.abc import Callable

from pagebus.bus import subjects
from pagebus.bus.messages import Failed, Heartbeat, Hello, StepDone, Tokens, decode, encode, unpack_ids
from pagebus.bus.protocol import Bus, Msg, NotConnectedError
from tests.support.hand_scheduler import HandScheduler

MODEL = "fake"
REPLY = "pagebus.out.r"


class BusScheduler:
    """Sends a plan on every step reported, or after 0.2 s of silence. It is the requester as well."""

    def __init__(self, bus: Bus, scheduler: HandScheduler, requester_bus: Bus | None = None) -> None:
        self.bus = bus
        self.requester_bus = requester_bus or bus
        self.scheduler = scheduler
        self.hellos: list[Hello] = []
        self.dones: list[StepDone] = []
        self.received: dict[str, list[int]] = defaultdict(list)
        self.finished: dict[str, str] = {}
        self.failures: list[Failed] = []
        self.num_tokens_messages = 0
        self.num_to_lose = 0  # plans that are made and not sent
        self.is_muted = False
        self._wanted = asyncio.Event()
        self._wants_snapshot = False
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._subscriptions = [
            await self.bus.subscribe(subjects.hello(MODEL), self._on_hello),
            await self.bus.subscribe(subjects.step_done(MODEL), self._on_done),
            await self.requester_bus.subscribe(REPLY, self._on_reply),
        ]
        self._task = asyncio.create_task(self._plan())

    async def stop(self) -> None:
        for subscription in self._subscriptions:
            await subscription.unsubscribe()
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait({self._task})
        if not self._task.cancelled():
            self._task.result()

    def replace(self, scheduler: HandScheduler) -> None:
        """Another leader takes over: its state is new."""
        self.scheduler = scheduler
        self._wanted.set()

    def poke(self) -> None:
        """Plan now: something was added or released."""
        self._wanted.set()

    async def heartbeat(self, epoch: int) -> None:
        beat = Heartbeat(scheduler="s", model=MODEL, epoch=epoch)
        await self.bus.publish(subjects.heartbeat(MODEL), encode(beat))

    async def until_finished(self, *request_ids: str, timeout_s: float = 20.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not all(request_id in self.finished for request_id in request_ids):  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    async def until_serving(self) -> None:
        """Until the executor listens for plans: one that comes while it loads is lost."""
        await self.until(lambda: any(hello.state == "serving" for hello in self.hellos))

    async def until(self, check: Callable[[], bool], timeout_s: float = 10.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not check():  # noqa: ASYNC110 (any condition, not only ours)
                await asyncio.sleep(0.005)

    async def _plan(self) -> None:
        while True:
            try:
                await asyncio.wait_for(self._wanted.wait(), 0.2)
            except TimeoutError:
                if not self.scheduler.rows:
                    continue
            self._wanted.clear()
            if self.is_muted or not self.hellos:
                continue
            plan = self.scheduler.plan(is_snapshot=self._wants_snapshot)
            self._wants_snapshot = False
            if self.num_to_lose > 0:
                self.num_to_lose -= 1
                continue
            try:
                await self.bus.publish(subjects.plan(plan.executor), encode(plan))
            except NotConnectedError:
                self._wants_snapshot = True

    def _on_hello(self, msg: Msg) -> None:
        hello = decode(msg.data)
        assert isinstance(hello, Hello)
        self.hellos.append(hello)
        if self.scheduler.needs_snapshot(hello) and self.scheduler.rows:
            self._wants_snapshot = True
            self._wanted.set()

    def _on_done(self, msg: Msg) -> None:
        done = decode(msg.data)
        assert isinstance(done, StepDone)
        self.dones.append(done)
        if self.scheduler.take_done(done) and self.scheduler.rows:
            self._wanted.set()

    def _on_reply(self, msg: Msg) -> None:
        match decode(msg.data):
            case Tokens(rows=rows):
                self.num_tokens_messages += 1
                for row in rows:
                    ids = self.received[row.request_id]
                    assert row.index == len(ids), f"{row.request_id}: {row.index} after {len(ids)} ids"
                    ids += unpack_ids(row.ids)
                    if row.finish_reason is not None:
                        self.finished[row.request_id] = row.finish_reason
            case Failed() as failed:
                self.failures.append(failed)
            case other:
                raise AssertionError(f"unexpected {other}")
