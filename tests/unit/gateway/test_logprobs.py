"""Log-probabilities of made and given tokens: exact, aligned with text and ids, streamed as whole."""

import asyncio
import json
import math
from contextlib import asynccontextmanager

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from pagebus.gateway import limits
from pagebus.gateway.app import build_app
from pagebus.gateway.logprob_shapes import LogprobWriter
from pagebus.gateway.server import make_context
from pagebus.gateway.tokenizer import Tokenizer
from pagebus.requester.events import NewTokens
from pagebus.requester.packed_logprobs import TokenLogprob
from pagebus.settings.structs import GatewaySettings
from tests.support.answers import events, strictly
from tests.support.gateway import (
    EOS,
    MODEL,
    VOCAB_SIZE,
    FakeBus,
    ScriptedRequester,
    app_client,
    byte_model,
    gateway,
    ids,
    say,
)
from tests.support.logprobs import made_up, pack

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
USER = {"role": "user", "content": "hi"}


def shown(token_id: int) -> str:
    """The byte model's tokens, as they are shown."""
    return {256: "<eos>"}.get(token_id, bytes((token_id % 256,)).decode(errors="replace") * (token_id < 256))


def expected(token_ids: list[int], num_top: int, first_place: int = 0):
    return [made_up(one, first_place + at, num_top, VOCAB_SIZE) for at, one in enumerate(token_ids)]


