"""Whether this model's requests get on, as far as one gateway can tell. It knows heartbeats, no HTTP."""

import asyncio
import time
from collections.abc import Callable

from pagebus.gateway.generations import Generations
from pagebus.gateway.submitter import Submitter

STALL_S = 7.0
"""Work, and nobody who got on with it for so long: that is told."""
LEADER_SILENCE_S = 2.0
INTERVAL_S = 0.5
_PAUSE_S = 4 * INTERVAL_S


class ProgressWatch:
    """Judges from the leader's heartbeats, or, where none come, from the requests that wait here.

    `note` is called every `INTERVAL_S`. After a pause of its own nothing is held against anybody: a stopped
    process heard nobody.
    """

    def __init__(
        self, submitter: Submitter, generations: Generations, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._submitter = submitter
        self._generations = generations
        self._clock = clock
        self._noted_s = float("-inf")
        self._fine_s = clock()  # when nothing was wrong, or nothing was known
        self._has_met_executor = False
        self._reason: str | None = None

    async def watch(self) -> None:
        """Judge until cancelled."""
        while True:
            self.note()
            await asyncio.sleep(INTERVAL_S)

    @property
    def reason(self) -> str | None:
        """Why nothing gets on; None: it does, or there is nothing to do, or nobody can be blamed yet."""
        self.note()
        return self._reason

    def note(self) -> None:
        """Look now."""
        now_s = self._clock()
        has_paused = now_s - self._noted_s > _PAUSE_S
        self._noted_s = now_s
        beat, silent_s = self._submitter.heartbeat, self._submitter.heartbeat_age_s
        if beat is not None:
            self._has_met_executor |= beat.num_executors > 0
        is_led = beat is not None and silent_s < LEADER_SILENCE_S
        if is_led and beat is not None and beat.stalled_ms > 0 and self._has_met_executor:
            stalled_s = beat.stalled_ms / 1000 + silent_s
            why = f"rows run or wait, and no executor has made progress for {stalled_s:.0f} s"
        elif not is_led and self._generations.num_live > 0:
            stalled_s = silent_s
            why = f"requests wait, and no scheduler has been heard for {stalled_s:.0f} s"
        else:
            self._fine_s, self._reason = now_s, None
            return
        if has_paused:
            self._fine_s = now_s
        # A leader may know of a longer stall than this process has watched: then it counts whole.
        watched_s = now_s - self._fine_s
        is_stalled = stalled_s >= STALL_S and (is_led or watched_s >= STALL_S)
        self._reason = why if is_stalled and not has_paused else None
