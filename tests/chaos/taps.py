"""Listeners on the bus that count what must not be obeyed: stale rows, late plans. They change nothing."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import Self

from pagebus.bus import subjects
from pagebus.bus.messages import Plan, StepDone, Tokens, decode, encode
from pagebus.bus.nats_bus import NatsBus
from pagebus.bus.protocol import Msg
from tests.chaos.bed import MODEL, Bed


class _Tap(ABC):
    def __init__(self, bed: Bed, roles: tuple[str, ...]) -> None:
        self._bed = bed
        self._roles = roles
        self._buses: list[NatsBus] = []

    async def __aenter__(self) -> Self:
        for role in self._roles:
            bus = await NatsBus.connect(
                self._bed.url(role).split(","), name="chaos-tap", on_closed=lambda: None
            )
            self._buses.append(bus)
        await self._listen()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for bus in self._buses:
            await bus.close()

    @abstractmethod
    async def _listen(self) -> None:
        """Subscribe to what is counted."""


class StaleTap(_Tap):
    """Counts rows of an attempt that a later one has replaced on the wire."""

    def __init__(self, bed: Bed) -> None:
        super().__init__(bed, ("tool",))
        self.num_stale = 0
        self._highest: dict[str, int] = {}

    async def _listen(self) -> None:
        await self._buses[0].subscribe(subjects.ALL_OUT, self._take)

    def _take(self, msg: Msg) -> None:
        message = decode(msg.data)
        if isinstance(message, Tokens):
            for row in message.rows:
                highest = max(self._highest.get(row.request_id, 0), row.attempt)
                self._highest[row.request_id] = highest
                self.num_stale += row.attempt < highest


class PlanTap(_Tap):
    """Plans and reports as they pass: which plans are of an ended term, and whether anybody obeys one.

    Not where executors die: a listener on their plans hides that nobody else listens there.
    """

    def __init__(self, bed: Bed) -> None:
        super().__init__(bed, ("executor", "scheduler"))
        self.highest_epoch = 0
        self.num_late_plans = 0
        self.num_late_obeyed = 0
        self.last_plan: dict[str, Plan] = {}  # of the newest term, by executor
        self.on_row: Callable[[str, str], None] = lambda executor, request_id: None
        self._reported: dict[str, int] = {}

    async def _listen(self) -> None:
        await self._buses[0].subscribe("pagebus.plan.*", self._on_plan)
        await self._buses[1].subscribe(subjects.step_done(MODEL), self._on_done)

    def _on_plan(self, msg: Msg) -> None:
        if not msg.data:
            return
        plan = decode(msg.data)
        if isinstance(plan, Plan):
            for row in plan.rows:
                self.on_row(plan.executor, row.request_id)
            if plan.epoch >= self.highest_epoch:
                self.highest_epoch = plan.epoch
                self.last_plan[plan.executor] = plan
            else:
                self.num_late_plans += 1

    def _on_done(self, msg: Msg) -> None:
        """An executor that reported for an epoch never reports steps for an older one."""
        done = decode(msg.data)
        if isinstance(done, StepDone):
            before = self._reported.get(done.executor, 0)
            self._reported[done.executor] = max(before, done.epoch)
            self.num_late_obeyed += done.epoch < before

    async def replay(self, plan: Plan) -> None:
        """Send a plan of an ended term, as a leader would that does not know yet."""
        await self._buses[1].publish(subjects.plan(plan.executor), encode(plan))
