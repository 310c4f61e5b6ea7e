"""What a relay asks of the world: this process's requester, other owners' life and reply subjects, records
and the log. It decides nothing.
"""

import asyncio
import enum
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence

from pagebus.bus import subjects
from pagebus.bus.messages import Message
from pagebus.bus.protocol import (
    Bus,
    BusError,
    Entry,
    NoRespondersError,
    NotConnectedError,
    RequestTimeoutError,
    Stored,
)
from pagebus.gateway.out_taps import OutTaps, Tap
from pagebus.gateway.stream_store import StreamStore
from pagebus.gateway.submitter import Ticket
from pagebus.requester.client import Requester
from pagebus.requester.events import Event, RequestSpec
from pagebus.requester.ownership import LIVE, NOT_HERE, OwnerProbe
from pagebus.requester.state import RequestState

_log = logging.getLogger(__name__)

_PROBE_TIMEOUT_S = 0.5


class OwnerState(enum.Enum):
    """What is known of an owner and one of its requests."""

    LIVE = "live"  # it runs there
    GONE = "gone"  # the process is gone, or does not hold the request
    DEAF = "deaf"  # somebody subscribes, nobody answered in time
    UNKNOWN = "unknown"  # the bus could not tell


class Owners:
    """This process among the owners of requests."""

    def __init__(self, bus: Bus, requester: Requester, store: StreamStore) -> None:
        self.instance = requester.instance
        self._bus = bus
        self._requester = requester
        self._store = store
        self._taps = OutTaps(bus)
        self._tasks: set[asyncio.Task[None]] = set()

    def submit(self, spec: RequestSpec, on_event: Callable[[Event], None]) -> Ticket:
        """Own a request. Raises `ValueError` where it runs here already."""
        return self._requester.submit(spec, on_event)

    def release(self, request_id: str) -> RequestState | None:
        """Own it no longer; what was received of it."""
        return self._requester.release(request_id)

    async def state_of(self, owner: str, request_id: str) -> OwnerState:
        """Whether the request runs at its owner."""
        if owner == self.instance:
            return OwnerState.LIVE if self._requester.is_live(request_id) else OwnerState.GONE
        probe = OwnerProbe(request_id).encode()
        try:
            answer = await self._bus.request(subjects.life(owner), probe, timeout_s=_PROBE_TIMEOUT_S)
        except NoRespondersError:
            return OwnerState.GONE
        except RequestTimeoutError:
            return OwnerState.DEAF
        except BusError:
            return OwnerState.UNKNOWN
        if answer.data == LIVE:
            return OwnerState.LIVE
        return OwnerState.GONE if answer.data == NOT_HERE else OwnerState.UNKNOWN

    def tell_moved(self, owner: str, request_ids: Sequence[str]) -> None:
        """Let the former owner know, if it is still there; nobody waits for that."""
        if owner != self.instance:
            self.keep(self._tell_moved(owner, request_ids))

    async def _tell_moved(self, owner: str, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            probe = OwnerProbe(request_id, is_taken_over=True).encode()
            try:
                await self._bus.publish(subjects.life(owner), probe)
            except BusError as error:
                _log.info("a former owner was not told: %s", error)
                return

    async def listen(
        self, owner: str, request_ids: Sequence[str], on_message: Callable[[Message], None]
    ) -> Tap:
        """Hear what an owner is sent about these requests, from now on."""
        return await self._taps.open(owner, request_ids, on_message)

    async def leave(self, tap: Tap) -> None:
        """Hear it no longer."""
        await self._taps.close(tap)

    def read(self, owner: str, first_sequence: int) -> AsyncIterator[Stored]:
        """What an owner was sent; raises `BusError`, here or later."""
        return self._store.read(owner, first_sequence)

    async def get(self, key: str) -> Entry | None:
        """A record; raises `BusError`."""
        return await self._store.get(key)

    async def update(self, key: str, value: bytes, revision: int) -> int:
        """Replace a record; raises `WrongRevisionError`, `BusError`."""
        return await self._store.update(key, value, revision)

    async def first_sequence(self) -> int:
        """Where in the log what is sent from now on begins; raises `BusError`."""
        await self._store.refresh()
        if self._store.first_sequence is None:
            raise NotConnectedError("the log of streams cannot be reached")
        return self._store.first_sequence

    def keep(self, work: Coroutine[None, None, None]) -> None:
        """Do it beside everything else."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Give up what is done beside everything else."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
