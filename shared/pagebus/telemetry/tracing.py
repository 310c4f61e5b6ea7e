"""Makes the spans of one request: the gateway's live ones and, when a request ends, the scheduler's.

One trace a request: HTTP > (tokenize, send > process > (queue, prefill, decode), stream). No span is made a
token. Without an endpoint `create` gives None and nothing of OpenTelemetry is imported.
"""

import logging
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from pagebus.telemetry import conventions as names

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, SpanKind

Attribute = str | bool | int | float | list[str]

_EXPORT_TIMEOUT_S = 2.0


class RequestTimings(msgspec.Struct, frozen=True, kw_only=True):
    """What the scheduler knows of an attempt that ended. Times are `time.time_ns()`; None: never reached."""

    request_id: str
    attempt: int
    headers: Mapping[str, str]  # W3C context that came with Generate
    destination: str  # the subject that Generate came on
    arrived_ns: int
    scheduled_ns: int | None
    first_token_ns: int | None
    ended_ns: int
    num_prompt_tokens: int
    num_generated_tokens: int
    num_preemptions: int = 0
    error: str | None = None


def endpoint_of(setting: str) -> str:
    """The OTLP/HTTP traces endpoint in force, or "" when tracing is off.

    The flag wins; then OTEL_EXPORTER_OTLP_TRACES_ENDPOINT; then OTEL_EXPORTER_OTLP_ENDPOINT plus
    `/v1/traces`. OTEL_SDK_DISABLED=true and OTEL_TRACES_EXPORTER=none switch everything off.
    """
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return ""
    if os.environ.get("OTEL_TRACES_EXPORTER", "otlp").lower() == "none":
        return ""
    if setting:
        return setting
    if specific := os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        return specific
    if base := os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
        return base.rstrip("/") + "/v1/traces"
    return ""


def create(service: str, instance: str, endpoint_setting: str) -> "Tracing | None":
    """Tracing of a process that exports to an OTLP/HTTP endpoint, or None where none is set.

    `service` becomes `service.name` unless OTEL_SERVICE_NAME says otherwise. Sampling follows
    OTEL_TRACES_SAMPLER. Export runs in a thread of its own; a collector that is down costs nothing.
    """
    endpoint = endpoint_of(endpoint_setting)
    if not endpoint:
        return None
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # a dead collector must not flood the log
    attributes = {"service.instance.id": instance}
    if "OTEL_SERVICE_NAME" not in os.environ:
        attributes["service.name"] = service
    provider = TracerProvider(resource=Resource.create(attributes), shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint=endpoint, timeout=_EXPORT_TIMEOUT_S)
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=500))
    return Tracing(provider)


