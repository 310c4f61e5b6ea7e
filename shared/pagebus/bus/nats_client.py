"""nats-py's client with its traps closed, direct dispatch to handlers, and two writes a turn of the loop at
most.

Owns the connection's internals only; `NatsBus` beside it is what the project uses. The traps that are guarded
here are listed in README.md of this folder, each with its test.
"""

import asyncio
import contextlib
import logging
import random
from collections import Counter
from collections.abc import Callable, Mapping

from nats import errors
from nats.aio.client import Client, Srv
from nats.aio.subscription import Subscription as NatsSubscription
from nats.aio.transport import TcpTransport

from pagebus.bus.nats_frames import FrameProtocol
from pagebus.bus.protocol import Handler, Msg, NotConnectedError

_log = logging.getLogger(__name__)

MAX_UNSENT_BYTES = 16 << 20
"""What may wait in the socket's buffer before publishers have to wait."""

_UNSENT_TIMEOUT_S = 2.0
_RECONNECT_WAIT_S = (0.05, 0.3)
_CONNECT_TIMEOUT_S = (1.0, 8.0)  # the first, doubled at each failure with the same server, and the longest
_LEAVE_WAIT_S = (0.0, 1.0)
_WATCH_INTERVAL_S = 0.2
_PERMISSIONS = "permissions violation"
_DENIED_SUBSCRIPTION = 'subscription to "'


class ClosedForGoodError(Exception):
    """The server refuses this user; trying again would not help."""


