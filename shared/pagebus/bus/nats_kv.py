"""Key-value buckets of JetStream behind `KeyValue`: bounded waits, and no error but `BusError`."""

import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

from nats import errors
from nats.js import JetStreamContext
from nats.js import errors as js_errors
from nats.js.api import KeyValueConfig
from nats.js.kv import KeyValue as JetStreamKeyValue

from pagebus.bus.nats_client import GuardedClient
from pagebus.bus.protocol import BusError, Entry, NotConnectedError, RequestTimeoutError, WrongRevisionError

T = TypeVar("T")

TIMEOUT_S = 2.0
"""How long one operation waits for JetStream's answer."""

_NO_BUCKET = (js_errors.NoStreamResponseError, js_errors.ServiceUnavailableError, errors.NoRespondersError)

_BUCKET_EXISTS = 10058  # "stream name already in use", here: with another configuration


class NatsKeyValue:
    """One bucket, made again where the server lost it. Every operation answers or raises `BusError`."""

    def __init__(self, jetstream: JetStreamContext, name: str, bucket: JetStreamKeyValue) -> None:
        self._jetstream = jetstream
        self._name = name
        self._bucket = bucket

    @classmethod
    async def open(cls, client: GuardedClient, name: str) -> "NatsKeyValue":
        """The bucket, made if absent (history 1, one replica, kept in the server's store)."""
        jetstream = client.jetstream(timeout=TIMEOUT_S)
        with _mapped(f"bucket {name}"):
            return cls(jetstream, name, await _open(jetstream, name))

    async def get(self, key: str) -> Entry | None:
        """The newest value, or None."""

        async def read(bucket: JetStreamKeyValue) -> Entry | None:
            try:
                entry = await bucket.get(key)
            except js_errors.KeyNotFoundError:
                return None
            return Entry(entry.value or b"", entry.revision or 0)

        return await self._run(key, read)

    async def create(self, key: str, value: bytes) -> int:
        """Write a key that does not exist. Raises `WrongRevisionError` if it exists."""
        return await self._run(key, lambda bucket: bucket.create(key, value))

    async def update(self, key: str, value: bytes, revision: int) -> int:
        """Replace the value of exactly `revision`. Raises `WrongRevisionError`."""
        return await self._run(key, lambda bucket: bucket.update(key, value, last=revision))

    async def put(self, key: str, value: bytes) -> int:
        """Write without comparing; the new revision."""
        return await self._run(key, lambda bucket: bucket.put(key, value))

    async def _run(self, key: str, operation: Callable[[JetStreamKeyValue], Awaitable[T]]) -> T:
        with _mapped(key):
            try:
                return await operation(self._bucket)
            except _NO_BUCKET:
                # A server that came back with an empty store has no bucket: nobody answers for it.
                self._bucket = await _open(self._jetstream, self._name)
                return await operation(self._bucket)


async def _open(jetstream: JetStreamContext, bucket: str) -> JetStreamKeyValue:
    try:
        return await jetstream.key_value(bucket)
    except js_errors.NotFoundError:
        pass
    try:
        return await jetstream.create_key_value(KeyValueConfig(bucket=bucket, history=1, replicas=1))
    except js_errors.BadRequestError as error:
        if error.err_code != _BUCKET_EXISTS:
            raise
        return await jetstream.key_value(bucket)  # somebody else was faster


@contextlib.contextmanager
def _mapped(what: str) -> Iterator[None]:
    """nats-py's errors as `BusError`s."""
    try:
        yield
    except js_errors.KeyWrongLastSequenceError as error:
        raise WrongRevisionError(f"{what} is at another revision") from error
    except (errors.OutboundBufferLimitError, errors.ConnectionClosedError) as error:
        raise NotConnectedError("the bus is not connected") from error
    except (errors.TimeoutError, TimeoutError) as error:
        raise RequestTimeoutError(f"JetStream did not answer about {what} within {TIMEOUT_S} s") from error
    except (errors.Error, OSError, ValueError, KeyError) as error:
        raise BusError(f"JetStream failed on {what}: {type(error).__name__}: {error}") from error
