"""A small OTLP/HTTP receiver: keeps every span that is exported to it."""

import contextlib
import gzip
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Receiver:
    """The spans received so far, and a wait for those still to come."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: list[Span] = []
        self.url = ""

    def add(self, request: ExportTraceServiceRequest) -> None:
        with self._lock:
            self._spans += [
                span
                for resource in request.resource_spans
                for scope in resource.scope_spans
                for span in scope.spans
            ]

    def spans(self) -> list[Span]:
        with self._lock:
            return list(self._spans)

    def wait_for(self, is_enough: Callable[[list[Span]], bool], timeout_s: float = 15.0) -> list[Span]:
        """The spans once `is_enough`; raises with their names when the time is over."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if is_enough(spans := self.spans()):
                return spans
            time.sleep(0.05)
        raise AssertionError(f"only these spans came: {sorted(span.name for span in self.spans())}")


@contextlib.contextmanager
def otlp_receiver() -> Iterator[Receiver]:
    """A receiver on a free loopback port; `url` is the traces endpoint."""
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            receiver.add(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    receiver.url = f"http://127.0.0.1:{server.server_port}/v1/traces"
    try:
        yield receiver
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
