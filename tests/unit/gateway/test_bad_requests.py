"""Whatever a client sends, it gets a 4xx in OpenAI's shape that names the parameter, and no other request
suffers."""

import json

import pytest

from pagebus.bus.messages import Heartbeat
from pagebus.gateway import limits
from tests.support.gateway import MODEL, app_client, fail, say

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
USER = {"role": "user", "content": "hi"}


def chat(**fields) -> dict:
    return {"model": MODEL, "messages": [USER], **fields}


def text(**fields) -> dict:
    return {"model": MODEL, "prompt": "hi", **fields}


def check_error(answer, status: int, param: str | None, code: str | None = None) -> str:
    """The message of an error that has OpenAI's shape, this status and this parameter."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert len(answer.content) < 4096
    body = answer.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["code"], str)
    assert error["param"] == param
    if code is not None:
        assert error["code"] == code
    return error["message"]


FIELDS = [
    (CHAT, {"max_tokens": -1}, "max_tokens"),
    (CHAT, {"max_tokens": 0}, "max_tokens"),
    (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens"),
    (CHAT, {"max_tokens": "5"}, "max_tokens"),
    (CHAT, {"max_tokens": 5.5}, "max_tokens"),
    (CHAT, {"max_tokens": True}, "max_tokens"),
    (CHAT, {"max_tokens": 1 << 64}, "max_tokens"),
    (CHAT, {"max_tokens": int("9" * 4000)}, "max_tokens"),
    (CHAT, {"max_tokens": 512}, "max_tokens"),
    (CHAT, {"max_completion_tokens": 512}, "max_completion_tokens"),
    (CHAT, {"max_tokens": 3, "min_tokens": 4}, "min_tokens"),
    (CHAT, {"temperature": -0.1}, "temperature"),
    (CHAT, {"temperature": "hot"}, "temperature"),
    (CHAT, {"top_p": 1.5}, "top_p"),
    (CHAT, {"top_k": -2}, "top_k"),
    (CHAT, {"min_p": 2}, "min_p"),
    (CHAT, {"seed": 1 << 63}, "seed"),
    (CHAT, {"seed": "x"}, "seed"),
    (CHAT, {"n": 0}, "n"),
    (CHAT, {"n": 129}, "n"),
    (CHAT, {"n": 1_000_000_000}, "n"),
    (CHAT, {"stream": "yes"}, "stream"),
    (CHAT, {"stream_options": {"include_usage": True}}, "stream_options"),
    (CHAT, {"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    (CHAT, {"stop": [""]}, "stop"),
    (CHAT, {"stop": ["x"] * 17}, "stop"),
    (CHAT, {"stop": [1] * 20_000}, "stop[0]"),
    (CHAT, {"stop": 5}, "stop"),
    (CHAT, {"stop": "x" * 1025}, "stop"),
    (CHAT, {"stop_token_ids": [260]}, "stop_token_ids"),
    (CHAT, {"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": None}, "messages"),
    (CHAT, {"messages": "hi"}, "messages"),
    (CHAT, {"messages": [3]}, "messages[0]"),
    (CHAT, {"messages": [{"content": "x"}]}, "messages[0].role"),
    (CHAT, {"messages": [USER, {"role": "wizard", "content": "x"}]}, "messages[1].role"),
    (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages[0].content[0].type"),
    (CHAT, {"messages": [{"role": "user", "content": "x" * 600}]}, "messages"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"logprobs": False, "top_logprobs": 1}, "top_logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 10**6}, "top_logprobs"),
    (CHAT, {"logprobs": 3}, "logprobs"),
    (CHAT, {"prompt_logprobs": -1}, "prompt_logprobs"),
    (CHAT, {"prompt_logprobs": 21}, "prompt_logprobs"),
    (CHAT, {"prompt_logprobs": 0, "stream": True}, "prompt_logprobs"),
    (CHAT, {"presence_penalty": 2.1}, "presence_penalty"),
    (CHAT, {"presence_penalty": -1e30}, "presence_penalty"),
    (CHAT, {"frequency_penalty": -2.1}, "frequency_penalty"),
    (CHAT, {"frequency_penalty": "1"}, "frequency_penalty"),
    (CHAT, {"repetition_penalty": 0}, "repetition_penalty"),
    (CHAT, {"repetition_penalty": -1}, "repetition_penalty"),
    (CHAT, {"repetition_penalty": 5e-324}, "repetition_penalty"),
    (CHAT, {"repetition_penalty": 1e30}, "repetition_penalty"),
    (CHAT, {"temperature": 1e308}, "temperature"),
    (CHAT, {"logit_bias": {"-1": 1}}, "logit_bias"),
    (CHAT, {"logit_bias": {" 1": 1}}, "logit_bias"),
    (CHAT, {"logit_bias": {"1.0": 1}}, "logit_bias"),
    (CHAT, {"logit_bias": {"0x1": 1}}, "logit_bias"),
    (CHAT, {"logit_bias": {"٣": 1}}, "logit_bias"),
    (CHAT, {"logit_bias": {"1\n": 1}}, "logit_bias"),
    (CHAT, {"logit_bias": {"260": 1}}, "logit_bias"),
    (CHAT, {"logit_bias": {"9999999999": 1}}, "logit_bias"),
    (CHAT, {"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
    (CHAT, {"logit_bias": {"1": "NaN"}}, "logit_bias"),
    (CHAT, {"logit_bias": {"1": 100.5}}, "logit_bias"),
    (CHAT, {"logit_bias": {"1": -1e30}}, "logit_bias"),
    (CHAT, {"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    (CHAT, {"logit_bias": [1]}, "logit_bias"),
    (CHAT, {"bad_words": [""]}, "bad_words[0]"),
    (CHAT, {"bad_words": "x"}, "bad_words"),
    (CHAT, {"bad_words": ["x"] * 129}, "bad_words"),
    (CHAT, {"bad_words": ["ok", "x" * 1025]}, "bad_words[1]"),
    (CHAT, {"bad_words": [f"{i}" + "x" * 1000 for i in range(4)]}, "bad_words"),
    (CHAT, {"allowed_token_ids": []}, "allowed_token_ids"),
    (CHAT, {"allowed_token_ids": [260]}, "allowed_token_ids"),
    (CHAT, {"allowed_token_ids": [-1]}, "allowed_token_ids[0]"),
    (CHAT, {"allowed_token_ids": [1 << 32]}, "allowed_token_ids[0]"),
    (CHAT, {"allowed_token_ids": [1.5]}, "allowed_token_ids[0]"),
    (CHAT, {"use_beam_search": True}, "use_beam_search"),
    (CHAT, {"length_penalty": 0.5}, "length_penalty"),
    (CHAT, {"logprob_token_ids": [1]}, "logprob_token_ids"),
    (CHAT, {"response_format": {"type": "json_object"}}, "response_format"),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    (CHAT, {"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    (TEXT, {"prompt": None}, "prompt"),
    (TEXT, {"prompt": ""}, "prompt"),
    (TEXT, {"prompt": []}, "prompt"),
    (TEXT, {"prompt": [[]]}, "prompt"),
    (TEXT, {"prompt": ["a", ""]}, "prompt"),
    (TEXT, {"prompt": [1, "a"]}, "prompt"),
    (TEXT, {"prompt": [[1], "a"]}, "prompt"),
    (TEXT, {"prompt": [1, [2]]}, "prompt"),
    (TEXT, {"prompt": {"a": 1}}, "prompt"),
    (TEXT, {"prompt": [1.5]}, "prompt[0]"),
    (TEXT, {"prompt": [260]}, "prompt"),
    (TEXT, {"prompt": [-1]}, "prompt"),
    (TEXT, {"prompt": [1 << 40]}, "prompt"),
    (TEXT, {"prompt": [1 << 70]}, "prompt"),
    (TEXT, {"prompt": ["a"] * 1025}, "prompt"),
    (TEXT, {"prompt": ["a"] * 1000, "n": 2}, "n"),
    (TEXT, {"prompt": "x" * 512}, "prompt"),
    (TEXT, {"max_tokens": 0}, "max_tokens"),
    (TEXT, {"logprobs": 21}, "logprobs"),
    (TEXT, {"logprobs": -1}, "logprobs"),
    (TEXT, {"logprobs": True}, "logprobs"),
    (TEXT, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    (TEXT, {"echo": True, "logprobs": 1, "prompt": [300]}, "prompt"),
    (TEXT, {"echo": True, "logprobs": 1, "prompt": [[]]}, "prompt"),
    (TEXT, {"echo": True, "logprobs": 1, "max_tokens": 0, "prompt": "x" * 512}, "prompt"),
    (TEXT, {"best_of": 3}, "best_of"),
    (TEXT, {"suffix": "x"}, "suffix"),
    (TEXT, {"echo": True, "prompt": [300]}, "prompt"),
]


@pytest.mark.parametrize("stream", [False, True])
async def test_fields(tmp_path, stream):
    async with app_client(tmp_path, say("ok")) as (client, requester):
        for path, fields, param in FIELDS:
            body = (chat if path == CHAT else text)(**fields)
            if stream and "stream" not in fields and "stream_options" not in fields:
                body["stream"] = True
            check_error(await client.post(path, json=body), 400, param)
        assert all(request.is_cancelled or request.made for request in requester.submitted)
        assert (await client.post(CHAT, json=chat())).json()["choices"][0]["message"]["content"] == "ok"


BODIES = [
    b"", b"{", b"[]", b"null", b'"x"', b"\xef\xbb\xbf{}", "{}".encode("utf-16"), b'{"prompt":"\xff"}',
    b'{"prompt":"\\ud800"}', b'{"prompt":"a\\udc00b"}', b'{"prompt":"x","temperature":NaN}',
    b'{"prompt":"x","temperature":Infinity}', b'{"prompt":"x","temperature":1e999}',
    b'{"prompt":"x","max_tokens":' + b"9" * 5000 + b"}", b'{"x":' + b"[" * 100_000 + b"}",
    b'{"prompt":' + b"[" * 100_000 + b"}", b'{"prompt":"x"} trailing', b'{"prompt":"x",}',
    b'{"prompt":"x","bad_words":["\\ud800"]}', b'{"prompt":"x","logit_bias":{"1":NaN}}',
    b'{"prompt":"x","logit_bias":{"1":1e999}}', b'{"prompt":"x","presence_penalty":-Infinity}',
    b"{" + b",".join(b'"k%d":1' % i for i in range(100_000)) + b"}",
]  # fmt: skip


async def test_bodies(tmp_path):
    async with app_client(tmp_path, say("ok")) as (client, _):
        for body in BODIES:
            answer = await client.post(TEXT, content=body)
            assert answer.status_code == 400, body[:50]
            check_error(answer, 400, answer.json()["error"]["param"])
        assert (await client.post(TEXT, json=text())).status_code == 200


async def test_numbers_are_in_the_context_message(tmp_path):
    async with app_client(tmp_path) as (client, _):
        answer = await client.post(TEXT, json=text(prompt="x" * 600))
        message = check_error(answer, 400, "prompt", "context_length_exceeded")
        assert "600" in message
        assert "512" in message
        answer = await client.post(TEXT, json=text(prompt="x" * 500, max_tokens=20))
        message = check_error(answer, 400, "max_tokens", "context_length_exceeded")
        assert all(number in message for number in ("500", "20", "520", "512", "12"))


async def test_missing_fields_are_named(tmp_path):
    async with app_client(tmp_path) as (client, _):
        answer = await client.post(CHAT, json={"model": MODEL})
        check_error(answer, 400, "messages", "missing_required_parameter")
        answer = await client.post(TEXT, json={"model": MODEL})
        check_error(answer, 400, "prompt", "missing_required_parameter")


async def test_unknown_model(tmp_path):
    async with app_client(tmp_path) as (client, _):
        for path, body in ((CHAT, chat(model="gpt")), (TEXT, text(model="gpt"))):
            check_error(await client.post(path, json=body), 404, "model", "model_not_found")
        assert (await client.post(TEXT, json=text(model=["a"]))).status_code == 400


async def test_unknown_routes_and_methods(tmp_path):
    async with app_client(tmp_path) as (client, _):
        check_error(await client.get("/nowhere"), 404, None, "route_not_found")
        check_error(await client.get("/v1/models/"), 404, "model", "model_not_found")
        check_error(await client.get("/health/"), 404, None, "route_not_found")
        refused = await client.get(CHAT)
        check_error(refused, 405, None, "method_not_allowed")
        assert refused.headers["allow"] == "POST"
        check_error(await client.delete("/v1/models"), 405, None, "method_not_allowed")


async def test_body_over_the_limit_is_read_on_for_a_while_and_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "MAX_DISCARDED_BYTES", 5000)
    async with app_client(tmp_path, say("ok"), max_body_bytes=1000) as (client, _):
        answer = await client.post(TEXT, content=b"x" * 1001)
        check_error(answer, 413, None, "request_too_large")
        num_sent = 0

        async def endless():
            nonlocal num_sent
            while True:
                num_sent += 1
                yield b"x" * 100

        check_error(await client.post(TEXT, content=endless()), 413, None, "request_too_large")
        assert num_sent <= 62, "10 within the limit, 50 thrown away, no more"
        body = json.dumps(text()).encode()
        at_the_limit = body + b" " * (1000 - len(body))
        assert (await client.post(TEXT, content=at_the_limit)).status_code == 200


async def test_compressed_body(tmp_path):
    async with app_client(tmp_path) as (client, _):
        answer = await client.post(TEXT, content=b"x", headers={"content-encoding": "gzip"})
        check_error(answer, 415, None)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("script", "status", "type_", "retry_after"),
    [
        (fail("queue_full", retry_after_s=7.2), 429, "rate_limit_error", "7"),
        (fail("queue_full"), 429, "rate_limit_error", "1"),
        (fail("context_length_exceeded", is_client_fault=True), 400, "invalid_request_error", None),
        (fail("prompt_too_large", is_client_fault=True), 413, "invalid_request_error", None),
        (fail("timeout"), 504, "timeout_error", None),
        (fail("no_leader"), 503, "service_unavailable_error", "1"),
        (fail("anything"), 500, "server_error", None),
    ],
)
async def test_failures_before_the_first_byte_have_a_status(
    tmp_path, script, status, type_, retry_after, stream
):
    async with app_client(tmp_path, script) as (client, _):
        answer = await client.post(CHAT, json=chat(stream=stream))
        check_error(answer, status, None)
        assert answer.json()["error"]["type"] == type_
        assert answer.headers.get("retry-after") == retry_after


async def test_not_ready_yet(tmp_path):
    async with app_client(tmp_path, say("ok")) as (client, requester):
        requester.heartbeat = None
        answer = await client.post(CHAT, json=chat())
        check_error(answer, 503, None, "not_ready")
        assert answer.headers["retry-after"] == "1"
        requester.heartbeat = Heartbeat(scheduler="s", model=MODEL, epoch=1, max_model_len=100)
        assert (await client.post(CHAT, json=chat())).status_code == 200
        # A new leader that knows no executor yet does not turn requests away.
        requester.heartbeat = Heartbeat(scheduler="t", model=MODEL, epoch=2)
        assert (await client.post(CHAT, json=chat())).status_code == 200
        assert len(requester.submitted) == 2


async def test_own_limit_of_the_context(tmp_path):
    async with app_client(tmp_path, say("ok"), max_model_len=64) as (client, requester):
        assert (await client.get("/v1/models")).json()["data"][0]["max_model_len"] == 64
        await client.post(CHAT, json=chat())
        spec = requester.submitted[0].spec
        assert len(spec.prompt) + spec.max_tokens == 64


async def test_many_prompts_of_which_one_is_bad_leave_nothing_running(tmp_path):
    async with app_client(tmp_path) as (client, requester):
        answer = await client.post(TEXT, json=text(prompt=["a", "b", "c" * 600]))
        check_error(answer, 400, "prompt", "context_length_exceeded")
        assert [request.is_cancelled for request in requester.submitted] == [True, True]


async def test_an_error_in_the_gateway_is_one_requests_own(tmp_path, monkeypatch):
    async with app_client(tmp_path, lambda r: r.tokens([1 << 40])) as (client, requester):
        answer = await client.post(TEXT, json=text())
        assert answer.status_code == 500
        assert requester.submitted[0].is_cancelled
        requester.script = say("ok")
        assert (await client.post(TEXT, json=text())).status_code == 200
