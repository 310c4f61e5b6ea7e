"""Spans of a request: one trace, the right parents, phases that add up, and nothing without an endpoint."""

import subprocess
import sys

import pytest

from pagebus.telemetry import tracing
from pagebus.telemetry.tracing import RequestTimings
from tests.support.otlp import otlp_receiver

TRACE = "0af7651916cd43dd8448eb211c80319c"
CLIENT_HEADERS = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
MS = 1_000_000


def timings(headers: dict[str, str], **changes: int | str | None) -> RequestTimings:
    fields = {
        "request_id": "r1",
        "attempt": 1,
        "headers": headers,
        "destination": "pagebus.m.generate",
        "arrived_ns": 1000 * MS,
        "scheduled_ns": 1010 * MS,
        "first_token_ns": 1050 * MS,
        "ended_ns": 1250 * MS,
        "num_prompt_tokens": 7,
        "num_generated_tokens": 20,
    }
    return RequestTimings(**{**fields, **changes})


def test_one_trace_with_the_client_as_its_root() -> None:
    with otlp_receiver() as receiver:
        gateway = tracing.create("pagebus-gateway", "g1", receiver.url)
        scheduler = tracing.create("pagebus-scheduler", "s1", receiver.url)
        assert gateway
        assert scheduler
        request = gateway.start_request("POST /v1/chat/completions", CLIENT_HEADERS, {"http.route": "/v1"})
        request.phase("tokenize", 1, 2, {"n": 7})
        sent = request.send("pagebus.m.generate", "r1")
        scheduler.record(timings(sent))
        request.phase("stream", 2, 9)
        request.end({"http.response.status_code": 200})
        request.end(error="late")  # ends once only
        gateway.close()
        scheduler.close()
        spans = receiver.wait_for(lambda spans: len(spans) >= 8)

    by_name = {span.name.split(" ")[0]: span for span in spans}
    assert set(by_name) == {"POST", "tokenize", "send", "process", "queue", "prefill", "decode", "stream"}
    assert {span.trace_id.hex() for span in spans} == {TRACE}
    root = by_name["POST"]
    assert root.parent_span_id.hex() == "b7ad6b7169203331"
    for child, parent in [
        ("tokenize", "POST"),
        ("send", "POST"),
        ("stream", "POST"),
        ("process", "send"),
        ("queue", "process"),
        ("prefill", "process"),
        ("decode", "process"),
    ]:
        assert by_name[child].parent_span_id == by_name[parent].span_id, child
    phases = [by_name[name] for name in ("queue", "prefill", "decode")]
    whole = by_name["process"]
    assert sum(s.end_time_unix_nano - s.start_time_unix_nano for s in phases) == 250 * MS
    assert whole.end_time_unix_nano - whole.start_time_unix_nano == 250 * MS
    assert root.status.code == 0, "an end after the end changes nothing"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"scheduled_ns": None, "first_token_ns": None, "error": "cancelled"}, {"process", "queue"}),
        ({"first_token_ns": None, "error": "executor_lost"}, {"process", "queue", "prefill"}),
    ],
)
def test_an_attempt_that_ended_early_shows_the_phases_that_it_reached(
    changes: dict[str, str | None], expected: set[str]
) -> None:
    with otlp_receiver() as receiver:
        scheduler = tracing.create("pagebus-scheduler", "s1", receiver.url)
        assert scheduler
        scheduler.record(timings(CLIENT_HEADERS, **changes))
        scheduler.close()
        spans = receiver.wait_for(lambda spans: len(spans) >= len(expected))
    assert {span.name.split(" ")[0] for span in spans} == expected
    attributes = {a.key: a.value for span in spans for a in span.attributes}
    assert attributes["error.type"].string_value == changes["error"]


def test_inert_without_an_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    assert tracing.create("pagebus-gateway", "g1", "") is None
    code = (
        "import sys; from pagebus.telemetry import tracing; tracing.create('a', 'b', '');"
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_where_spans_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318/")
    assert tracing.endpoint_of("") == "http://127.0.0.1:4318/v1/traces"
    assert tracing.endpoint_of("http://x/y") == "http://x/y"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://t/")
    assert tracing.endpoint_of("") == "http://t/"
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert tracing.endpoint_of("http://x/y") == ""


def test_a_dead_collector_is_not_in_the_way() -> None:
    gateway = tracing.create("pagebus-gateway", "g1", "http://127.0.0.1:9/v1/traces")
    assert gateway
    request = gateway.start_request("POST /v1/completions", {"traceparent": "nonsense"}, {})
    assert "traceparent" in request.send("pagebus.m.generate", "r1")
    request.end(error="timeout")
    gateway.close()
