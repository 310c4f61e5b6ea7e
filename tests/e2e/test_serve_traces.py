"""One request through all services makes one trace, exported over OTLP/HTTP."""

import json
import urllib.request
from pathlib import Path

from tests.support.otlp import otlp_receiver
from tests.support.serve import serving

TRACE = "0af7651916cd43dd8448eb211c80319c"


def test_one_trace_across_the_bus(tmp_path: Path) -> None:
    with (
        otlp_receiver() as receiver,
        serving(tmp_path, "--otlp-traces-endpoint", receiver.url) as serve,
    ):
        body = {
            "model": "pagebus-mini",
            "messages": [{"role": "user", "content": "Tell me a story about a fox."}],
            "max_tokens": 30,
        }
        request = urllib.request.Request(
            serve.url + "/v1/chat/completions",
            json.dumps(body).encode(),
            {"content-type": "application/json", "traceparent": f"00-{TRACE}-b7ad6b7169203331-01"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert answer.status == 200
        wanted = {"POST", "tokenize", "send", "process", "queue", "prefill", "decode", "stream"}

        def first_words(spans: list) -> set[str]:  # type: ignore[type-arg]
            return {span.name.split(" ")[0] for span in spans if span.trace_id.hex() == TRACE}

        spans = receiver.wait_for(lambda spans: wanted <= first_words(spans))
    own = {span.name.split(" ")[0]: span for span in spans if span.trace_id.hex() == TRACE}
    assert len(own) == sum(span.trace_id.hex() == TRACE for span in spans) == len(wanted), "no span a token"
    assert own["POST"].parent_span_id.hex() == "b7ad6b7169203331"
    for child, parent in [("send", "POST"), ("process", "send"), ("queue", "process"), ("decode", "process")]:
        assert own[child].parent_span_id == own[parent].span_id
    for child in wanted - {"POST"}:
        assert own["POST"].start_time_unix_nano <= own[child].start_time_unix_nano + 5_000_000, child