class Tracing:
    """Starts request traces (gateway) and records finished requests (scheduler)."""

    def __init__(self, provider: "TracerProvider") -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("pagebus")
        self._propagator = TraceContextTextMapPropagator()

    def start_request(
        self, name: str, headers: Mapping[str, str], attributes: Mapping[str, Attribute]
    ) -> "RequestSpans":
        """The SERVER span of a request; its parent is the client's W3C context, if `headers` have one."""
        from opentelemetry.trace import SpanKind

        parent = self._propagator.extract(dict(headers))
        span = self._tracer.start_span(
            name, context=parent, kind=SpanKind.SERVER, attributes=dict(attributes)
        )
        return RequestSpans(self, span)

    def record(self, timings: RequestTimings) -> None:
        """Make the process, queue, prefill and decode spans of an attempt that ended."""
        from opentelemetry.trace import SpanKind

        parent = self._propagator.extract(dict(timings.headers))
        process = self.span(
            f"process {timings.destination}", parent, SpanKind.CONSUMER, timings.arrived_ns, timings.ended_ns
        )
        process.set_attributes(
            {
                names.MESSAGING_SYSTEM: names.SYSTEM,
                names.MESSAGING_OPERATION_NAME: "process",
                names.MESSAGING_OPERATION_TYPE: "process",
                names.MESSAGING_DESTINATION: timings.destination,
                names.MESSAGING_MESSAGE_ID: timings.request_id,
                "pagebus.attempt": timings.attempt,
                "pagebus.num_preemptions": timings.num_preemptions,
            }
        )
        if timings.error:
            process.set_attribute(names.ERROR_TYPE, timings.error)
        context = _context_of(process)
        queue_end = timings.scheduled_ns or timings.ended_ns
        self.span("queue", context, SpanKind.INTERNAL, timings.arrived_ns, queue_end).end(queue_end)
        if timings.scheduled_ns is not None:
            prefill_end = timings.first_token_ns or timings.ended_ns
            prefill = self.span("prefill", context, SpanKind.INTERNAL, timings.scheduled_ns, prefill_end)
            prefill.set_attribute(names.USAGE_INPUT_TOKENS, timings.num_prompt_tokens)
            prefill.end(prefill_end)
        if timings.first_token_ns is not None:
            decode = self.span("decode", context, SpanKind.INTERNAL, timings.first_token_ns, timings.ended_ns)
            decode.set_attribute(names.USAGE_OUTPUT_TOKENS, timings.num_generated_tokens)
            decode.end(timings.ended_ns)
        process.end(timings.ended_ns)

    def span(self, name: str, parent: "Context", kind: "SpanKind", start_ns: int, end_ns: int) -> "Span":
        """A span that began at `start_ns`; the caller ends it (at `end_ns` or later)."""
        return self._tracer.start_span(name, context=parent, kind=kind, start_time=min(start_ns, end_ns))

    def inject(self, context: "Context") -> dict[str, str]:
        """The W3C headers (`traceparent`, perhaps `tracestate`) of a context."""
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, context=context)
        return carrier

    def close(self) -> None:
        """Export what is left; takes a few seconds at most. Call it off the event loop."""
        self._provider.force_flush(timeout_millis=2000)
        self._provider.shutdown()


def _context_of(span: "Span") -> "Context":
    from opentelemetry.trace import set_span_in_context

    return set_span_in_context(span)


class RequestSpans:
    """The spans of one request in the process that owns it."""

    def __init__(self, tracing: Tracing, span: "Span") -> None:
        self._tracing = tracing
        self._span = span
        self._context = _context_of(span)
        self._is_ended = False

    @property
    def trace_id(self) -> str:
        """The trace's id, 32 hex digits."""
        return f"{self._span.get_span_context().trace_id:032x}"

    def phase(
        self, name: str, start_ns: int, end_ns: int, attributes: Mapping[str, Attribute] | None = None
    ) -> None:
        """A finished INTERNAL child span (tokenize, stream)."""
        from opentelemetry.trace import SpanKind

        span = self._tracing.span(name, self._context, SpanKind.INTERNAL, start_ns, end_ns)
        if attributes:
            span.set_attributes(dict(attributes))
        span.end(max(start_ns, end_ns))

    def send(self, destination: str, request_id: str) -> dict[str, str]:
        """The PRODUCER span of publishing the request; gives the W3C headers to send with it."""
        from opentelemetry.trace import SpanKind

        now = time.time_ns()
        span = self._tracing.span(f"send {destination}", self._context, SpanKind.PRODUCER, now, now)
        span.set_attributes(
            {
                names.MESSAGING_SYSTEM: names.SYSTEM,
                names.MESSAGING_OPERATION_NAME: "send",
                names.MESSAGING_OPERATION_TYPE: "send",
                names.MESSAGING_DESTINATION: destination,
                names.MESSAGING_MESSAGE_ID: request_id,
            }
        )
        span.end()
        return self._tracing.inject(_context_of(span))

    def event(self, name: str, attributes: Mapping[str, Attribute] | None = None) -> None:
        """Something that happened at this moment, such as the first token."""
        self._span.add_event(name, dict(attributes or {}))

    def end(self, attributes: Mapping[str, Attribute] | None = None, *, error: str | None = None) -> None:
        """End the request's span, once; `error` marks it as failed with that type."""
        if self._is_ended:
            return
        self._is_ended = True
        if attributes:
            self._span.set_attributes(dict(attributes))
        if error is not None:
            from opentelemetry.trace import Status, StatusCode

            self._span.set_attribute(names.ERROR_TYPE, error)
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()
