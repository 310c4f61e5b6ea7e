"""What is published to NATS clients, in order; and whether anybody is there to read it.

It knows subjects and events, nothing of requests.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Collection

import msgspec

from pagebus.bus import subjects
from pagebus.bus.messages import ApiAlive, ApiEvent
from pagebus.bus.protocol import Bus, BusError, NoRespondersError

MAX_UNSENT = 100_000
"""Most events that wait to be published; beyond it they are dropped, and readers see a gap."""
REPEATED_S = 3.0
"""A bus that comes back may have lost what it took so long before: that is published again."""
UNREAD_S = 25.0
"""A stream that nobody has read for so long is over."""

_ANSWER_S = 0.5
_AT_ONCE = 64


class ApiOutbox:
    """Everything that goes to clients of one gateway."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._unsent: deque[tuple[str, bytes]] = deque()
        self._sent: deque[tuple[float, str, bytes]] = deque(maxlen=MAX_UNSENT)
        self._wake = asyncio.Event()
        self.num_dropped = 0

    def put(self, subject: str, event: ApiEvent) -> None:
        """Publish soon."""
        if len(self._unsent) >= MAX_UNSENT:
            self.num_dropped += 1
            return
        self._unsent.append((subject, msgspec.json.encode(event)))
        self._wake.set()

    async def run(self) -> None:
        """Publish until cancelled: one publisher for all streams keeps their events in order."""
        self._bus.on_reconnect(self._repeat)
        while True:
            await self._wake.wait()
            self._wake.clear()
            now_s = time.monotonic()
            while self._sent and self._sent[0][0] < now_s - REPEATED_S:
                self._sent.popleft()
            while self._unsent:
                subject, data = self._unsent.popleft()
                self._sent.append((now_s, subject, data))
                try:
                    await self._bus.publish(subject, data)
                except (BusError, ValueError):  # not connected, or a reply subject that nobody may use
                    self.num_dropped += 1

    async def _repeat(self) -> None:
        """Readers know by the index what they have already."""
        since_s = time.monotonic() - REPEATED_S
        recent = [(subject, data) for sent_s, subject, data in self._sent if sent_s >= since_s]
        self._sent.clear()
        self._unsent.extendleft(reversed(recent))
        self._wake.set()


class Readers:
    """Whether streams are read: by the bus's own word that nobody listens on a subject."""

    def __init__(self, bus: Bus, clock: Callable[[], float] = time.monotonic) -> None:
        self._bus = bus
        self._clock = clock
        self._unread_since_s: dict[str, float] = {}

    async def unread(self, identities: Collection[str]) -> list[str]:
        """Those of the streams that nobody has read for 25 s. Each gets a sign of life on the way."""
        self._unread_since_s = {
            identity: since_s for identity, since_s in self._unread_since_s.items() if identity in identities
        }
        waiting = list(identities)
        for start in range(0, len(waiting), _AT_ONCE):
            await asyncio.gather(*(self._look(identity) for identity in waiting[start : start + _AT_ONCE]))
        now_s = self._clock()
        return [identity for identity, since_s in self._unread_since_s.items() if now_s - since_s >= UNREAD_S]

    async def _look(self, identity: str) -> None:
        sign = msgspec.json.encode(ApiAlive(id=identity))
        try:
            await self._bus.request(subjects.stream(identity), sign, timeout_s=_ANSWER_S)
        except NoRespondersError:
            self._unread_since_s.setdefault(identity, self._clock())
        except BusError:  # nobody answers a sign of life: it was read, or the bus is away
            self._unread_since_s.pop(identity, None)
        else:
            self._unread_since_s.pop(identity, None)
