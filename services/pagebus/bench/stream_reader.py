"""Reads many event streams at once with one epoll and no parser, so that it costs less than what it reads.

Commands come as JSON lines on stdin, answers go to stdout. Tokens are counted by the spaces in their text:
`token_source.py` makes words that begin with one.
"""

import gc
import os
import select
import socket
import sys
import time

import msgspec

from pagebus.bench.token_source import prompt_of

_HEAD_END = b"\r\n\r\n"
_RECEIVE = 1 << 16


class ReaderConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What to ask whom. Of every `sample_every`-th stream the time of each event is kept."""

    host: str
    port: int
    model: str
    num_streams: int
    max_tokens: int
    sample_every: int = 16


class Mark(msgspec.Struct, frozen=True, tag="mark"):
    """How much was read so far?"""


class Take(msgspec.Struct, frozen=True, tag="take"):
    """Give, and forget, the sampled events."""


class Nap(msgspec.Struct, frozen=True, tag="nap"):
    """From now on look so often, in seconds, instead of being woken by each arrival; 0: be woken.

    Waking a process that sleeps costs whoever sends to it more than the sending (an interrupt to another
    processor, 30 us on a virtual machine), which a client on another machine does not cost a server.
    """

    seconds: float


class Counts(msgspec.Struct, frozen=True):
    """What was read so far; streams that have begun, and that ended as they should."""

    num_bytes: int
    num_reads: int
    num_events: int
    num_tokens: int
    num_begun: int
    num_ended: int
    num_broken: int
    cpu_s: float


class Arrival(msgspec.Struct, frozen=True, array_like=True):
    """An event of a sampled stream: when it came (`time.monotonic`), and its stream's tokens by now."""

    stream: int
    at_s: float
    num_tokens: int


class Sampled(msgspec.Struct, frozen=True):
    """The answer to `Take`."""

    arrivals: list[Arrival]


class _Stream:
    """One connection."""

    __slots__ = ("has_head", "is_sampled", "num_tokens", "number", "sock", "tail")

    def __init__(self, number: int, sock: socket.socket, is_sampled: bool) -> None:
        self.number, self.sock, self.is_sampled = number, sock, is_sampled
        self.has_head = False
        self.num_tokens = 0
        self.tail = b""


class StreamReader:
    """All streams of the process."""

    def __init__(self, config: ReaderConfig) -> None:
        self._config = config
        self._poll = select.epoll()
        self._streams: dict[int, _Stream] = {}
        self._arrivals: list[Arrival] = []
        self._num_bytes = self._num_reads = self._num_events = self._num_tokens = 0
        self._nap_s = 0.0
        self._num_begun = self._num_ended = self._num_broken = 0

    def run(self) -> None:
        """Until stdin ends."""
        self._poll.register(sys.stdin.fileno(), select.EPOLLIN)
        for number in range(self._config.num_streams):
            self._open(number)
        decoder: msgspec.json.Decoder[Mark | Take | Nap] = msgspec.json.Decoder(Mark | Take | Nap)
        gc.collect()
        gc.freeze()
        while True:
            if self._nap_s:
                time.sleep(self._nap_s)
            for file, _ in self._poll.poll():
                if file in self._streams:
                    self._read(file)
                    continue
                line = sys.stdin.buffer.readline()
                if not line:
                    return
                self._answer(decoder.decode(line))

    def _answer(self, command: Mark | Take | Nap) -> None:
        answer: Counts | Sampled
        if isinstance(command, Nap):
            self._nap_s = command.seconds
        match command:
            case Mark() | Nap():
                answer = Counts(
                    self._num_bytes,
                    self._num_reads,
                    self._num_events,
                    self._num_tokens,
                    self._num_begun,
                    self._num_ended,
                    self._num_broken,
                    time.process_time(),
                )
            case Take():
                answer, self._arrivals = Sampled(self._arrivals), []
        print(msgspec.json.encode(answer).decode(), flush=True)

    def _open(self, number: int) -> None:
        config = self._config
        body = msgspec.json.encode(
            {
                "model": config.model,
                "prompt": prompt_of(number),
                "max_tokens": config.max_tokens,
                "ignore_eos": True,
                "stream": True,
            }
        )
        sock = socket.create_connection((config.host, config.port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        head = f"POST /v1/completions HTTP/1.1\r\nhost: bench\r\ncontent-length: {len(body)}\r\n\r\n"
        sock.sendall(head.encode() + body)
        sock.setblocking(False)
        self._streams[sock.fileno()] = _Stream(number, sock, number % config.sample_every == 0)
        self._poll.register(sock.fileno(), select.EPOLLIN)

    def _read(self, file: int) -> None:
        stream = self._streams[file]
        try:
            data = stream.sock.recv(_RECEIVE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._num_broken += 1
            self._close(file, stream)
            return
        self._num_bytes += len(data)
        self._num_reads += 1
        if not stream.has_head:
            data = self._take_head(stream, stream.tail + data)
        # Whole events only. Beside the words, spaces stand only behind `data:` and `id:`, once each.
        data = stream.tail + data
        end = data.rfind(b"\n\n") + 2
        stream.tail = data[end:]
        num_events = data.count(b"data: ", 0, end)
        num_tokens = data.count(b" ", 0, end) - num_events - data.count(b"id: ", 0, end)
        self._num_events += num_events
        self._num_tokens += num_tokens
        stream.num_tokens += num_tokens
        if stream.is_sampled:
            self._arrivals.append(Arrival(stream.number, time.monotonic(), stream.num_tokens))
        if b"[DONE]" in data:
            self._num_ended += 1
            self._close(file, stream)

    def _take_head(self, stream: _Stream, data: bytes) -> bytes:
        """What follows the head; nothing while it is not whole."""
        head, end, rest = data.partition(_HEAD_END)
        if not end:
            stream.tail = data
            return b""
        stream.tail = b""
        stream.has_head = True
        if head.startswith(b"HTTP/1.1 200"):
            self._num_begun += 1
        return rest

    def _close(self, file: int, stream: _Stream) -> None:
        self._poll.unregister(file)
        del self._streams[file]
        stream.sock.close()


if __name__ == "__main__":
    StreamReader(msgspec.json.decode(sys.argv[1], type=ReaderConfig)).run()
    os._exit(0)
