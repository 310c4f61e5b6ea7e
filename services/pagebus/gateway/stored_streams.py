"""The stored requests of this gateway: admits new ones, joins those with a known `Idempotency-Key`, finds old
ones.

It knows records and keys, neither HTTP nor text.
"""

import asyncio
import dataclasses
import logging
import time
from dataclasses import dataclass

import msgspec

from pagebus.bus.protocol import Bus, BusError, WrongRevisionError
from pagebus.gateway.errors import ApiError
from pagebus.gateway.event_ids import MAX_CHOICES
from pagebus.gateway.generation_events import GenerationRequest
from pagebus.gateway.jobs import Idempotency, Job
from pagebus.gateway.owners import Owners, OwnerState
from pagebus.gateway.relay import Relay
from pagebus.gateway.relay_parts import RelayTiming
from pagebus.gateway.request_ids import new_answer_id
from pagebus.gateway.sampling_params import TokenDetails
from pagebus.gateway.stream_record import (
    BrokenRecordError,
    Segment,
    StreamRecord,
    api_locator,
    decode_record,
    encode_record,
    idempotent_locator,
    job_of,
    locator_of,
    record_key,
    record_of,
)
from pagebus.gateway.stream_store import LOG_AGE_S, RECORD_AGE_S, WAIT_S, StreamStore
from pagebus.requester.client import Requester

_log = logging.getLogger(__name__)

_NUM_TRIES = 4


@dataclass(frozen=True)
class Admission:
    """A job and how it runs: with a relay if it is stored, or may be soon (`storing`)."""

    job: Job
    relay: Relay | None = None
    storing: asyncio.Task[bool] | None = None

    async def is_stored(self) -> bool:
        """Whether the answer can be had again; waits as long as a record may take."""
        if self.relay is None:
            return False
        return True if self.storing is None else await asyncio.shield(self.storing)


