"""The project's one NATS connection: `Bus` on a real server, reconnecting for ever, losses counted."""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from urllib.parse import unquote, urlsplit, urlunsplit

from nats import errors
from nats.aio.subscription import Subscription as NatsSubscription

from pagebus.bus import guard
from pagebus.bus.nats_client import ClosedForGoodError, GuardedClient, frame
from pagebus.bus.nats_inbox import Inbox
from pagebus.bus.nats_jetstream import JetStream
from pagebus.bus.nats_kv import NatsKeyValue
from pagebus.bus.nats_log import NatsLog
from pagebus.bus.protocol import Handler, Msg, NotConnectedError, NotPermittedError

_log = logging.getLogger(__name__)

_PING_INTERVAL_S = 0.8  # a peer that says nothing is given up after 1.6 to 2.4 s
_MAX_OUTSTANDING_PINGS = 2
_FLUSH_TIMEOUT_S = 2
_SETTLE_S = 0.1
_UNSUBSCRIBE_TIMEOUT_S = 1


class _NatsSubscription:
    """A live subscription of a `NatsBus`."""

    def __init__(self, client: GuardedClient, subscription: NatsSubscription) -> None:
        self._client = client
        self._subscription = subscription

    async def unsubscribe(self) -> None:
        """Stop it, once what the server had sent already was handled: of a queue group nothing is lost."""
        try:
            await self._subscription.unsubscribe()
            if self._client.is_connected:
                await self._client.round_trip(_UNSUBSCRIBE_TIMEOUT_S)
        except errors.Error:  # closed, or no answer: nothing is left to stop
            pass
        finally:
            self._client.forget(self._subscription)


