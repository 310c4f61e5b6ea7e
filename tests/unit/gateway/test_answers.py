"""Answers have OpenAI's shapes exactly, streamed or not, for the SDK and as raw bytes."""

import openai
import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.support.answers import events, strictly
from tests.support.gateway import EOS, MODEL, app_client, gateway, ids, say

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


async def test_chat_whole(tmp_path):
    async with app_client(tmp_path, say("héllo")) as (client, requester):
        answer = await client.post("/v1/chat/completions", json=CHAT)
        assert answer.status_code == 200
        body = answer.json()
        strictly(ChatCompletion, body)
        assert body["object"] == "chat.completion"
        assert body["model"] == MODEL
        (choice,) = body["choices"]
        assert choice == {
            "index": 0,
            "message": {"role": "assistant", "content": "héllo", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
        prompt = "[user]hi\n[assistant]"
        spec = requester.submitted[0].spec
        assert spec.prompt == ids(prompt)
        assert spec.stop_token_ids == [EOS]
        assert spec.max_tokens == 512 - len(prompt)
        assert body["usage"]["prompt_tokens"] == len(prompt)
        assert body["usage"]["completion_tokens"] == 7  # six bytes and the end of turn
        assert body["usage"]["total_tokens"] == len(prompt) + 7
        assert isinstance(body["usage"]["completion_tokens_details"], dict)


async def test_chat_stream(tmp_path):
    async with app_client(tmp_path, say("añb")) as (client, _requester):
        body = {**CHAT, "stream": True, "n": 2, "stream_options": {"include_usage": True}}
        answer = await client.post("/v1/chat/completions", json=body)
        assert answer.headers["content-type"].startswith("text/event-stream")
        chunks = events(answer.text)
        for chunk in chunks:
            strictly(ChatCompletionChunk, chunk)
        assert len({(c["id"], c["created"], c["model"], c["system_fingerprint"]) for c in chunks}) == 1
        *others, last = chunks
        assert all(chunk["usage"] is None for chunk in others)
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == 10
        for index in (0, 1):
            mine = [c["choices"][0] for c in others if c["choices"][0]["index"] == index]
            assert mine[0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
            assert all("role" not in choice["delta"] for choice in mine[1:])
            assert "".join(choice["delta"].get("content", "") for choice in mine) == "añb"
            assert [choice["finish_reason"] for choice in mine] == [None] * (len(mine) - 1) + ["stop"]
            assert mine[-1]["delta"] == {}


async def test_continuous_usage(tmp_path):
    async with app_client(tmp_path, say("abc")) as (client, _requester):
        options = {"include_usage": True, "continuous_usage_stats": True}
        body = {"prompt": "x", "stream": True, "stream_options": options, "max_tokens": 3}
        chunks = events((await client.post("/v1/completions", json=body)).text)
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts)
        assert counts[-1] == 3


async def test_stream_without_usage_has_no_usage_key(tmp_path):
    async with app_client(tmp_path, say("abc")) as (client, _requester):
        answer = await client.post("/v1/chat/completions", json={**CHAT, "stream": True})
        assert all("usage" not in chunk for chunk in events(answer.text))


async def test_completion_whole_and_stream(tmp_path):
    async with app_client(tmp_path, say("one two")) as (client, _requester):
        body = {"model": MODEL, "prompt": "say", "max_tokens": 5}
        whole = (await client.post("/v1/completions", json=body)).json()
        strictly(Completion, whole)
        assert whole["choices"] == [
            {"index": 0, "text": "one t", "logprobs": None, "finish_reason": "length"}
        ]
        chunks = events((await client.post("/v1/completions", json={**body, "stream": True})).text)
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "one t"
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "length"
        assert all(chunk["object"] == "text_completion" for chunk in chunks)


async def test_completion_default_of_16_tokens(tmp_path):
    async with app_client(tmp_path, say("x" * 99)) as (client, _requester):
        body = (await client.post("/v1/completions", json={"prompt": "say"})).json()
        assert body["choices"][0]["text"] == "x" * 16
        near_the_end = (await client.post("/v1/completions", json={"prompt": "y" * 505})).json()
        assert near_the_end["choices"][0]["text"] == "x" * 7


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [ids("ab")]),
        (["ab", "c"], [ids("ab"), ids("c")]),
        ([97, 98], [[97, 98]]),
        ([[97], [98, 99]], [[97], [98, 99]]),
    ],
)
async def test_prompt_forms(tmp_path, prompt, expected):
    async with app_client(tmp_path, say("ok")) as (client, requester):
        body = (await client.post("/v1/completions", json={"prompt": prompt, "n": 2})).json()
        assert [list(request.spec.prompt) for request in requester.submitted] == expected
        assert [choice["index"] for choice in body["choices"]] == list(range(2 * len(expected)))
        assert body["usage"]["prompt_tokens"] == sum(map(len, expected))
        assert body["usage"]["completion_tokens"] == 3 * 2 * len(expected)


