"""The rest of a stream, from any of its events on, is exactly what an undisturbed reader would have got."""

import asyncio
import dataclasses
import json
import random

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagebus.gateway.app import build_app
from pagebus.gateway.server import make_context
from pagebus.gateway.tokenizer import Tokenizer
from pagebus.settings.structs import GatewaySettings
from tests.support.gateway import EOS, MODEL, FakeBus, ScriptedRequester, byte_model
from tests.support.resuming import FakeStreams, Made, play_all

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(byte_model(tmp_path_factory.mktemp("model")))


def blocks(text: str) -> list[tuple[str | None, str]]:
    """(id, data) of every event."""
    found = []
    for block in text.split("\n\n")[:-1]:
        lines = block.split("\n")
        event_id = lines.pop(0).removeprefix("id: ") if lines[0].startswith("id: ") else None
        (line,) = lines
        assert line.startswith("data: ")
        found.append((event_id, line[6:]))
    return found


def joined(chunks: list[str]) -> dict:
    """What all chunks together say, by choice; how often roles, ends and usages came."""
    assert chunks[-1] == "[DONE]"
    assert chunks.count("[DONE]") == 1
    whole: dict = {"usage": [], "choices": {}}
    for chunk in chunks[:-1]:
        body = json.loads(chunk)
        whole.setdefault("head", {key: body[key] for key in ("id", "created", "model", "object")})
        assert whole["head"] == {key: body[key] for key in ("id", "created", "model", "object")}
        if not body["choices"]:
            whole["usage"].append(body["usage"])
        for choice in body["choices"]:
            one = whole["choices"].setdefault(
                choice["index"], {"text": "", "ids": [], "ends": [], "roles": 0, "told": []}
            )
            delta = choice.get("delta", {})
            assert not one["ends"], "something came after the end"
            one["text"] += delta.get("content") or choice.get("text") or ""
            one["roles"] += "role" in delta
            one["ids"] += choice.get("token_ids") or []
            if choice["finish_reason"]:
                one["ends"].append(choice["finish_reason"])
            if choice["logprobs"]:
                columns = choice["logprobs"]
                one["told"] += columns.get("content") or list(
                    zip(*(columns[name] for name in sorted(columns)), strict=True)
                )
    return whole


CHOICES = st.lists(
    st.tuples(st.text(alphabet="abxy€🙂é\u2028", max_size=12), st.booleans(), st.booleans()),
    min_size=1,
    max_size=3,
)


@settings(max_examples=250, deadline=None)
@given(
    choices=CHOICES,
    stop=st.lists(st.text(alphabet="abxy€", min_size=1, max_size=3), max_size=2),
    options=st.fixed_dictionaries(
        {
            "include_stop_str_in_output": st.booleans(),
            "min_tokens": st.integers(0, 6),
            "return_token_ids": st.booleans(),
        }
    ),
    num_top=st.none() | st.integers(0, 2),
    is_chat=st.booleans(),
    echo=st.booleans(),
    num_prompts=st.integers(1, 2),
    has_usage=st.booleans(),
    seed=st.integers(0, 1 << 32),
)
def test_before_and_after_any_cut_joined(
    tokenizer, choices, stop, options, num_top, is_chat, echo, num_prompts, has_usage, seed
):
    rng = random.Random(seed)
    made = []
    for text, has_broken_end, has_eos in choices:
        data = [*text.encode(), *(b"\xe2\x82" if has_broken_end else b"")]
        made.append(Made([*data, EOS], "stop") if has_eos or not data else Made(data, "length"))
    body = {"n": len(made), "stop": stop, "seed": 1, "max_tokens": 200, "stream": True, **options}
    body["stream_options"] = {"include_usage": has_usage}
    if is_chat:
        body |= {"messages": [{"role": "user", "content": "né"}], "echo": echo}
        body |= {"add_generation_prompt": False, "continue_final_message": echo}
        if num_top is not None:
            body |= {"logprobs": True, "top_logprobs": num_top}
    else:
        body |= {"prompt": ["né", "ab"][:num_prompts], "logprobs": num_top, "echo": echo}

    async def run() -> None:
        requester = ScriptedRequester(play_all(made, rng))
        context = make_context(GatewaySettings(model=MODEL), FakeBus(), requester, tokenizer)
        context = dataclasses.replace(context, streams=FakeStreams(requester, made, rng))
        transport = httpx.ASGITransport(build_app(context))
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            answer = await client.post(CHAT if is_chat else TEXT, json=body)
            assert answer.status_code == 200, answer.text
            assert answer.headers["x-pagebus-resumable"] == "true"
            before = blocks(answer.text)
            want = joined([data for _, data in before])
            url = f"/v1/streams/{want['head']['id']}"
            ids = [event_id for event_id, _ in before[:-1]]
            assert None not in ids
            assert len(set(ids)) == len(ids)
            for cut in rng.sample(range(-1, len(ids)), min(len(ids) + 1, 6)):
                after = {} if cut < 0 else {"last-event-id": ids[cut]}
                rest = await client.get(url, headers=after)
                assert rest.status_code == 200, rest.text
                got = [data for _, data in before[: cut + 1]] + [data for _, data in blocks(rest.text)]
                assert joined(got) == want, (cut, ids[cut])

    asyncio.run(asyncio.wait_for(run(), 20))