class GuardedClient(Client):
    """nats-py's client; messages of direct subscriptions go from the read loop straight to their handlers."""

    def __init__(self, counters: Counter[str], on_cluster_change: Callable[[], None]) -> None:
        """`on_cluster_change` is called when the server says that others came or went."""
        super().__init__()
        self.counters = counters
        self.uses_discovered = False
        """Whether servers that the first one tells of are connected to as well."""
        self._on_cluster_change = on_cluster_change
        self._others: frozenset[str] = frozenset()
        self.denied_subscriptions: set[str] = set()
        self._direct: dict[int, Handler] = {}
        self._watch_task: asyncio.Task[None] | None = None
        self._leaving: asyncio.Task[None] | None = None
        self._is_flush_due = False

    # Sending

    async def publish_frame(self, frame: bytes) -> None:
        """Send one whole protocol frame (PUB or HPUB), waiting where the socket is far behind; raises
        `NotConnectedError`."""
        self.send_frame(frame)
        if self.is_behind:
            await self._wait_until_sent()

    def send_frame(self, frame: bytes) -> None:
        """Send one whole protocol frame now; raises `NotConnectedError`.

        A turn's first frame leaves at once, all others of it together at its end; after what was queued
        before them.
        """
        if not self.is_connected or self._transport is None:
            raise NotConnectedError("the bus is not connected")
        if self._is_flush_due or self._pending:
            self._pending.append(frame)
            self._pending_data_size += len(frame)
        else:
            self._write(frame)
        if not self._is_flush_due:
            self._is_flush_due = True
            asyncio.get_running_loop().call_soon(self._write_pending)

    @property
    def is_behind(self) -> bool:
        """Whether so much is unsent that nothing more should be sent before some of it is."""
        return self._pending_data_size + self._num_unsent_bytes() > MAX_UNSENT_BYTES

    async def round_trip(self, timeout_s: int) -> None:
        """Wait until the server has taken all that was sent; raises nats-py's `errors.Error`."""
        self._write_pending()  # `flush` writes its PING past what waits
        try:
            await self.flush(timeout=timeout_s)
        except RuntimeError as error:  # as in `_write`
            raise errors.StaleConnectionError from error

    def _write_pending(self) -> None:
        self._is_flush_due = False
        if not self._pending or not self.is_connected or self._transport is None:
            return
        frames, self._pending, self._pending_data_size = self._pending, [], 0
        with contextlib.suppress(NotConnectedError):  # lost with the connection
            self._write(frames[0] if len(frames) == 1 else b"".join(frames))

    def _write(self, data: bytes) -> None:
        """Raises `NotConnectedError` where the socket is closed already and the read loop is about to hear of
        it: uvloop's own error for that is a `RuntimeError`."""
        if self._transport is None:
            raise NotConnectedError("the bus is not connected")
        try:
            self._transport.write(data)
        except RuntimeError as error:
            raise NotConnectedError("the bus is not connected any more") from error

    def _num_unsent_bytes(self) -> int:
        if not isinstance(self._transport, TcpTransport) or self._transport._io_writer is None:
            return 0
        return self._transport._io_writer.transport.get_write_buffer_size()

    async def _wait_until_sent(self) -> None:
        self._write_pending()
        if not isinstance(self._transport, TcpTransport) or self._transport._io_writer is None:
            return
        try:
            await asyncio.wait_for(self._transport._io_writer.drain(), _UNSENT_TIMEOUT_S)
        except (TimeoutError, OSError) as error:
            self.counters["send_timeouts"] += 1
            raise NotConnectedError("the bus takes no data") from error

    # Receiving

    async def subscribe_direct(self, subject: str, queue: str, handler: Handler) -> NatsSubscription:
        """Subscribe; `handler` is called from the read loop, in order, never queued and so never dropped."""
        sid = self._sid + 1  # what `subscribe` takes before it first yields
        self._direct[sid] = handler
        try:
            return await self.subscribe(subject, queue=queue, cb=_never)
        except BaseException:
            self._direct.pop(sid, None)
            raise

    def forget(self, subscription: NatsSubscription) -> None:
        """Call the subscription's handler no more."""
        self._direct.pop(subscription._id, None)

    async def _read_loop(self) -> None:
        self._take_frames_directly()
        await super()._read_loop()

    def _take_frames_directly(self) -> None:
        """From now on messages do not pass nats-py's reader, whose loop has just begun; nor do they wait for
        the end of a turn to be written."""
        transport = self._transport
        if not isinstance(transport, TcpTransport) or transport._io_writer is None:
            return
        connection = transport._io_writer.transport
        connection.set_write_buffer_limits(high=0)  # else uvloop gathers until the end of a turn
        inner = connection.get_protocol()
        if not isinstance(inner, asyncio.Protocol) or transport._io_reader is None:
            return
        frames = FrameProtocol(inner, connection, self._take)
        connection.set_protocol(frames)
        come: bytearray = transport._io_reader._buffer  # type: ignore[attr-defined]  # before this task began
        data = bytes(come)
        come.clear()
        if data:
            frames.data_received(data)

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        self._take(sid, subject, reply, data, headers)

    def _take(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        """A message came."""
        handler = self._direct.get(sid)
        if handler is None:  # unsubscribed meanwhile
            return
        try:
            message = Msg(
                subject.decode("ascii"),
                data,
                reply.decode("ascii"),
                parse_headers(headers) if headers else _NO_HEADERS,
            )
        except ValueError:
            self.counters["poisoned"] += 1
            return
        self.counters["received"] += 1
        try:
            handler(message)
        except Exception:
            self.counters["handler_errors"] += 1
            _log.exception("a handler failed on %s", message.subject)

    async def _process_pong(self) -> None:
        self._pings_outstanding = 0
        self._pongs_received += 1
        if self._pongs:
            waiting = self._pongs.pop(0)
            if not waiting.done():  # a flush that timed out left a cancelled one
                waiting.set_result(True)

    async def _process_err(self, err_msg: str) -> None:
        """Count and log only: where the server hangs up, the read loop sees the end and reconnects."""
        if _PERMISSIONS in err_msg:
            self.counters["permission_errors"] += 1
            _, _, denied = err_msg.partition(_DENIED_SUBSCRIPTION)
            if denied:
                self.denied_subscriptions.add(denied.partition('"')[0])
        else:
            self.counters["server_errors"] += 1
        _log.warning("the bus says: %s", err_msg.strip("'")[:300])

    # Staying alive

    def start_watch(self) -> None:
        """Watch the client's own tasks from now on."""
        self._watch_task = asyncio.get_running_loop().create_task(self._watch(), name="bus-watch")

    def stop_watch(self) -> None:
        """End the watch, before closing on purpose."""
        for task in (self._watch_task, self._leaving):
            if task is not None:
                task.cancel()

    async def _watch(self) -> None:
        """Reconnect when the read loop, or the reconnection itself, has died of something unforeseen."""
        while not self.is_closed:
            await asyncio.sleep(_WATCH_INTERVAL_S)
            if self.is_connected:
                if self._reading_task is not None and self._reading_task.done():
                    self.counters["read_loop_deaths"] += 1
                    _log.warning("the bus's read loop ended; reconnecting")
                    await self.force_reconnect()
            elif not self.is_closed and (self._reconnection_task is None or self._reconnection_task.done()):
                self.counters["reconnection_deaths"] += 1
                self._status = Client.RECONNECTING
                self._reconnection_task = asyncio.get_running_loop().create_task(self._attempt_reconnect())

    async def _attempt_reconnect(self) -> None:
        # What was not sent is lost, as publishers are promised; subscriptions are replayed from their table.
        self._pending, self._pending_data_size = [], 0
        self.options["reconnect_time_wait"] = random.uniform(*_RECONNECT_WAIT_S)  # noqa: S311
        self._ps.reset()
        self.abort()
        for waiting in self._pongs:  # nats-py lets them wait for their whole time
            if not waiting.done():
                waiting.set_exception(errors.StaleConnectionError())
                waiting.exception()  # nobody waits for those of the regular pings
        self._pongs = []
        random.shuffle(self._server_pool)
        self._server_pool.sort(key=lambda server: server is self._current_server)  # the lost one last
        await super()._attempt_reconnect()

    def abort(self) -> None:
        """Drop the socket now. Closing would wait for ever where a path is cut and something is unsent."""
        if isinstance(self._transport, TcpTransport) and self._transport._io_writer is not None:
            self._transport._io_writer.transport.abort()

    async def _connect_to_server(self, s: Srv) -> None:
        self.abort()  # a socket whose handshake timed out would stay open
        shortest_s, longest_s = _CONNECT_TIMEOUT_S
        self.options["connect_timeout"] = min(shortest_s * 2 ** min(s.reconnects, 10), longest_s)
        await super()._connect_to_server(s)

    async def _process_info(self, info: dict[str, object], initial_connection: bool = False) -> None:
        """What the server says of itself and of the cluster, at first and whenever it changes."""
        urls = info.get("connect_urls")
        others = frozenset(map(str, urls)) if isinstance(urls, list) else frozenset()
        if not self.uses_discovered:
            info = {key: value for key, value in info.items() if key != "connect_urls"}
        await super()._process_info(info, initial_connection)
        has_changed, self._others = others != self._others, others
        if initial_connection:
            return
        if info.get("ldm") and len(self._server_pool) > 1:
            self.counters["lame_ducks"] += 1
            self._leaving = asyncio.get_running_loop().create_task(self._leave(), name="leave lame duck")
        elif has_changed:
            self._on_cluster_change()

    async def _leave(self) -> None:
        """Move to another server before this one ends; not all of its clients at once."""
        await asyncio.sleep(random.uniform(*_LEAVE_WAIT_S))  # noqa: S311
        self._write_pending()
        await self.force_reconnect()


_NO_HEADERS: dict[str, str] = {}


async def _never(message: object) -> None:
    """nats-py wants a callback; direct subscriptions never reach it."""


def parse_headers(block: bytes) -> dict[str, str]:
    """The headers of a message; an inline status becomes "Status" (and "Description").

    Raises `ValueError` for what is not ASCII in the status line or a name; values may be any UTF-8.
    """
    lines = block.split(b"\r\n")
    headers: dict[str, str] = {}
    _, _, status_line = lines[0].decode("ascii").partition(" ")
    if status_line:
        status, _, description = status_line.strip().partition(" ")
        headers["Status"] = status
        if description:
            headers["Description"] = description
    for line in lines[1:]:
        name, separator, value = line.partition(b":")
        if separator:
            headers[name.strip().decode("ascii")] = value.strip().decode("utf-8", "replace")
    return headers


def frame(subject: str, data: bytes, reply: str, headers: Mapping[str, str] | None) -> bytes:
    """One PUB or HPUB; `subject`, `reply` and `headers` were checked by `guard`."""
    target = f"{subject} {reply}" if reply else subject
    if not headers:
        return b"PUB %b %d\r\n%b\r\n" % (target.encode(), len(data), data)
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    block = f"NATS/1.0\r\n{lines}\r\n".encode()
    return b"HPUB %b %d %d\r\n%b%b\r\n" % (target.encode(), len(block), len(block) + len(data), block, data)
