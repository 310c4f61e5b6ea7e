"""Messages are taken out of a server's bytes wherever these are cut; all other lines go on unchanged."""

import asyncio
import random

import pytest

from pagebus.bus.nats_frames import FrameProtocol

Taken = tuple[int, bytes, bytes, bytes, bytes]


class Inner(asyncio.Protocol):
    def __init__(self) -> None:
        self.data = b""
        self.ended: list[object] = []

    def data_received(self, data: bytes) -> None:
        self.data += data

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.append(exc)


class Connection(asyncio.WriteTransport):
    is_aborted = False

    def abort(self) -> None:
        self.is_aborted = True


def made() -> tuple[FrameProtocol, Inner, Connection, list[Taken]]:
    inner, connection, taken = Inner(), Connection(), []
    frames = FrameProtocol(inner, connection, lambda *message: taken.append(message))
    return frames, inner, connection, taken


STREAM = (
    b"PING\r\n"
    b"MSG pagebus.a 1 5\r\nhello\r\n"
    b"MSG pagebus.b 22 pagebus.reply 0\r\n\r\n"
    b"+OK\r\n"
    b'INFO {"a": "MSG x 1 3"}\r\n'
    b"HMSG pagebus.c 3 25 28\r\nNATS/1.0\r\nname: value\r\n\r\nabc\r\n"
    b"HMSG pagebus.d 4 _INBOX.7 16 16\r\nNATS/1.0 503\r\n\r\n\r\n"
    b"MSG pagebus.\xff 5 20\r\nMSG a 1 5\r\nPING\r\n\r\n.\r\n"
    b"-ERR 'something'\r\n"
    b"PONG\r\n"
)
MESSAGES = [
    (1, b"pagebus.a", b"", b"hello", b""),
    (22, b"pagebus.b", b"pagebus.reply", b"", b""),
    (3, b"pagebus.c", b"", b"abc", b"NATS/1.0\r\nname: value\r\n\r\n"),
    (4, b"pagebus.d", b"_INBOX.7", b"", b"NATS/1.0 503\r\n\r\n"),
    (5, b"pagebus.\xff", b"", b"MSG a 1 5\r\nPING\r\n\r\n.", b""),
]
LINES = b"PING\r\n+OK\r\n" + b'INFO {"a": "MSG x 1 3"}\r\n' + b"-ERR 'something'\r\nPONG\r\n"


@pytest.mark.parametrize("seed", range(40))
def test_wherever_the_bytes_are_cut(seed: int):
    rng = random.Random(seed)
    frames, inner, connection, taken = made()
    at = 0
    while at < len(STREAM):
        size = rng.choice((1, 2, 3, 7, 40, 1000)) if seed else len(STREAM)
        frames.data_received(STREAM[at : at + size])
        at += size
    assert taken == MESSAGES
    assert inner.data == LINES
    assert not connection.is_aborted


def test_a_large_message_in_many_parts():
    frames, _, _, taken = made()
    body = random.Random(1).randbytes(3 << 20)
    stream = b"MSG s 1 %d\r\n%b\r\nMSG s 1 1\r\nx\r\n" % (len(body), body)
    for at in range(0, len(stream), 65536):
        frames.data_received(stream[at : at + 65536])
    assert [message[3] for message in taken] == [body, b"x"]


@pytest.mark.parametrize(
    "line",
    [
        b"MSG a 1\r\n",
        b"MSG a 1 x\r\n",
        b"MSG a 1 -5\r\n",
        b"MESSAGE a 1 0\r\n\r\n",
        b"M" * 9000,
        b"HMSG a 1 2\r\n",
    ],
)
def test_what_is_no_frame_drops_the_connection(line: bytes):
    frames, _, connection, taken = made()
    frames.data_received(line + b"\r\n")
    assert connection.is_aborted
    assert not taken


def test_the_end_is_the_connections_own_business():
    frames, inner, _, _ = made()
    frames.connection_lost(None)
    assert inner.ended == [None]