class StoredStreams:
    """One per gateway."""

    def __init__(
        self,
        bus: Bus,
        requester: Requester,
        *,
        timing: RelayTiming | None = None,
        wait_s: float = WAIT_S,
        renew_s: float = RECORD_AGE_S / 3,
    ) -> None:
        self._renew_s = renew_s
        self._requester = requester
        self._store = StreamStore(bus, wait_s=wait_s)
        self._owners = Owners(bus, requester, self._store)
        self._timing = timing
        self._relays: dict[str, Relay] = {}  # those that own, by each request's id

    async def start(self) -> None:
        """Open bucket and log in the background."""
        self._requester.on_doubt = self._on_doubt
        await self._store.start()
        self._owners.keep(self._renew_all())

    async def close(self) -> None:
        """Stop what is done in the background."""
        await self._owners.close()
        await self._store.close()

    async def admit(self, job: Job) -> Admission:
        """Store a job whose requests are resolved, or join the one that has its idempotency key.

        Raises a 422 where that one had another body. A job that nobody may ask for again, and one whose
        record cannot be written now, runs unstored.
        """
        is_wanted = job.idempotency is not None or (job.is_stream and job.num_choices <= MAX_CHOICES)
        if not is_wanted or not job.needs_run or not self._store.is_ready:
            return Admission(job)
        if job.idempotency is not None:
            job = _at_key(job, job.idempotency)
        relay = self._new_relay(job)
        if job.idempotency is not None:
            return await self._create_or_join(job, relay)
        return Admission(job, relay, asyncio.create_task(self._create(relay)))

    async def find(self, tenant: str, answer_id: str) -> Relay | None:
        """A reader of the answer with this id, if there is one of this tenant. Raises `BusError`."""
        return await self._find(tenant, locator_of(answer_id), answer_id)

    async def find_api(self, tenant: str, request_id: str) -> Relay | None:
        """The same for the id of a NATS client. Raises `BusError`."""
        return await self._find(tenant, api_locator(request_id), request_id)

    async def admit_api(
        self, request_id: str, request: GenerationRequest, details: TokenDetails
    ) -> Relay | None:
        """Own a NATS client's request; None where it cannot be stored now. Raises a 409 while another one
        of this id runs."""
        if not self._store.is_ready:
            return None
        record = StreamRecord(
            id=request_id,
            kind="api",
            tenant=request.tenant,
            model="",
            fingerprint="",
            created=int(time.time()),
            details=details,
            requests=(request,),
            deadline_s=time.time() + request.timeout_s,
            segments=(self.new_segment(),),
        )
        relay = self._own(record_key(record.tenant, api_locator(request_id)), record)
        try:
            for _ in range(_NUM_TRIES):
                try:
                    relay.revision = await self._store.create(relay.key, encode_record(record))
                    return relay
                except WrongRevisionError:
                    entry = await self._store.get(relay.key)
                if entry is None:
                    continue
                found = _read(entry.value)
                if found is not None and await self._runs(found):
                    raise ApiError(
                        409, f"request {request_id} is running already", code="id_in_use", param="id"
                    )
                try:
                    relay.revision = await self._store.update(
                        relay.key, encode_record(record), entry.revision
                    )
                    return relay
                except WrongRevisionError:
                    continue
        except (BusError, TimeoutError) as error:
            _log.info("a NATS client's request is not stored: %s", error or "no answer in time")
        except BaseException:
            self.forget(relay)
            raise
        self.forget(relay)
        return None

    def cancelled(self, relay: Relay) -> None:
        """Its client wants nothing more: nobody is to go on with it."""
        if relay.is_owner and relay.revision is not None:
            record = msgspec.structs.replace(relay.record, is_cancelled=True)
            self._owners.keep(self._write(relay.key, record, relay.revision))

    async def _runs(self, record: StreamRecord) -> bool:
        states = [await self._owners.state_of(record.owner, one.request_id) for one in record.requests]
        return OwnerState.LIVE in states

    def void(self, relay: Relay) -> None:
        """It was refused: the next one with the same idempotency key starts anew."""
        if relay.is_owner and relay.revision is not None and relay.record.body_digest:
            record = msgspec.structs.replace(relay.record, is_void=True)
            self._owners.keep(self._write(relay.key, record, relay.revision))

    def submitted(self, relay: Relay) -> None:
        """Its requests run now, or never will."""
        self._requester.expected.difference_update(relay.request_ids)

    def forget(self, relay: Relay) -> None:
        """Nobody waits for it here any more."""
        self.submitted(relay)
        for request_id in relay.request_ids:
            if self._relays.get(request_id) is relay:
                del self._relays[request_id]
        relay.close()

    def new_segment(self) -> Segment:
        """Where what is sent to this process from now on begins."""
        return Segment(self._owners.instance, self._store.first_sequence or 1)

    def _new_relay(self, job: Job) -> Relay:
        request = job.requests[0]
        record = record_of(job, self.new_segment(), time.time() + request.timeout_s)
        locator = locator_of(record.id)
        return self._own(record_key(record.tenant, locator), record)

    def _own(self, key: str, record: StreamRecord) -> Relay:
        relay = Relay(self._owners, key, record, None, is_owner=True, timing=self._timing)
        # Who joins in this very moment must not take this process for one that does not know the requests.
        self._requester.expected.update(relay.request_ids)
        self._register(relay)
        return relay

    def _register(self, relay: Relay) -> None:
        for request_id in relay.request_ids:
            self._relays[request_id] = relay

    def _on_doubt(self, request_id: str) -> None:
        relay = self._relays.get(request_id)
        if relay is not None:
            self._owners.keep(relay.doubt())

    async def _renew_all(self) -> None:
        """Records last longer than most requests; those of the others are written again."""
        while True:
            await asyncio.sleep(self._renew_s)
            for relay in set(self._relays.values()):
                try:
                    if relay.age_s > self._renew_s:
                        await relay.renew()
                except WrongRevisionError:
                    await relay.doubt()
                except BusError as error:
                    _log.info("a record is not renewed now: %s", error)

    async def _create(self, relay: Relay) -> bool:
        try:
            relay.revision = await self._store.create(relay.key, encode_record(relay.record))
        except (BusError, TimeoutError) as error:
            _log.info("a stream is not stored: %s", error or "no answer in time")
            return False
        return True

    async def _create_or_join(self, job: Job, relay: Relay) -> Admission:
        value = encode_record(relay.record)
        try:
            for _ in range(_NUM_TRIES):
                try:
                    relay.revision = await self._store.create(relay.key, value)
                    return Admission(job, relay)
                except WrongRevisionError:
                    entry = await self._store.get(relay.key)
                if entry is None:
                    continue
                found = _read(entry.value)
                if found is None or _is_free(found):
                    try:
                        relay.revision = await self._store.update(relay.key, value, entry.revision)
                        return Admission(job, relay)
                    except WrongRevisionError:
                        continue
                self.forget(relay)
                return self._joined(job, found, entry.revision)
        except (BusError, TimeoutError) as error:
            _log.info("a request with a key is not stored: %s", error or "no answer in time")
        except BaseException:
            self.forget(relay)
            raise
        self.forget(relay)
        return Admission(job)

    def _joined(self, job: Job, found: StreamRecord, revision: int) -> Admission:
        if job.idempotency is None or found.body_digest != job.idempotency.body_digest:
            raise ApiError(
                422,
                "this Idempotency-Key was used for another request; send another key, or the same request",
                code="idempotency_key_reused",
                param="Idempotency-Key",
            )
        again = job_of(found, job.shape.again(found.id, found.created), job.trace)
        again = dataclasses.replace(again, idempotency=job.idempotency)
        return Admission(again, self._reader(record_key(found.tenant, locator_of(found.id)), found, revision))

    async def _find(self, tenant: str, locator: str, whole_id: str) -> Relay | None:
        if not locator:
            return None
        key = record_key(tenant, locator)
        entry = await self._store.get(key)
        record = None if entry is None else _read(entry.value)
        if entry is None or record is None or record.id != whole_id or record.tenant != tenant:
            return None
        return self._reader(key, record, entry.revision)

    def _reader(self, key: str, record: StreamRecord, revision: int) -> Relay:
        return Relay(
            self._owners,
            key,
            record,
            revision,
            is_owner=False,
            timing=self._timing,
            on_owned=self._register,
        )

    async def _write(self, key: str, record: StreamRecord, revision: int) -> None:
        try:
            await self._store.update(key, encode_record(record), revision)
        except BusError as error:
            _log.info("a record keeps what is not so any more: %s", error)


def _read(value: bytes) -> StreamRecord | None:
    try:
        return decode_record(value)
    except BrokenRecordError as error:
        _log.warning("a stream's record cannot be read: %s", error)
        return None


def _at_key(job: Job, idempotency: Idempotency) -> Job:
    """The job with an answer's id that leads to its key's place."""
    shape = job.shape
    locator = idempotent_locator(job.requests[0].tenant, idempotency.key)
    return dataclasses.replace(
        job, shape=shape.again(shape.id_prefix + new_answer_id(locator), shape.created)
    )


def _is_free(record: StreamRecord) -> bool:
    """Whether another request may take its key: it was refused, or its answer cannot be told again."""
    now_s = time.time()
    return record.is_void or (now_s > record.deadline_s and now_s > record.created + LOG_AGE_S)
