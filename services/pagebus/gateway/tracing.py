"""What the gateway asks of a tracer, and one that does nothing. It knows no OpenTelemetry."""

from collections.abc import Mapping
from typing import Protocol

Attribute = str | bool | int | float | list[str]


class RequestTrace(Protocol):
    """The spans of one request in this process. Times are `time.time_ns()`."""

    def phase(
        self, name: str, start_ns: int, end_ns: int, attributes: Mapping[str, Attribute] | None = None
    ) -> None:
        """A finished part of the request (tokenize, stream)."""

    def send(self, destination: str, request_id: str) -> Mapping[str, str]:
        """The request is about to be published; gives the W3C headers to send with it."""

    def event(self, name: str, attributes: Mapping[str, Attribute] | None = None) -> None:
        """Something that happened now, such as the first token."""

    def end(self, attributes: Mapping[str, Attribute] | None = None, *, error: str | None = None) -> None:
        """The request is over; later calls do nothing."""


class Telemetry(Protocol):
    """Starts the trace of each request."""

    def start_request(
        self, name: str, headers: Mapping[str, str], attributes: Mapping[str, Attribute]
    ) -> RequestTrace:
        """The trace of one request; its parent is the client's W3C context, if `headers` hold one."""


class NoTrace:
    """A `RequestTrace` that records nothing."""

    def phase(
        self, name: str, start_ns: int, end_ns: int, attributes: Mapping[str, Attribute] | None = None
    ) -> None:
        """Do nothing."""

    def send(self, destination: str, request_id: str) -> Mapping[str, str]:
        """No headers."""
        return {}

    def event(self, name: str, attributes: Mapping[str, Attribute] | None = None) -> None:
        """Do nothing."""

    def end(self, attributes: Mapping[str, Attribute] | None = None, *, error: str | None = None) -> None:
        """Do nothing."""


class NoTelemetry:
    """A `Telemetry` that records nothing."""

    def start_request(
        self, name: str, headers: Mapping[str, str], attributes: Mapping[str, Attribute]
    ) -> RequestTrace:
        """A trace that records nothing."""
        return NO_TRACE


class HttpTrace:
    """A request's trace that ends with its HTTP response, not with its generation, and then tells the status.

    What `end` brings is kept until `close`."""

    def __init__(self, trace: RequestTrace) -> None:
        self._trace = trace
        self._attributes: dict[str, Attribute] = {}
        self._error: str | None = None

    def phase(
        self, name: str, start_ns: int, end_ns: int, attributes: Mapping[str, Attribute] | None = None
    ) -> None:
        """Passed on."""
        self._trace.phase(name, start_ns, end_ns, attributes)

    def send(self, destination: str, request_id: str) -> Mapping[str, str]:
        """Passed on."""
        return self._trace.send(destination, request_id)

    def event(self, name: str, attributes: Mapping[str, Attribute] | None = None) -> None:
        """Passed on."""
        self._trace.event(name, attributes)

    def end(self, attributes: Mapping[str, Attribute] | None = None, *, error: str | None = None) -> None:
        """Kept; the first error counts."""
        self._attributes.update(attributes or {})
        self._error = self._error or error

    def close(self, status: int) -> None:
        """The response is over."""
        self._trace.end({**self._attributes, "http.response.status_code": status}, error=self._error)


NO_TRACE = NoTrace()
