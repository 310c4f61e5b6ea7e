"""Reserves the gateways' port before anything starts, so that a port in use is one clear line."""

import errno
import os
import socket

from pagebus.cli.errors import CommandError

Address = tuple[str | int, ...]
"""Host and port, for IPv6 then flow and scope, as `bind` takes it."""


class ReservedPort:
    """A bound socket that never listens: gateways of this user share its port, nobody else gets it.

    While no gateway listens, connections to it are refused.
    """

    def __init__(self, host: str, port: int) -> None:
        """Port 0 takes a free one. Raises `CommandError` when the address cannot be had."""
        family, address = _resolve(host, port)
        # Without SO_REUSEPORT a bind fails also where somebody else shares the port; with it, it would not.
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            _bind(probe, address, host)
            address = probe.getsockname()
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        _bind(self._socket, address, host)
        self.port = int(address[1])
        self.host = _reachable(host, family)

    @property
    def url(self) -> str:
        """The address for clients on this machine."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    def close(self) -> None:
        """Give the port up."""
        self._socket.close()


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, Address]:
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a host name"
        raise CommandError(f"--host: {host!r} is no address of this machine: {reason}") from None
    family, _, _, _, (name, number, *scope) = found[0]
    return family, (str(name), int(number), *(int(part) for part in scope))


def _bind(bound: socket.socket, address: Address, host: str) -> None:
    try:
        bound.bind(address)
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
