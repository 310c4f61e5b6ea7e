"""What a request tells a tracer: one trace, its phases, its end with status and counts."""

import httpx
import pytest

from tests.support.gateway import MODEL, gateway, say

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Recording:
    """A tracer that keeps everything; it is its only request's trace too."""

    def __init__(self) -> None:
        self.started = []
        self.phases = []
        self.events = []
        self.ends = []

    def start_request(self, name, headers, attributes):
        self.started.append((name, dict(headers), dict(attributes)))
        return self

    def phase(self, name, start_ns, end_ns, attributes=None):
        assert start_ns <= end_ns
        self.phases.append(name)

    def send(self, destination, request_id):
        return {"traceparent": f"{destination}|{request_id}"}

    def event(self, name, attributes=None):
        self.events.append(name)

    def end(self, attributes=None, *, error=None):
        self.ends.append((dict(attributes or {}), error))


async def test_one_request(tmp_path):
    telemetry = Recording()
    async with (
        gateway(tmp_path, say("abc"), telemetry=telemetry) as server,
        httpx.AsyncClient(base_url=server.url) as client,
    ):
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": True}
        headers = {"traceparent": PARENT, "cookie": "secret"}
        await client.post("/v1/chat/completions", json=body, headers=headers)
        ((name, seen, attributes),) = telemetry.started
        assert name == "POST /v1/chat/completions"
        assert seen == {"traceparent": PARENT}
        assert attributes["gen_ai.request.model"] == MODEL
        assert telemetry.phases == ["tokenize", "stream"]
        assert telemetry.events == ["first token"]
        ((end, error),) = telemetry.ends
        assert error is None
        assert end["http.response.status_code"] == 200
        assert end["gen_ai.usage.output_tokens"] == 4
        spec = server.requester.submitted[0].spec
        assert spec.headers["traceparent"].endswith(spec.request_id)


async def test_a_refused_request_and_a_client_that_leaves(tmp_path):
    telemetry = Recording()
    async with (
        gateway(tmp_path, telemetry=telemetry) as server,
        httpx.AsyncClient(base_url=server.url) as client,
    ):
        await client.post("/v1/completions", json={"prompt": "x" * 600})
        ((end, error),) = telemetry.ends
        assert (end["http.response.status_code"], error) == (400, "context_length_exceeded")
        with pytest.raises(httpx.ReadTimeout):
            await client.post("/v1/completions", json={"prompt": "x"}, timeout=0.2)
        request = await server.requester.next()
        while not request.is_cancelled or len(telemetry.ends) < 2:
            await client.get("/health")
        end, error = telemetry.ends[1]
        assert (end["http.response.status_code"], error) == (499, "cancelled")