async def test_a_chat_tells_tokens_bytes_and_the_best(tmp_path):
    async with app_client(tmp_path, say("hé")) as (client, requester):
        body = {"messages": [USER], "logprobs": True, "top_logprobs": 2}
        answer = (await client.post(CHAT, json=body)).json()
        strictly(ChatCompletion, answer)
        content = answer["choices"][0]["logprobs"]["content"]
        assert answer["choices"][0]["logprobs"]["refusal"] is None
        made = [*ids("hé"), EOS]
        assert [one["token"] for one in content] == ["h", "\ufffd", "\ufffd", "<eos>"]
        assert [one["bytes"] for one in content] == [[104], [0xC3], [0xA9], list(b"<eos>")]
        for told, want in zip(content, expected(made, 2), strict=True):
            assert told["logprob"] == want.logprob
            best = [(one["token"], one["logprob"]) for one in told["top_logprobs"]]
            assert best == [(shown(token_id), value) for token_id, value in want.top]
        sampling = requester.submitted[0].spec.sampling
        assert (sampling.num_logprobs, sampling.num_prompt_logprobs) == (2, None)
        assert answer["usage"]["completion_tokens"] == len(content)
        plain = (await client.post(CHAT, json={"messages": [USER], "logprobs": True})).json()
        assert plain["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
        for without in ({"logprobs": False}, {"logprobs": None, "top_logprobs": 0}, {}):
            none = (await client.post(CHAT, json={"messages": [USER], **without})).json()
            assert none["choices"][0]["logprobs"] is None
            assert requester.submitted[-1].spec.sampling.num_logprobs is None


async def test_chunks_of_a_chat_are_of_the_sdk_s_shape(tmp_path):
    async with app_client(tmp_path, say("aéb")) as (client, _requester):
        body = {"messages": [USER], "logprobs": True, "top_logprobs": 1, "stream": True}
        chunks = events((await client.post(CHAT, json=body)).text)
        for chunk in chunks:
            strictly(ChatCompletionChunk, chunk)
        told = [chunk["choices"][0]["logprobs"] for chunk in chunks]
        assert told[0] is None  # the role
        assert sum(len(one["content"]) for one in told if one) == 5


async def test_a_text_tells_four_arrays(tmp_path):
    async with app_client(tmp_path, say("ab")) as (client, _requester):
        body = {"prompt": "x", "logprobs": 1, "max_tokens": 2}
        answer = (await client.post(TEXT, json=body)).json()
        strictly(Completion, answer)
        assert answer["choices"][0]["logprobs"] == {
            "text_offset": [0, 1],
            "tokens": ["a", "b"],
            "token_logprobs": [-0.25, -1.0],
            "top_logprobs": [
                {"a": -0.25},
                {"d": -0.5, "b": -1.0},
            ],  # the token itself, also if it is not best
        }
        none = (await client.post(TEXT, json={**body, "logprobs": 0})).json()["choices"][0]["logprobs"]
        assert none["top_logprobs"] == [{"a": -0.25}, {"b": -1.0}]


async def test_tokens_that_look_the_same_do_not_hide_each_other(tmp_path):
    def script(request):
        request.tokens([0xC3, 0xA9], finish="length")

    async with app_client(tmp_path, script) as (client, _requester):
        body = {"prompt": "x", "logprobs": 2, "max_tokens": 2}
        told = (await client.post(TEXT, json=body)).json()["choices"][0]["logprobs"]
        first, second = expected([0xC3, 0xA9], 2)
        assert told["top_logprobs"] == [
            {"\ufffd": first.top[0][1], f"token_id:{first.top[1][0]}": first.top[1][1]},
            {"\ufffd": second.top[0][1], f"token_id:{second.top[1][0]}": second.top[1][1]},
        ]
        assert told["token_logprobs"] == [first.logprob, second.logprob]


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
@pytest.mark.parametrize("stream", [False, True])
async def test_echo_tells_the_prompt_in_the_same_arrays(tmp_path, max_tokens, stream):
    """lm-evaluation-harness's loglikelihood: several prompts of ids, max_tokens 1 (or 0)."""
    prompts = [ids("né"), [65], ids("xyz")]
    async with app_client(tmp_path, say("QRS")) as (client, requester):
        body = {
            "prompt": prompts, "echo": True, "logprobs": 1, "max_tokens": max_tokens, "temperature": 0,
            "seed": 1234, "stream": stream, "n": 2 if max_tokens == 3 else 1,
        }  # fmt: skip
        got = await client.post(TEXT, json=body)
        choices = joined_choices(events(got.text)) if stream else got.json()["choices"]
        assert [choice["index"] for choice in choices] == list(range(len(prompts) * body["n"]))
        for choice in choices:
            prompt = prompts[choice["index"] // body["n"]]
            made = ids("QRS")[:max_tokens]
            told, all_ids = choice["logprobs"], [*prompt, *made]
            assert choice["text"] == bytes(all_ids).decode()
            assert {len(column) for column in told.values()} == {len(all_ids)}
            assert told["token_logprobs"][0] is None
            assert told["top_logprobs"][0] is None
            want = [*expected(prompt, 1)[1:], *expected(made, 1)]
            assert told["token_logprobs"][1:] == [one.logprob for one in want]
            for best, one in zip(told["top_logprobs"][1:], want, strict=True):
                assert max(best.values()) == one.top[0][1]  # how lm-eval finds out what is greedy
                assert one.logprob in best.values()
            assert told["text_offset"] == offsets(all_ids)
            assert choice["finish_reason"] == "length"
        assert requester.submitted[0].spec.sampling.num_prompt_logprobs == 1
        assert max(request.spec.max_tokens for request in requester.submitted) == max(1, max_tokens)
        if not stream:
            assert got.json()["usage"]["completion_tokens"] == max_tokens * len(choices)


async def test_an_echo_without_log_probabilities_runs_nothing(tmp_path):
    async with app_client(tmp_path, say("x")) as (client, requester):
        body = {"prompt": "ab", "echo": True, "max_tokens": 0}
        assert (await client.post(TEXT, json=body)).json()["choices"][0]["text"] == "ab"
        assert requester.submitted == []


async def test_prompt_logprobs_as_in_vllm(tmp_path):
    async with app_client(tmp_path, say("x")) as (client, requester):
        body = {"prompt": ["abcd", "e"], "prompt_logprobs": 1, "max_tokens": 1, "n": 2}
        choices = (await client.post(TEXT, json=body)).json()["choices"]
        want = [None]
        for one in expected(ids("abcd"), 1)[1:]:
            entry = {
                one.token_id: {"logprob": one.logprob, "rank": one.rank, "decoded_token": shown(one.token_id)}
            }
            for place, (token_id, value) in enumerate(one.top, 1):
                entry[token_id] = {"logprob": value, "rank": place, "decoded_token": shown(token_id)}
            want.append({str(token_id): told for token_id, told in entry.items()})
        assert [choice["prompt_logprobs"] for choice in choices] == [want, want, [None], [None]]
        assert all(choice["logprobs"] is None for choice in choices)
        chat = {"messages": [USER], "prompt_logprobs": 0}
        answer = (await client.post(CHAT, json=chat)).json()
        prompt = list(requester.submitted[-1].spec.prompt)
        assert [set(entry or {None}) for entry in answer["prompt_logprobs"]] == [
            {None}, *({str(token_id)} for token_id in prompt[1:])
        ]  # fmt: skip
        both = {"prompt": "ab", "prompt_logprobs": 3, "echo": True, "logprobs": 1, "max_tokens": 0}
        (choice,) = (await client.post(TEXT, json=both)).json()["choices"]
        assert requester.submitted[-1].spec.sampling.num_prompt_logprobs == 3
        assert len(choice["prompt_logprobs"][1]) >= 3
        assert len(choice["logprobs"]["top_logprobs"][1]) <= 2


def test_prompt_elements_are_json_whatever_the_token_and_the_value(tokenizer):
    writer = LogprobWriter(tokenizer.texts)
    values = [-0.0, -1e-8, -1234.5, -math.inf, math.nan, -9999.5]
    for token_id in range(VOCAB_SIZE):
        value = values[token_id % len(values)]
        told = TokenLogprob(token_id, value, 2, [(token_id ^ 1, -0.5), (token_id, value)])
        (element,) = json.loads(b"[" + writer.prompt(pack([told], 2), 2) + b"]")
        assert list(element) == [str(token_id), str(token_id ^ 1)]
        own = element[str(token_id)]
        assert (own["rank"], own["decoded_token"]) == (2, tokenizer.texts.text(token_id))
        bounded = -9999.0 if not value > -9999.0 else value
        assert own["logprob"] == pytest.approx(bounded, rel=1e-6)
        assert element[str(token_id ^ 1)]["rank"] == 1


async def test_ids_instead_of_texts_and_beside_them(tmp_path):
    async with app_client(tmp_path, say("h")) as (client, _requester):
        both = {"return_tokens_as_token_ids": True, "return_token_ids": True}
        text = {"prompt": "ab", "logprobs": 1, **both}
        (choice,) = (await client.post(TEXT, json=text)).json()["choices"]
        assert choice["logprobs"]["tokens"] == ["token_id:104", "token_id:256"]
        assert all(key.startswith("token_id:") for best in choice["logprobs"]["top_logprobs"] for key in best)
        assert (choice["prompt_token_ids"], choice["token_ids"]) == ([97, 98], [104, EOS])
        (streamed,) = joined_choices(events((await client.post(TEXT, json={**text, "stream": True})).text))
        assert {key: streamed[key] for key in choice} == choice
        chat = {"messages": [USER], "logprobs": True, **both}
        answer = (await client.post(CHAT, json=chat)).json()
        assert answer["prompt_token_ids"] == ids("[user]hi\n[assistant]")
        assert answer["choices"][0]["token_ids"] == [104, EOS]
        assert answer["choices"][0]["logprobs"]["content"][0]["bytes"] == [104]
        chunks = events((await client.post(CHAT, json={**chat, "stream": True})).text)
        assert chunks[0]["prompt_token_ids"] == answer["prompt_token_ids"]
        assert joined_choices(chunks)[0]["token_ids"] == [104, EOS]


async def test_cached_tokens_are_told(tmp_path):
    def script(request):
        request.num_cached_tokens = 16 * len(request.spec.prompt)
        request.tokens([97], finish="length")

    async with app_client(tmp_path, script) as (client, _requester):
        body = {"prompt": ["a", "bc"], "max_tokens": 1}
        usage = (await client.post(TEXT, json=body)).json()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == 48
        options = {"stream": True, "stream_options": {"include_usage": True}}
        last = events((await client.post(TEXT, json={**body, **options})).text)[-1]
        assert last["usage"]["prompt_tokens_details"]["cached_tokens"] == 48


async def test_minus_infinity_is_a_number_in_json(tmp_path):
    def script(request):
        told = made_up(97, 2, 1, VOCAB_SIZE)._replace(logprob=-math.inf)
        request.on_event(NewTokens(0, 0, [97], "length", pack([told], 1)))

    async with app_client(tmp_path, script) as (client, _requester):
        body = {"prompt": "a", "max_tokens": 1, "logprobs": 1}
        told = (await client.post(TEXT, json=body)).json()["choices"][0]["logprobs"]
        assert told["token_logprobs"] == [-9999.0]
        assert told["top_logprobs"][0]["a"] == -9999.0


async def test_log_probabilities_that_never_came_end_one_request(tmp_path):
    def script(request):
        request.on_event(NewTokens(0, 0, [97], "length"))

    async with app_client(tmp_path, script) as (client, requester):
        answer = await client.post(TEXT, json={"prompt": "a", "max_tokens": 1, "logprobs": 1})
        assert answer.status_code == 500
        assert requester.submitted[0].is_cancelled


async def test_how_much_may_be_told_is_bounded_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("pagebus.gateway.jobs.MAX_TOLD_LOGPROBS", 20)
    async with app_client(tmp_path, say("x")) as (client, requester):
        for body, param in (
            ({"prompt": "x" * 11, "prompt_logprobs": 1}, "prompt_logprobs"),
            ({"prompt": ["x" * 6, "y" * 5], "logprobs": 1, "echo": True}, "logprobs"),
        ):
            answer = await client.post(TEXT, json=body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
        assert requester.submitted == []
        assert (await client.post(TEXT, json={"prompt": "x" * 10, "prompt_logprobs": 1})).status_code == 200
    assert limits.MAX_TOLD_LOGPROBS >= 64 * 2048 * 2


async def test_the_openai_sdk(tmp_path):
    async with gateway(tmp_path, say("ñandú", size=3)) as server:
        client = openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="k", max_retries=0)
        whole = await client.chat.completions.create(
            model=MODEL, messages=[USER], logprobs=True, top_logprobs=3, logit_bias={"5": -100, "6": 2.5}
        )
        content = whole.choices[0].logprobs.content
        assert bytes(byte for one in content[:-1] for byte in one.bytes).decode() == "ñandú"
        assert all(len(one.top_logprobs) == 3 for one in content)
        async with client.chat.completions.stream(
            model=MODEL, messages=[USER], logprobs=True, top_logprobs=3
        ) as helper:
            final = await helper.get_final_completion()
        assert final.choices[0].logprobs.content == content
        text = await client.completions.create(
            model=MODEL, prompt="a", logprobs=2, echo=True, max_tokens=5, extra_body={"prompt_logprobs": 0}
        )
        assert text.choices[0].logprobs.tokens[0] == "a"
        assert text.choices[0].logprobs.token_logprobs[0] is None
        assert len(text.choices[0].logprobs.text_offset) == 6
        assert text.choices[0].model_extra["prompt_logprobs"] == [None]
        assert server.requester.submitted[0].spec.sampling.logit_bias == {5: -100.0, 6: 2.5}
        stream = await client.completions.create(
            model=MODEL, prompt="a", logprobs=1, max_tokens=5, stream=True
        )
        parts = [chunk.choices[0] async for chunk in stream]
        assert sum(len(part.logprobs.tokens) for part in parts if part.logprobs) == 5


# Streamed and whole answers agree, token by token


def offsets(token_ids: list[int]) -> list[int]:
    """Complete characters before each byte."""
    data = bytes(token_ids)
    return [len(data[:at].decode(errors="ignore")) for at in range(len(data))]


def joined_choices(chunks: list[dict]) -> list[dict]:
    """Whole choices out of a stream's chunks."""
    joined: dict[int, dict] = {}
    for chunk in chunks:
        for part in chunk["choices"]:
            new = {"index": part["index"], "text": "", "logprobs": None, "token_ids": []}
            choice = joined.setdefault(part["index"], new)
            choice["text"] += part.get("text") or part.get("delta", {}).get("content") or ""
            choice["finish_reason"] = part["finish_reason"]
            choice["token_ids"] += part.get("token_ids", [])
            choice.setdefault("prompt_token_ids", part.get("prompt_token_ids"))
            for name, values in (part["logprobs"] or {}).items():
                told = choice["logprobs"] = choice["logprobs"] or {}
                told[name] = values if values is None else [*told.get(name, []), *values]
    return [joined[index] for index in sorted(joined)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return Tokenizer.load(byte_model(tmp_path_factory.mktemp("model")))


@asynccontextmanager
async def served(tokenizer: Tokenizer, script):
    context = make_context(GatewaySettings(model=MODEL), FakeBus(), ScriptedRequester(script), tokenizer)
    transport = httpx.ASGITransport(build_app(context))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        yield client


def deal(data: bytes, sizes: list[int], num_choices: int, has_eos: bool):
    """A script: these ids in portions of these sizes, the last one with the end."""

    def play(request):
        for choice in range(num_choices):
            left = [*data, EOS] if has_eos else list(data)
            for size in sizes:
                if len(left) > size:
                    request.tokens(left[:size], choice=choice)
                    left = left[size:]
            request.tokens(left, choice=choice, finish="stop" if has_eos else "length")

    return play


@settings(max_examples=80, deadline=None)
@given(
    text=st.text(alphabet="abxy€🙂é\u2028", max_size=20),
    has_broken_end=st.booleans(),
    sizes=st.lists(st.integers(1, 5), max_size=12),
    stop=st.lists(st.text(alphabet="abxy€", min_size=1, max_size=3), max_size=2),
    include_stop=st.booleans(),
    min_tokens=st.integers(0, 6),
    has_eos=st.booleans(),
    is_chat=st.booleans(),
    echo=st.booleans(),
    num_top=st.integers(0, 3),
)
def test_streamed_and_whole_agree(
    tokenizer, text, has_broken_end, sizes, stop, include_stop, min_tokens, has_eos, is_chat, echo, num_top
):
    data = text.encode() + (b"\xe2\x82" if has_broken_end else b"")
    common = {
        "stop": stop, "include_stop_str_in_output": include_stop, "min_tokens": min_tokens, "n": 2,
        "return_token_ids": True, "seed": 1, "max_tokens": 200,
    }  # fmt: skip
    prompt = "né"
    if is_chat:
        body = {"messages": [USER], "logprobs": True, "top_logprobs": num_top, **common}
    else:
        body = {"prompt": prompt, "logprobs": num_top, "echo": echo, **common}

    async def run() -> tuple[dict, list[dict]]:
        path = CHAT if is_chat else TEXT
        async with served(tokenizer, deal(data, sizes, 2, has_eos)) as client:
            whole = await client.post(path, json=body)
            streamed = await client.post(path, json={**body, "stream": True})
        assert whole.status_code == 200, whole.text
        return whole.json(), events(streamed.text)

    whole, chunks = asyncio.run(run())
    for choice, other in zip(whole["choices"], joined_choices(chunks), strict=True):
        answer = choice["message"]["content"] if is_chat else choice["text"]
        assert answer == other["text"]
        made = choice["token_ids"]
        assert made == other["token_ids"]
        assert ([*data, EOS] if has_eos else list(data))[: len(made)] == made
        assert choice["finish_reason"] == other["finish_reason"]
        told, streamed = choice["logprobs"], other["logprobs"]
        assert streamed == (told if made or (echo and not is_chat) else None)
        want = expected(made, num_top)
        if is_chat:
            assert [one["logprob"] for one in told["content"]] == [one.logprob for one in want]
            spelled = b"".join(bytes(one["bytes"]) for one in told["content"])
            assert spelled == b"".join(b"<eos>" if one == EOS else bytes((one,)) for one in made)
            continue
        before = ids(prompt) if echo else []
        assert {len(column) for column in told.values()} == {len(before) + len(made)}
        assert told["token_logprobs"][len(before) :] == [one.logprob for one in want]
        assert told["text_offset"] == offsets([*before, *(one for one in made if one != EOS)]) + (
            [len(bytes([*before, *made[:-1]]).decode(errors="ignore"))] if EOS in made else []
        )
        for offset, token in zip(told["text_offset"], told["tokens"], strict=True):
            if token.isascii() and token != "<eos>" and offset + len(token) <= len(answer):
                assert answer[offset : offset + len(token)] == token
    usage = whole["usage"]
    assert usage["completion_tokens"] == sum(len(choice["token_ids"]) for choice in whole["choices"])
