"""Keys are asked for on every route but three; health and readiness tell the truth; metrics add up."""

import subprocess
import sys

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.gateway import MODEL, app_client, gateway, say

BODY = {"model": MODEL, "prompt": "x"}


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("authorization", "Bearer wrong")],
        [("authorization", "Bearer ")],
        [("authorization", "Bearer")],
        [("authorization", "first")],
        [("authorization", "Basic first")],
        [("authorization", "Bearer first second")],
        [("authorization", "Bearer first"), ("authorization", "Bearer first")],
        [("authorization", b"Bearer \xff\xfe")],
        [("x-api-key", "first")],
    ],
)
async def test_without_a_valid_key(tmp_path, headers):
    async with app_client(tmp_path, say("ok"), api_key=("first", "second")) as (client, requester):
        for method, path in (
            ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("GET", "/v1/models"),
            ("GET", "/metrics"), ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/nowhere"),
            ("GET", "/health/"), ("GET", "//health"), ("GET", "/health/../v1/models"),
            ("OPTIONS", "/v1/completions"), ("GET", "/HEALTH"),
        ):  # fmt: skip
            answer = await client.request(method, path, headers=headers, json=BODY)
            assert answer.status_code == 401, (method, path)
            assert answer.json()["error"]["code"] == "invalid_api_key"
        for path in ("/health", "/ready", "/version"):
            assert (await client.get(path, headers=headers)).status_code == 200
        assert requester.submitted == []


async def test_with_a_valid_key(tmp_path):
    async with app_client(tmp_path, say("ok"), api_key=("first", "second")) as (client, requester):
        for value in ("Bearer first", "bearer second", "BEARER first"):
            answer = await client.post("/v1/completions", json=BODY, headers={"authorization": value})
            assert answer.status_code == 200
        tenants = [request.spec.tenant for request in requester.submitted]
        assert tenants[0] == tenants[2] != tenants[1]
        assert "first" not in tenants[0]


async def test_a_forged_host_opens_nothing(tmp_path):
    async with (
        gateway(tmp_path, api_key=("first",)) as server,
        httpx.AsyncClient(base_url=server.url) as client,
    ):
        for host in ("a/health?", "x/#", "localhost/health"):
            answer = await client.get("/v1/models", headers={"host": host})
            assert answer.status_code == 401


async def test_ready(tmp_path):
    async with gateway(tmp_path) as server, httpx.AsyncClient(base_url=server.url) as client:

        async def state() -> tuple[int, str | None]:
            answer = await client.get("/ready")
            return answer.status_code, answer.json()["reason"]

        assert await state() == (200, None)
        body = (await client.get("/ready")).json()
        assert (body["num_blocks"], body["block_size"], body["num_kv_tokens"]) == (100, 16, 1600)
        assert body["max_model_len"] == 512
        server.requester.age_s = 2.5
        status, reason = await state()
        assert status == 503
        assert "2.5 s" in reason
        server.requester.age_s = 0.1
        server.bus.is_connected = False
        assert (await state())[0] == 503
        server.bus.is_connected = True
        beat = server.requester.heartbeat
        server.requester.heartbeat = None
        assert (await state())[0] == 503
        server.requester.heartbeat = type(beat)(scheduler="s", model=MODEL, epoch=1)
        status, reason = await state()
        assert status == 503
        assert "executor" in reason
        assert (await client.get("/health")).status_code == 200
        assert isinstance((await client.get("/version")).json()["version"], str)


async def test_metrics(tmp_path):
    async with app_client(tmp_path, say("hello")) as (client, requester):
        for _ in range(3):
            await client.post("/v1/completions", json={"prompt": "four", "max_tokens": 3, "n": 2})
        await client.post("/v1/completions", json={"prompt": "four", "max_tokens": 99})
        requester.script = lambda request: request.fail("broken", "x")
        await client.post("/v1/completions", json={"prompt": "four"})
        answer = await client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        samples = {
            (sample.name, sample.labels.get("finished_reason") or sample.labels.get("le")): sample.value
            for family in text_string_to_metric_families(answer.text)
            for sample in family.samples
            if sample.labels.get("model_name") == MODEL
        }
        assert samples["vllm:prompt_tokens_total", None] == 20
        assert samples["vllm:generation_tokens_total", None] == 3 * 2 * 3 + 6
        assert samples["vllm:request_success_total", "length"] == 6
        assert samples["vllm:request_success_total", "stop"] == 1
        assert samples["vllm:request_success_total", "error"] == 1
        assert samples["vllm:time_to_first_token_seconds_count", None] == 4
        assert samples["vllm:inter_token_latency_seconds_count", None] == 3 * 2 * 2 + 5
        assert samples["vllm:e2e_request_latency_seconds_count", None] == 5
        assert samples["vllm:request_generation_tokens_sum", None] == 24
        assert samples["vllm:num_requests_running", None] == 3
        assert samples["vllm:num_requests_waiting", None] == 2
        assert samples["vllm:kv_cache_usage_perc", None] == 0.25


async def test_api_description(tmp_path):
    async with app_client(tmp_path) as (client, _):
        document = (await client.get("/openapi.json")).json()
        chat = document["components"]["schemas"]["ChatRequest"]
        assert "messages" in chat["required"]
        assert chat["properties"]["temperature"]
        assert "/v1/completions" in document["paths"]
        assert (await client.get("/docs")).status_code == 200


def test_no_tensor_library_is_loaded():
    code = (
        "import sys, pagebus.gateway.server, pagebus.gateway.service\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
