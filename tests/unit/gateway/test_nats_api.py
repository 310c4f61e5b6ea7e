"""The JSON interface on the bus, with the client library: the same parameters as over HTTP."""

import asyncio
import contextlib
import json

import pytest

from pagebus.bus import subjects
from pagebus.bus.memory import MemoryBroker
from pagebus.bus.messages import Sampling
from pagebus.client import Client, GenerationError
from pagebus.gateway import api_events
from pagebus.gateway.nats_api import NatsApi
from pagebus.gateway.server import make_context
from pagebus.gateway.tokenizer import Tokenizer
from pagebus.settings.structs import GatewaySettings
from tests.support.gateway import EOS, MODEL, VOCAB_SIZE, ScriptedRequester, byte_model, ids, say
from tests.support.logprobs import made_up


class World:
    """A gateway's NATS side and a client on one memory bus; `heard` is everything on the streams."""

    def __init__(self, path, script) -> None:
        self.broker = MemoryBroker()
        self.requester = ScriptedRequester(script)
        self.tokenizer = Tokenizer.load(byte_model(path))
        bus = self.broker.connect("gateway")
        context = make_context(GatewaySettings(model=MODEL), bus, self.requester, self.tokenizer)
        self.api = NatsApi(context, bus, MODEL)
        self.bus = self.broker.connect("client")
        self.client = Client(self.bus, MODEL)
        self.heard: list[dict] = []

    def hear(self, msg) -> None:
        self.heard.append(json.loads(msg.data))


@contextlib.asynccontextmanager
async def world(path, script=None):
    running = World(path, script or say("hé"))
    await running.api.start()
    await running.bus.subscribe("pagebus.stream.*", running.hear)
    try:
        yield running
    finally:
        await running.api.close()
        running.tokenizer.close()


async def test_text_tokens_and_log_probabilities(tmp_path):
    async with world(tmp_path) as running:
        parameters = {
            "logprobs": 2, "prompt_logprobs": 1, "logit_bias": {"5": -3.5}, "bad_words": ["x"],
            "presence_penalty": 1.0, "allowed_token_ids": [1, 2],
        }  # fmt: skip
        got = [event async for event in running.client.generate("abcde", **parameters)]
        assert "".join(event.text for event in got) == "hé"
        made = [token_id for event in got for token_id in event.token_ids]
        assert made == [*ids("hé"), EOS]
        told = [one for event in got for one in event.logprobs or ()]
        for one, want in zip(told, [made_up(t, at, 2, VOCAB_SIZE) for at, t in enumerate(made)], strict=True):
            assert (one.token_id, one.logprob, one.rank) == (want.token_id, want.logprob, want.rank)
            assert [(top.token_id, top.logprob) for top in one.top_logprobs] == want.top
        assert [bytes(one.bytes) for one in told] == [b"h", b"\xc3", b"\xa9", b"<eos>"]
        prompt = [one for event in got for one in event.prompt_logprobs or ()]
        assert prompt[0] is None
        assert [one.token_id for one in prompt[1:]] == ids("bcde")
        assert [one.logprob for one in prompt[1:]] == [
            made_up(t, at, 1, VOCAB_SIZE).logprob for at, t in enumerate(ids("abcde")) if at
        ]
        has_prompt = [event.prompt_logprobs is not None for event in got]
        assert has_prompt == sorted(has_prompt, reverse=True)
        sampling = running.requester.submitted[0].spec.sampling
        assert sampling == Sampling(
            seed=sampling.seed, presence_penalty=1.0, logit_bias={5: -3.5}, bad_words=sampling.bad_words,
            allowed_token_ids=sampling.allowed_token_ids, num_logprobs=2, num_prompt_logprobs=1,
        )  # fmt: skip
        assert sampling.bad_words
        assert sampling.allowed_token_ids


async def test_a_chat_without_log_probabilities_has_none(tmp_path):
    async with world(tmp_path) as running:
        messages = [{"role": "user", "content": "hi"}]
        got = [event async for event in running.client.generate(messages=messages, max_tokens=9)]
        assert all(event.logprobs is None and event.prompt_logprobs is None for event in got)
        got = [event async for event in running.client.generate(messages=messages, logprobs=True, n=2)]
        assert sum(len(event.logprobs) for event in got) == 8
        assert all(one.top_logprobs == [] for event in got for one in event.logprobs)


async def test_long_prompts_are_told_in_several_events(tmp_path, monkeypatch):
    def script(request):
        request.tell_prompt(size=20)
        say("x")(request)

    monkeypatch.setattr(api_events, "PROMPT_TOKENS_AN_EVENT", 7)
    async with world(tmp_path, script) as running:
        got = [event async for event in running.client.generate("p" * 50, prompt_logprobs=0)]
        parts = [event.prompt_logprobs for event in got if event.prompt_logprobs]
        assert [len(part) for part in parts] == [8, 7, 6, 7, 7, 6, 7, 2]
        assert [one for part in parts for one in part].count(None) == 1


async def test_usage_tells_cached_tokens(tmp_path):
    def script(request):
        request.num_cached_tokens = 2
        say("ab")(request)

    async with world(tmp_path, script) as running:
        async for _ in running.client.generate("abc", max_tokens=2):
            pass
        await asyncio.sleep(0.01)
        assert running.heard[-1]["usage"] == {
            "prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5, "cached_tokens": 2,
        }  # fmt: skip


@pytest.mark.parametrize(
    ("parameters", "param"),
    [
        ({"logprobs": 21}, "logprobs"),
        ({"logit_bias": {"260": 1.0}}, "logit_bias"),
        ({"bad_words": [""]}, "bad_words[0]"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"echo": True}, "echo"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ],
)
async def test_what_is_wrong_is_named(tmp_path, parameters, param):
    async with world(tmp_path) as running:
        with pytest.raises(GenerationError) as raised:
            async for _ in running.client.generate("x", **parameters):
                pass
        assert raised.value.error.param == param
        assert running.requester.submitted == []
        chat = {"id": "c", "messages": [{"role": "user", "content": "x"}], "top_logprobs": 3}
        answer = await running.bus.request(
            subjects.api_generate(MODEL), json.dumps(chat).encode(), timeout_s=1
        )
        assert json.loads(answer.data)["error"]["param"] == "top_logprobs"
