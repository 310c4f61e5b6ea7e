"""The listening socket that all gateways of a launcher share, and how a gateway finds it.

Opened before anything starts, so that a port in use is one clear line. Connections wait in the kernel while
gateways come and go: none is refused.
"""

import errno
import os
import socket
from collections.abc import Mapping

from pagebus.cli.errors import CommandError, ExitCode

Address = tuple[str | int, ...]
"""Host and port, for IPv6 then flow and scope, as `bind` takes it."""

LISTEN_VARIABLE = "PAGEBUS_LISTEN_FD"
_BACKLOG = 2048
_FIRST_SYSTEMD_FD = 3


class SharedListener:
    """A listening socket that processes of ours inherit; the launcher itself accepts nothing."""

    def __init__(self, host: str, port: int) -> None:
        """Port 0 takes a free one. Raises `CommandError` when the address cannot be had."""
        family, address = _resolve(host, port)
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            _listen(self._socket, address, host)
        except CommandError:
            self._socket.close()
            raise
        self.port = int(self._socket.getsockname()[1])
        self.host = _reachable(host, family)

    @property
    def fd(self) -> int:
        """What a gateway inherits; -1 after `close`."""
        return self._socket.fileno()

    @property
    def url(self) -> str:
        """The address for clients on this machine."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    def close(self) -> None:
        """Give the port up: once no gateway listens either, connections are refused."""
        self._socket.close()


def inherited_listener(environ: Mapping[str, str] = os.environ) -> socket.socket | None:
    """The listening socket that a launcher, or systemd, has handed to this process; None: there is none.

    Raises `CommandError` for a number that names no listening TCP socket.
    """
    text = environ.get(LISTEN_VARIABLE, "")
    variable = LISTEN_VARIABLE
    if not text and environ.get("LISTEN_PID") == str(os.getpid()):
        if environ.get("LISTEN_FDS") != "1":
            raise CommandError("LISTEN_FDS: a gateway listens on one socket", ExitCode.USAGE)
        text, variable = str(_FIRST_SYSTEMD_FD), "LISTEN_FDS"
    if not text:
        return None
    try:
        found = socket.socket(fileno=int(text))
        is_listening = bool(found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
        is_tcp = found.family in (socket.AF_INET, socket.AF_INET6)
    except (OSError, ValueError, OverflowError):
        is_listening = is_tcp = False
    if not is_listening or not is_tcp:
        raise CommandError(f"{variable}: {text!r} is no listening TCP socket", ExitCode.USAGE)
    found.set_inheritable(False)
    found.setblocking(False)
    return found


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, Address]:
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a host name"
        raise CommandError(f"--host: {host!r} is no address of this machine: {reason}") from None
    family, _, _, _, (name, number, *scope) = found[0]
    return family, (str(name), int(number), *(int(part) for part in scope))


def _listen(listener: socket.socket, address: Address, host: str) -> None:
    try:
        listener.bind(address)
        listener.listen(_BACKLOG)  # two may bind with SO_REUSEADDR; only one of them may listen
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise CommandError(
                f"--port: {address[1]} on {host} is in use by another program; choose another port"
            ) from None
        reason = os.strerror(error.errno or 0)
        raise CommandError(f"--host, --port: cannot listen on {host}, port {address[1]}: {reason}") from None


def _reachable(host: str, family: socket.AddressFamily) -> str:
    """Where a client on this machine finds a server that listens on `host`."""
    if host in ("", "0.0.0.0", "::", "*"):  # noqa: S104 - compared, not bound
        return "::1" if family == socket.AF_INET6 else "127.0.0.1"
    return host