async def test_echo(tmp_path):
    async with app_client(tmp_path, say("!")) as (client, _requester):
        body = {"prompt": ["ab", "cd"], "echo": True}
        whole = (await client.post("/v1/completions", json=body)).json()
        assert [choice["text"] for choice in whole["choices"]] == ["ab!", "cd!"]
        from_ids = (await client.post("/v1/completions", json={"prompt": ids("né"), "echo": True})).json()
        assert from_ids["choices"][0]["text"] == "né!"
        only = (await client.post("/v1/completions", json={**body, "max_tokens": 0})).json()
        assert [choice["text"] for choice in only["choices"]] == ["ab", "cd"]
        assert only["choices"][0]["finish_reason"] == "length"
        assert only["usage"]["completion_tokens"] == 0
        streamed = await client.post("/v1/completions", json={**body, "max_tokens": 0, "stream": True})
        assert "".join(chunk["choices"][0]["text"] for chunk in events(streamed.text)) == "abcd"


async def test_stop_string_across_tokens_ends_the_choice(tmp_path):
    async with app_client(tmp_path, say("one END two")) as (client, requester):
        body = {"prompt": "x", "max_tokens": 50, "stop": ["END"]}
        whole = (await client.post("/v1/completions", json=body)).json()
        assert whole["choices"][0]["text"] == "one "
        assert whole["choices"][0]["finish_reason"] == "stop"
        assert whole["usage"]["completion_tokens"] == 7
        assert requester.submitted[0].ended_choices == [0]
        streamed = await client.post("/v1/completions", json={**body, "stream": True})
        assert "".join(c["choices"][0]["text"] for c in events(streamed.text)) == "one "
        for stop in (None, [], "zzz"):
            whole = (await client.post("/v1/completions", json={**body, "stop": stop})).json()
            assert whole["choices"][0]["text"] == "one END two"


async def test_parameters_reach_the_request(tmp_path):
    async with app_client(tmp_path, say("x")) as (client, requester):
        body = {
            **CHAT, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": 42, "n": 3,
            "max_completion_tokens": 9, "max_tokens": 5, "min_tokens": 2, "stop_token_ids": [65],
            "ignore_eos": True, "cache_salt": "s", "priority": -1, "unknown_field": {"a": [1]}, "stop": None,
            "user": "me", "metadata": None, "timeout_s": 12.5, "tools": [],
            "response_format": {"type": "text"},
        }  # fmt: skip
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
        spec = requester.submitted[0].spec
        sampling = spec.sampling
        assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 7, 0.1)
        assert sampling.seed == 42
        assert (spec.num_choices, spec.max_tokens, spec.min_tokens) == (3, 9, 2)
        assert spec.stop_token_ids == [65]
        assert (spec.cache_salt, spec.priority, spec.timeout_s) == ("s", -1, 12.5)


async def test_seeds_differ_without_one(tmp_path):
    async with app_client(tmp_path, say("x")) as (client, requester):
        for _ in range(2):
            await client.post("/v1/chat/completions", json=CHAT)
        first, second = (request.spec for request in requester.submitted)
        assert first.sampling.seed != second.sampling.seed
        assert 0 <= first.sampling.seed < 1 << 63
        assert first.request_id != second.request_id


