"""A steady flow of numbered messages from one bus connection to another, and what became of each."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise

from pagebus.bus.nats_bus import NatsBus
from pagebus.bus.protocol import BusError, Msg
from tests.support.nats import eventually


class Flow:
    """Publishes every `interval_s`; times are of the monotonic clock."""

    def __init__(self, sender: NatsBus, receiver: NatsBus, subject: str, interval_s: float = 0.01) -> None:
        self.sender, self.receiver, self.subject = sender, receiver, subject
        self.sent: dict[int, float] = {}  # accepted by the bus
        self.refused: dict[int, float] = {}  # the bus said that it cannot
        self.got: dict[int, list[float]] = {}
        self._interval_s = interval_s
        self.num_published = 0
        self._task: asyncio.Task[None] | None = None
        self._noticed: list[float] = []

    async def notice(self) -> None:
        """The bus says that something may have been lost."""
        self._noticed.append(time.monotonic())

    def take(self, message: Msg) -> None:
        """One message as it came."""
        self.got.setdefault(int(message.data), []).append(time.monotonic())

    def start(self) -> None:
        """Begin to publish."""
        self._task = asyncio.create_task(self._run(), name=f"flow on {self.subject}")

    async def stop(self, settle_s: float = 0.5) -> None:
        """Publish no more, and let what is under way arrive."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
            await asyncio.sleep(settle_s)

    async def _run(self) -> None:
        while True:
            self.num_published += 1
            try:
                await self.sender.publish(self.subject, b"%d" % self.num_published)
            except BusError:
                self.refused[self.num_published] = time.monotonic()
            else:
                self.sent[self.num_published] = time.monotonic()
            await asyncio.sleep(self._interval_s)

    @property
    def lost(self) -> list[int]:
        """Accepted, and never received."""
        return [number for number in self.sent if number not in self.got]

    def longest_gap_s(self, since_s: float = 0.0) -> float:
        """The longest time without a message after `since_s`, up to now."""
        times = [at for arrivals in self.got.values() for at in arrivals if at > since_s]
        edges = [since_s or min(times), *sorted(times), time.monotonic()]
        return max(later - earlier for earlier, later in pairwise(edges))

    def assert_nothing_lost_in_silence(self, within_s: float = 4.0) -> None:
        """Each message came once, or was refused, or one of both ends was told soon after it was sent.

        For a flow that has stopped."""
        assert self._task is None
        assert all(len(arrivals) == 1 for arrivals in self.got.values())
        assert not set(self.got) & set(self.refused)
        for number in self.lost:
            sent_s = self.sent[number]
            told = [at for at in self._noticed if sent_s - 0.5 < at < sent_s + within_s]
            assert told, f"message {number} was lost and nobody told: {self._noticed}, sent at {sent_s}"


@asynccontextmanager
async def flowing(
    sender: NatsBus, receiver: NatsBus, subject: str, interval_s: float = 0.01
) -> AsyncIterator[Flow]:
    """A flow that has begun to arrive; ended afterwards."""
    flow = Flow(sender, receiver, subject, interval_s)
    for bus in (sender, receiver):
        bus.on_reconnect(flow.notice)
    subscription = await receiver.subscribe(subject, flow.take)
    flow.start()
    try:
        await eventually(lambda: flow.got)
        yield flow
    finally:
        await flow.stop(0)
        await subscription.unsubscribe()