class NatsBus:
    """One connection to NATS. `counters` tells what was received, dropped, poisoned, refused and reconnected.

    Made by `NatsBus.connect`. Handlers run inside the read loop: they return at once.
    """

    def __init__(self, name: str, inbox_prefix: str, on_closed: Callable[[], None] | None) -> None:
        self.name = name
        self.counters: Counter[str] = Counter()
        self._client = GuardedClient(self.counters, self._on_cluster_change)
        self._inbox_prefix = inbox_prefix
        self._inbox = Inbox(self, inbox_prefix)
        self._jetstream = JetStream(self._inbox)
        self._callbacks: list[Callable[[], Awaitable[None]]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._on_closed = on_closed or _exit_process
        self._is_closing = False
        self._has_connected = False
        self._settling: asyncio.TimerHandle | None = None
        self._has_told = False
        self._where = ""
        self._buckets: dict[str, NatsKeyValue] = {}
        self._logs: dict[str, NatsLog] = {}

    @classmethod
    async def connect(
        cls,
        url: str | Sequence[str],
        *,
        name: str,
        inbox_prefix: str | None = None,
        timeout_s: float | None = None,
        on_closed: Callable[[], None] | None = None,
    ) -> "NatsBus":
        """Connect to `nats://user:password@host:port`, waiting until a server answers.

        Several servers of a cluster are named in a sequence, or in one text with commas; any of them will do.
        Only the named ones are used, but where it is one, others that it tells of are too. `inbox_prefix` is
        where answers to requests arrive: by default `_INBOX_<user>`, `_INBOX` without a user. `on_closed` is
        called when the connection is closed for good; by default the process exits with 1. Raises
        `NotPermittedError` for a refused user, `NotConnectedError` after `timeout_s` (None: waits for ever),
        `ValueError` for what is no URL, and for several users.
        """
        addresses = [_Address(one) for one in split_urls(url)]
        user = addresses[0].user
        if any(address.user != user for address in addresses):
            raise ValueError("all URLs of a bus name the same user; passwords may differ")
        prefix = inbox_prefix or (f"_INBOX_{user}" if user else "_INBOX")
        guard.check_publish(prefix)
        bus = cls(name, prefix, on_closed)
        try:
            await asyncio.wait_for(bus._connect(addresses), timeout_s)
        except ClosedForGoodError as error:
            raise NotPermittedError(str(error)) from None
        except TimeoutError:
            raise NotConnectedError(f"no bus answered at {bus._where} within {timeout_s} s") from None
        return bus

    async def _connect(self, addresses: "Sequence[_Address]") -> None:
        self._where = ", ".join(address.shown for address in addresses)
        self._client.uses_discovered = len(addresses) == 1
        passwords = {urlsplit(address.shown).netloc: address.password for address in addresses}
        user = addresses[0].user

        def password() -> str:
            """The current server's; a discovered one has the first one's."""
            server = self._client._current_server
            return passwords.get(server.uri.netloc if server else "", addresses[0].password)

        await self._client.connect(
            servers=[address.shown for address in random.sample(addresses, len(addresses))],
            user=(lambda: user) if user else None,
            password=password if user else None,
            dont_randomize=True,  # done here, so that a server that was lost is tried last
            name=self.name,
            inbox_prefix=self._inbox_prefix,
            ping_interval=_PING_INTERVAL_S,  # type: ignore[arg-type]  # as below
            max_outstanding_pings=_MAX_OUTSTANDING_PINGS,
            max_reconnect_attempts=-1,
            reconnect_time_wait=0.1,  # type: ignore[arg-type]  # said to be an int, only ever slept
            pending_size=0,
            error_cb=self._failed,
            closed_cb=self._closed,
            disconnected_cb=self._disconnected,
            reconnected_cb=self._reconnected,
        )
        self._has_connected = True
        self._client.start_watch()

    @property
    def is_connected(self) -> bool:
        """Whether a publish would be sent now."""
        return self._client.is_connected

    @property
    def max_payload(self) -> int:
        """Largest payload including headers, in bytes; the server's own limit."""
        return self._client.max_payload

    async def publish(
        self, subject: str, data: bytes, *, reply: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        """Send once; never buffers while disconnected.

        Raises `NotConnectedError`, `PayloadTooLargeError`, `InvalidMessageError`.
        """
        await self._client.publish_frame(self._frame(subject, data, reply, headers))

    def publish_now(
        self, subject: str, data: bytes, *, reply: str = "", headers: Mapping[str, str] | None = None
    ) -> bool:
        """As `publish`, before this returns; False, and nothing sent, where the server is far behind."""
        if self._client.is_behind:
            return False
        self._client.send_frame(self._frame(subject, data, reply, headers))
        return True

    def _frame(self, subject: str, data: bytes, reply: str, headers: Mapping[str, str] | None) -> bytes:
        """A checked message as it is sent."""
        guard.check_publish(subject)
        if reply:
            guard.check_publish(reply)
        guard.check_size(guard.headers_size(headers) + len(data), self._client.max_payload)
        self.counters["published"] += 1
        return frame(subject, data, reply, headers)

    async def request(self, subject: str, data: bytes, *, timeout_s: float) -> Msg:
        """Send and wait for one answer.

        Raises `NoRespondersError`, `RequestTimeoutError`, `NotConnectedError`.
        """
        return await self._inbox.request(subject, data, timeout_s=timeout_s)

    async def subscribe(self, subject: str, handler: Handler, *, queue: str = "") -> _NatsSubscription:
        """Deliver messages on `subject` (may hold `*`, `>`) to `handler`; each to one of a `queue` group.

        On return the server knows it, if it is connected. Raises `NotPermittedError`, `NotConnectedError`
        when the connection is closed for good.
        """
        guard.check_subscribe(subject)
        try:
            subscription = await self._client.subscribe_direct(subject, queue, handler)
        except errors.Error as error:
            raise NotConnectedError(f"cannot subscribe to {subject}: {error}") from error
        if self.is_connected:
            try:
                await self._client.round_trip(_FLUSH_TIMEOUT_S)
            except errors.Error:
                self.counters["flush_timeouts"] += 1
        result = _NatsSubscription(self._client, subscription)
        if subject.lower() in self._client.denied_subscriptions:
            self._client.denied_subscriptions.discard(subject.lower())
            await result.unsubscribe()
            raise NotPermittedError(f"this user may not subscribe to {subject}")
        return result

    async def key_value(self, bucket: str, *, max_age_s: float | None = None) -> NatsKeyValue:
        """The bucket, made if absent; its values go after `max_age_s`, None: never.

        One that exists keeps the age that it was made with. Raises `BusError` when JetStream does not answer.
        """
        if bucket not in self._buckets:
            guard.check_publish(bucket)
            self._buckets[bucket] = await NatsKeyValue.open(self._jetstream, bucket, max_age_s)
        return self._buckets[bucket]

    async def message_log(
        self, name: str, subjects: Sequence[str], *, max_age_s: float, max_bytes: int
    ) -> NatsLog:
        """The log `name` of `subjects` (may hold `*`, `>`), made if absent; it forgets the oldest first.

        One that exists keeps what it was made with. Raises `BusError` when JetStream does not answer.
        """
        if name not in self._logs:
            guard.check_publish(name)
            for subject in subjects:
                guard.check_subscribe(subject)
            log = NatsLog(self._jetstream, self.counters, name, subjects, max_age_s, max_bytes)
            await log.make()
            self._logs[name] = log
        return self._logs[name]

    def on_reconnect(self, callback: Callable[[], Awaitable[None]]) -> None:
        """Run `callback` after every reconnect, and when servers of a cluster came or went: messages may have
        been lost."""
        self._callbacks.append(callback)

    async def close(self) -> None:
        """Send what is pending and close."""
        if self._is_closing:
            return
        self._is_closing = True
        self._client.stop_watch()
        self._jetstream.close()
        if self.is_connected:
            try:
                await self._client.round_trip(_FLUSH_TIMEOUT_S)
            except errors.Error:
                self.counters["flush_timeouts"] += 1
        if self._settling is not None:
            self._settling.cancel()
        for task in list(self._tasks):
            task.cancel()
        self._inbox.fail()
        try:
            await asyncio.wait_for(self._client.close(), _FLUSH_TIMEOUT_S)
        except TimeoutError:  # a path that is cut takes no farewell
            self._client.abort()

    async def _failed(self, error: Exception) -> None:
        """nats-py's error callback: counts; before the first connection it says once what it waits for."""
        self.counters["dropped" if isinstance(error, errors.SlowConsumerError) else "errors"] += 1
        if self._has_connected:
            return
        if "authorization" in str(error).lower():
            raise ClosedForGoodError(f"the bus at {self._where} refuses this user or its password")
        if not self._has_told:
            self._has_told = True
            _log.warning("waiting for the bus at %s (%s)", self._where, error or type(error).__name__)

    async def _disconnected(self) -> None:
        if not self._is_closing:
            self.counters["disconnects"] += 1
            _log.warning("%s lost the bus", self.name)
        self._inbox.fail()

    async def _reconnected(self) -> None:
        self.counters["reconnects"] += 1
        _log.info("%s is back on the bus", self.name)
        self._tell()

    def _on_cluster_change(self) -> None:
        """Servers came or went, or were cut off: what went through them may be lost, though this connection
        stands. Changes come in groups, and are told once."""
        self.counters["cluster_changes"] += 1
        if self._settling is None and not self._is_closing:
            self._settling = asyncio.get_running_loop().call_later(_SETTLE_S, self._settled)

    def _settled(self) -> None:
        self._settling = None
        if self.is_connected:
            _log.info("%s: the bus's servers changed", self.name)
            self._tell()

    def _tell(self) -> None:
        for callback in self._callbacks:
            task = asyncio.get_running_loop().create_task(self._run(callback))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _run(self, callback: Callable[[], Awaitable[None]]) -> None:
        try:
            await callback()
        except Exception:
            self.counters["callback_errors"] += 1
            _log.exception("a reconnect callback failed")

    async def _closed(self) -> None:
        if not self._is_closing:
            _log.error("%s: the bus connection is closed for good", self.name)
            self._on_closed()


def split_urls(url: str | Sequence[str]) -> list[str]:
    """One URL a server; raises `ValueError` when there is none."""
    urls = [one.strip() for one in (url.split(",") if isinstance(url, str) else url)]
    urls = [one for one in urls if one]
    if not urls:
        raise ValueError("no NATS URL")
    return urls


class _Address:
    """A NATS URL: what to connect to, as whom, and what may be shown of it."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url if "://" in url else f"nats://{url}")
        if parts.scheme not in ("nats", "tls") or not parts.hostname:
            raise ValueError(f"not a NATS URL: {parts.scheme}://{parts.hostname or ''}")
        self.user = unquote(parts.username or "")
        self.password = unquote(parts.password or "")
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        self.shown = urlunsplit((parts.scheme, f"{host}:{parts.port or 4222}", "", "", ""))


def _exit_process() -> None:
    """End the process with 1: without a bus there is nothing it could do. Whoever watches it restarts it."""
    asyncio.get_running_loop().call_soon(_raise_exit)


def _raise_exit() -> None:
    raise SystemExit(1)
