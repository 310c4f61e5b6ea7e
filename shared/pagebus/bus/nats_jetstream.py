"""JetStream's API as far as buckets and logs need it: streams made, found again, and copied to three servers.

Requests go through the bus's own inbox, so that every wait is bounded and every error a `BusError`.
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import Mapping

import msgspec

from pagebus.bus.nats_inbox import Inbox
from pagebus.bus.protocol import BusError, NoRespondersError, RequestTimeoutError

_log = logging.getLogger(__name__)

TIMEOUT_S = 2.0
"""How long one operation waits for JetStream's answer."""

REPLICAS = 3
"""Copies of a stream in a cluster."""

STREAM_NOT_FOUND = 10059
NO_MESSAGE = 10037
WRONG_LAST_SEQUENCE = (10071, 10164)
_NAME_IN_USE = 10058
_NOT_CLUSTERED = 10074
_REPLICA_WAIT_S = (1.0, 30.0)


class Failure(msgspec.Struct, frozen=True):
    """Why JetStream refuses."""

    code: int = 0
    err_code: int = 0
    description: str = ""


class State(msgspec.Struct, frozen=True):
    """What a stream holds now."""

    messages: int = 0
    last_seq: int = 0


class StoredMessage(msgspec.Struct, frozen=True):
    """A message as the stream's leader gives it (base64 on the wire)."""

    seq: int = 0
    data: bytes = b""


class Answer(msgspec.Struct, frozen=True):
    """The fields of JetStream's answers that are read here, each empty in answers of other kinds."""

    error: Failure | None = None
    config: dict[str, object] = {}
    state: State = State()
    cluster: dict[str, object] | None = None
    message: StoredMessage | None = None
    seq: int = 0


class JetStreamError(BusError):
    """JetStream refused an operation. `code` is its own error code."""

    def __init__(self, what: str, failure: Failure) -> None:
        super().__init__(f"JetStream refuses {what}: {failure.description} ({failure.err_code})")
        self.code = failure.err_code


class JetStream:
    """The API, asked through one connection's inbox."""

    def __init__(self, inbox: Inbox) -> None:
        self.inbox = inbox
        self._short: dict[str, asyncio.Task[None]] = {}  # streams that have too few copies

    async def call(self, subject: str, question: Mapping[str, object] | None = None) -> Answer:
        """Ask `$JS.API.<subject>`; raises `JetStreamError` and the other `BusError`s."""
        data = msgspec.json.encode(question) if question else b""
        return await self.ask(f"$JS.API.{subject}", data)

    async def ask(self, subject: str, data: bytes, headers: Mapping[str, str] | None = None) -> Answer:
        """Publish to a subject that JetStream answers on; raises as `call` does."""
        try:
            message = await self.inbox.request(subject, data, timeout_s=TIMEOUT_S, headers=headers)
        except RequestTimeoutError:
            raise RequestTimeoutError(f"JetStream did not answer on {subject} within {TIMEOUT_S} s") from None
        try:
            answer = msgspec.json.decode(message.data, type=Answer)
        except msgspec.MsgspecError as error:
            raise BusError(f"JetStream answers nonsense on {subject}: {error}") from error
        if answer.error is not None:
            raise JetStreamError(subject, answer.error)
        return answer

    async def open(self, config: Mapping[str, object]) -> Answer:
        """The stream of that name, made if absent; what it is now. One that exists stays as it is."""
        name = str(config["name"])
        answer = await self._found(name) or await self._made(name, config)
        if _num_copies(answer) < REPLICAS and answer.cluster is not None:
            self._copy_later(name)
        return answer

    async def last_sequence(self, name: str) -> int:
        """The newest message's sequence, as the stream's leader knows it."""
        return (await self.call(f"STREAM.INFO.{name}")).state.last_seq

    def close(self) -> None:
        """Stop caring for copies."""
        for task in self._short.values():
            task.cancel()

    async def _found(self, name: str) -> Answer | None:
        try:
            return await self.call(f"STREAM.INFO.{name}")
        except NoRespondersError as error:
            raise BusError("this bus has no JetStream") from error
        except JetStreamError as error:
            if error.code != STREAM_NOT_FOUND:
                raise
            return None

    async def _made(self, name: str, config: Mapping[str, object]) -> Answer:
        """With three copies, or with one: on a server alone, or where three servers cannot be had now."""
        try:
            return await self._create(name, config, REPLICAS)
        except JetStreamError as error:
            if error.code != _NOT_CLUSTERED:
                _log.warning("%s begins with one copy: %s", name, error)
        return await self._create(name, config, 1)

    async def _create(self, name: str, config: Mapping[str, object], num_replicas: int) -> Answer:
        try:
            return await self.call(f"STREAM.CREATE.{name}", {**config, "num_replicas": num_replicas})
        except JetStreamError as error:
            if error.code != _NAME_IN_USE:
                raise
        return await self.call(f"STREAM.INFO.{name}")  # somebody else was faster

    # Copies

    def _copy_later(self, name: str) -> None:
        if name not in self._short:
            task = asyncio.get_running_loop().create_task(self._copy(name), name=f"copies of {name}")
            self._short[name] = task
            task.add_done_callback(lambda _: self._short.pop(name, None))

    async def _copy(self, name: str) -> None:
        """Ask for three copies until there are that many: a server that was down may have come up."""
        wait_s, longest_s = _REPLICA_WAIT_S
        while True:
            await asyncio.sleep(wait_s * random.uniform(0.5, 1.5))  # noqa: S311
            wait_s = min(2 * wait_s, longest_s)
            with contextlib.suppress(BusError):
                info = await self.call(f"STREAM.INFO.{name}")
                if info.cluster is None or _num_copies(info) >= REPLICAS:
                    return
                await self.call(f"STREAM.UPDATE.{name}", {**info.config, "num_replicas": REPLICAS})
                _log.info("%s has %d copies now", name, REPLICAS)
                return


def _num_copies(answer: Answer) -> int:
    number = answer.config.get("num_replicas", 1)
    return number if isinstance(number, int) else 1
