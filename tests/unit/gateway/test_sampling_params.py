"""A request's sampling parameters: what reaches the executor, the model's own defaults, bad words as ids."""

import json
import logging

import pytest

from pagebus.bus.messages import Sampling, unpack_ids
from pagebus.gateway.sampling_params import SamplingDefaults, bad_word_ids, read_defaults
from pagebus.gateway.tokenizer import Tokenizer
from tests.support.gateway import MAX_MODEL_LEN, ScriptedRequester, app_client, byte_model, ids, say
from tests.support.tokenizers import KINDS, make_tokenizer

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
USER = {"role": "user", "content": "hi"}


def last(requester: ScriptedRequester) -> Sampling:
    return requester.submitted[-1].spec.sampling


async def test_everything_reaches_the_request(tmp_path):
    async with app_client(tmp_path, say("x")) as (client, requester):
        body = {
            "presence_penalty": 0.5, "frequency_penalty": -2, "repetition_penalty": 1.3,
            "logit_bias": {"65": -100, "0": 100, "259": 0.5}, "bad_words": ["no", " No"],
            "allowed_token_ids": [5, 3, 5, 259], "min_tokens": 3, "ignore_eos": True,
            "stop_token_ids": [7], "length_penalty": 1.0, "use_beam_search": False, "best_of": None,
        }  # fmt: skip
        for path, fields in ((CHAT, {"messages": [USER]}), (TEXT, {"prompt": "x"})):
            answer = await client.post(path, json={**fields, **body})
            assert answer.status_code == 200, answer.text
            sampling = last(requester)
            assert sampling.presence_penalty == 0.5
            assert sampling.frequency_penalty == -2.0
            assert sampling.repetition_penalty == 1.3
            assert sampling.logit_bias == {65: -100.0, 0: 100.0, 259: 0.5}
            assert list(unpack_ids(sampling.allowed_token_ids)) == [3, 5, 259]
            assert [bytes(list(unpack_ids(word))) for word in sampling.bad_words] == [b"no", b"No"]
            spec = requester.submitted[-1].spec
            assert (spec.min_tokens, list(spec.stop_token_ids)) == (3, [7])
        await client.post(TEXT, json={"prompt": "x"})
        assert last(requester) == Sampling(seed=last(requester).seed)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"temperature": 5e-324}, {"temperature": 0.0}),
        ({"temperature": 1e-5}, {"temperature": 1e-5}),
        ({"top_p": 0}, {"top_p": 1.0, "top_k": 1}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"logit_bias": {}}, {"logit_bias": {}}),
        ({"seed": -1}, {"seed": (1 << 63) - 1}),
        ({"bad_words": []}, {"bad_words": ()}),
    ],
)
async def test_edges(tmp_path, fields, expected):
    async with app_client(tmp_path, say("x")) as (client, requester):
        assert (await client.post(TEXT, json={"prompt": "x", **fields})).status_code == 200
        assert {name: getattr(last(requester), name) for name in expected} == expected


async def test_prompts_of_one_request_have_own_seeds_unless_it_is_fixed(tmp_path):
    async with app_client(tmp_path, say("x")) as (client, requester):
        for seed in (None, 5):
            requester.submitted.clear()
            await client.post(TEXT, json={"prompt": ["a", "b", "c"], "seed": seed, "bad_words": ["x"]})
            seeds = [request.spec.sampling.seed for request in requester.submitted]
            assert len(set(seeds)) == (3 if seed is None else 1)
            assert all(request.spec.sampling.bad_words for request in requester.submitted)


async def test_allowed_ids_times_choices_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("pagebus.gateway.sampling_params.MAX_ALLOWED_TOKEN_IDS", 400)
    async with app_client(tmp_path, say("x")) as (client, _requester):
        body = {"prompt": "x", "allowed_token_ids": list(range(200))}
        assert (await client.post(TEXT, json={**body, "n": 2})).status_code == 200
        refused = await client.post(TEXT, json={**body, "n": 3})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "allowed_token_ids")


# The model's own defaults


CONFIG = {
    "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.05,
    "max_new_tokens": 77, "do_sample": False, "eos_token_id": 256,
}  # fmt: skip


@pytest.mark.parametrize("mode", ["auto", "vllm"])
async def test_generation_config_counts_where_the_request_is_silent(tmp_path, mode):
    byte_model(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(CONFIG))
    async with app_client(tmp_path, say("x"), generation_config=mode) as (client, requester):
        await client.post(CHAT, json={"messages": [USER], "seed": 1})
        silent, spec = last(requester), requester.submitted[-1].spec
        if mode == "vllm":
            assert silent == Sampling(seed=1)
            assert spec.max_tokens == MAX_MODEL_LEN - len(spec.prompt)
            return
        assert silent == Sampling(
            seed=1, temperature=0.6, top_p=0.95, top_k=20, min_p=0.05, repetition_penalty=1.05
        )
        assert spec.max_tokens == 77
        loud = {"temperature": 0, "top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1}
        await client.post(CHAT, json={"messages": [USER], "seed": 1, "max_tokens": 100, **loud})
        assert last(requester) == Sampling(seed=1, temperature=0.0)
        assert requester.submitted[-1].spec.max_tokens == 100
        await client.post(TEXT, json={"prompt": "x"})
        assert requester.submitted[-1].spec.max_tokens == 16  # OpenAI's own default
        assert last(requester).temperature == 0.6


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, SamplingDefaults()),
        ({"top_k": -1, "temperature": None}, SamplingDefaults()),
        ({"temperature": 0}, SamplingDefaults(temperature=0.0)),
        ({"temperature": "hot"}, None),
        ({"temperature": True}, None),
        ({"temperature": float("nan")}, None),
        ({"top_p": 1.5}, None),
        ({"top_k": 2.5}, None),
        ({"top_k": -2}, None),
        ({"repetition_penalty": 0}, None),
        ({"max_new_tokens": 0}, None),
        ({"max_new_tokens": "9"}, None),
        ({"min_p": [0.1]}, None),
    ],
)
def test_broken_defaults_are_left_out_with_a_warning(config, expected, caplog):
    with caplog.at_level(logging.WARNING):
        assert read_defaults(config) == (expected or SamplingDefaults())
    assert bool(caplog.records) == (expected is None)
    assert all(next(iter(config)) in record.getMessage() for record in caplog.records)


# Bad words


def spelled(tokenizer: Tokenizer, words: list[str]) -> list[list[int]]:
    return [list(unpack_ids(word)) for word in bad_word_ids(words, tokenizer)]


def test_bad_words_of_bytes_need_no_space_before_them(tmp_path):
    tokenizer = Tokenizer.load(byte_model(tmp_path))
    assert spelled(tokenizer, ["né", "a b", "  x", " "]) == [ids("né"), ids("a b"), ids("x"), ids(" ")]


@pytest.mark.parametrize("kind", KINDS)
def test_bad_words_with_and_without_a_space(tmp_path, kind):
    """What a model would make in the middle of a text, and at its beginning."""
    make_tokenizer(tmp_path, kind)
    tokenizer = Tokenizer.load(tmp_path)
    for word in ("the", "and", "hello"):
        found = spelled(tokenizer, [word])
        for text in (word, " " + word):
            encoded = tokenizer.encode(text, add_special_tokens=False)
            assert any(encoded[-len(one) :] == one for one in found)
    assert spelled(tokenizer, ["the", "the", " the"]) == spelled(tokenizer, ["the"])
