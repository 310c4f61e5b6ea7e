"""Keeps one set of services alive over all repetitions that want the same; ends it before another starts."""

import contextlib
from pathlib import Path

from tests.chaos.bed import Bed, Layout, running


class Beds:
    """At most one bed at a time: two would share the cores and disturb each other."""

    def __init__(self, logs: Path | None = None) -> None:
        """`logs`: where the services' logs are kept, one folder a bed."""
        self._logs = logs
        self._number = 0
        self._layout: Layout | None = None
        self._bed: Bed | None = None
        self._stack = contextlib.AsyncExitStack()

    async def get(self, layout: Layout) -> Bed:
        """The bed of `layout`, healthy when it was last used. Raises `NotReachedError`."""
        if self._bed is None or layout != self._layout:
            await self.close()
            self._number += 1
            logs = self._logs / str(self._number) if self._logs is not None else None
            self._bed = await self._stack.enter_async_context(running(layout, logs))
            self._layout = layout
        return self._bed

    async def close(self) -> None:
        """End what runs."""
        self._bed = None
        await self._stack.aclose()