async def test_stop_token_id_is_text_only_where_that_is_asked_for(tmp_path):
    def script(request):
        request.tokens([97, request.spec.stop_token_ids[0]], finish="stop")

    async with app_client(tmp_path, script) as (client, _requester):
        body = {"prompt": "x", "stop_token_ids": [65]}
        for included, text in ((False, "a"), (True, "aA")):
            fields = {**body, "include_stop_str_in_output": included}
            whole = (await client.post("/v1/completions", json=fields)).json()
            assert whole["choices"][0]["text"] == text
            assert whole["usage"]["completion_tokens"] == 2
        eos = {"prompt": "x", "include_stop_str_in_output": True}  # a special token has no text anyway
        assert (await client.post("/v1/completions", json=eos)).json()["choices"][0]["text"] == "a"
        eos["skip_special_tokens"] = False
        assert (await client.post("/v1/completions", json=eos)).json()["choices"][0]["text"] == "a<eos>"


async def test_echo_of_a_chat_s_last_message(tmp_path):
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well"}]
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    async with app_client(tmp_path, say(", yes")) as (client, _requester):
        for messages, fields, text in (
            (said, {"continue_final_message": True}, "Well, yes"),
            (said, {"continue_final_message": True, "echo": False}, ", yes"),
            (said[:1], {}, ", yes"),
            ([{"role": "user", "content": parts}], {"add_generation_prompt": False}, "a\nb, yes"),
        ):
            body = {"messages": messages, "echo": True, **fields}
            whole = (await client.post("/v1/chat/completions", json=body)).json()
            assert whole["choices"][0]["message"]["content"] == text
            streamed = await client.post("/v1/chat/completions", json={**body, "stream": True})
            chunks = [chunk["choices"][0]["delta"] for chunk in events(streamed.text)]
            assert "".join(delta.get("content", "") for delta in chunks) == text


async def test_the_openai_sdk(tmp_path):
    async with gateway(tmp_path, say("hello there"), api_key=("k",)) as server:
        client = openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="k", max_retries=0)
        whole = await client.chat.completions.create(model=MODEL, messages=CHAT["messages"], max_tokens=99)
        assert whole.choices[0].message.content == "hello there"
        assert whole._request_id
        stream = await client.chat.completions.create(
            model=MODEL, messages=CHAT["messages"], stream=True, stream_options={"include_usage": True}
        )
        parts = [chunk async for chunk in stream]
        assert "".join(c.choices[0].delta.content or "" for c in parts if c.choices) == "hello there"
        assert parts[-1].usage.completion_tokens == 12
        async with client.chat.completions.stream(model=MODEL, messages=CHAT["messages"]) as helper:
            final = await helper.get_final_completion()
        assert final.choices[0].message.content == "hello there"
        completion = await client.completions.create(model=MODEL, prompt=["a", "b"], max_tokens=5, n=2)
        assert [choice.text for choice in completion.choices] == ["hello"] * 4
        assert [model.id async for model in client.models.list()] == [MODEL]
        assert (await client.models.retrieve(MODEL)).id == MODEL
        with pytest.raises(openai.NotFoundError) as error:
            await client.chat.completions.create(model="other", messages=CHAT["messages"])
        assert error.value.code == "model_not_found"
        with pytest.raises(openai.AuthenticationError):
            await client.with_options(api_key="wrong").models.list()


async def test_models(tmp_path):
    async with app_client(tmp_path, served_model_name=("a/b", "alias")) as (client, _requester):
        body = (await client.get("/v1/models")).json()
        assert body["object"] == "list"
        assert [card["id"] for card in body["data"]] == ["a/b", "alias"]
        assert body["data"][0]["max_model_len"] == 512
        for path in ("/v1/models/a/b", "/v1/models/a%2Fb"):
            card = (await client.get(path)).json()
            card.pop("max_model_len")
            strictly(Model, card)
            assert card["id"] == "a/b"
        missing = await client.get("/v1/models/none")
        assert missing.status_code == 404
        assert missing.json()["error"]["code"] == "model_not_found"
