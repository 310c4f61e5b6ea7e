"""What the service asks of whatever runs a model's steps: a thread of its own, or timers in a simulation."""

import asyncio
from collections.abc import Callable
from typing import Protocol

from pagebus.bus.messages import Plan
from pagebus.executor.batch import Runner
from pagebus.executor.lease import View
from pagebus.executor.pulse import Pulse
from pagebus.executor.step_loop import Event


class Steps(Protocol):
    """Runs a model's steps. Events go to the callback that it was made with, in order and on the loop."""

    @property
    def view(self) -> View:
        """The state after the last command."""

    @property
    def pulse(self) -> Pulse:
        """Whether a step is being computed, and whether it gets on."""

    def start(self) -> None:
        """Build the model; `Ready` follows."""

    def take_plan(self, plan: Plan) -> None:
        """Hand over a plan; it is applied after the running step."""

    def hear(self, epoch: int) -> None:
        """A leader of this epoch was heard."""

    def end_requesters(self, lives: frozenset[str]) -> None:
        """Nobody listens on these life subjects any more."""

    def hand_over(self) -> None:
        """Finish the running step, then end every row: they go on elsewhere."""

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
