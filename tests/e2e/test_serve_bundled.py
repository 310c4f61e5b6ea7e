"""`pagebus serve` with the bundled model, as a new user meets it: answers, streams, SDK, bad input, NATS."""

import asyncio
import json
import re
import threading
from collections.abc import Iterator

import nats
import openai
import pytest

from pagebus.bus import subjects
from pagebus.client import Client, GenerationError
from tests.support.serve import Serve, serving


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    with serving(tmp_path_factory.mktemp("serve"), "--gateways", "2", "--executors", "2") as running:
        yield running


@pytest.fixture(scope="module")
def sdk(serve: Serve) -> openai.OpenAI:
    return openai.OpenAI(base_url=serve.url + "/v1", api_key="none", max_retries=0)


def chat(sdk: openai.OpenAI, question: str, **parameters: object) -> str:
    answer = sdk.chat.completions.create(
        model="pagebus-mini", messages=[{"role": "user", "content": question}], temperature=0, **parameters
    )
    return answer.choices[0].message.content or ""


def test_it_adds(sdk: openai.OpenAI) -> None:
    assert "372" in chat(sdk, "What is 127 + 245?")


def test_it_stops_by_itself(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(
        model="pagebus-mini", messages=[{"role": "user", "content": "Hello!"}], temperature=0
    )
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage
    assert 1 < answer.usage.completion_tokens < 200


def test_streamed_text_is_the_text(sdk: openai.OpenAI) -> None:
    question = {"role": "user", "content": "Tell me a story about a fox."}
    whole = chat(sdk, question["content"])
    pieces = list(
        sdk.chat.completions.create(
            model="pagebus-mini",
            messages=[question],
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(p.choices[0].delta.content or "" for p in pieces if p.choices)
    assert text == whole
    assert len(pieces) > 10, "it came in pieces"
    assert pieces[-1].usage
    assert len({p.id for p in pieces}) == 1


def test_the_same_seed_gives_the_same_story(sdk: openai.OpenAI) -> None:
    def tell(seed: int) -> str:
        answer = sdk.completions.create(
            model="pagebus-mini", prompt="Once upon a time", max_tokens=40, temperature=1.0, seed=seed
        )
        return answer.choices[0].text

    assert tell(1) == tell(1)
    assert len({tell(seed) for seed in range(4)}) > 1


def test_n_choices_and_stop_strings(sdk: openai.OpenAI) -> None:
    answer = sdk.completions.create(
        model="pagebus-mini",
        prompt="Once upon a time",
        max_tokens=60,
        temperature=1.0,
        seed=3,
        n=4,
        stop=["."],
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert all("." not in choice.text for choice in answer.choices)
    assert len({choice.text for choice in answer.choices}) > 1


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        (
            "/v1/chat/completions",
            {"model": "nobody", "messages": [{"role": "user", "content": "x"}]},
            404,
            "model",
        ),
        ("/v1/chat/completions", {"model": "pagebus-mini", "messages": []}, 400, "messages"),
        ("/v1/completions", {"model": "pagebus-mini", "prompt": "x", "max_tokens": -1}, 400, "max_tokens"),
        (
            "/v1/completions",
            {"model": "pagebus-mini", "prompt": "x", "temperature": "hot"},
            400,
            "temperature",
        ),
        ("/v1/completions", {"model": "pagebus-mini", "prompt": "word " * 20_000}, 400, "prompt"),
        ("/v1/completions", {"model": "pagebus-mini", "prompt": [10**6]}, 400, "prompt"),
    ],
)
def test_bad_input_is_named_and_the_next_request_works(
    serve: Serve, sdk: openai.OpenAI, path: str, body: dict[str, object], status: int, param: str
) -> None:
    got, answer = serve.post(path, body)
    assert (got, answer["error"]["param"]) == (status, param), answer
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert chat(sdk, "What is 7 * 8?").endswith("56")


def test_a_client_that_goes_away_frees_its_blocks(serve: Serve, sdk: openai.OpenAI) -> None:
    stream = sdk.completions.create(
        model="pagebus-mini",
        prompt="Once",
        max_tokens=4000,
        temperature=1.0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    deadline = threading.Event()
    for _ in range(20):  # the load is told twice a second
        if _metric(serve, "vllm:num_requests_running") >= 1:
            break
        deadline.wait(0.1)
    else:
        raise AssertionError("a running request is not shown")
    stream.close()
    for _ in range(50):
        if (
            _metric(serve, "vllm:num_requests_running") == 0
            and _metric(serve, "vllm:kv_cache_usage_perc") == 0
        ):
            return
        deadline.wait(0.1)
    raise AssertionError("blocks are still held 5 s after the client left")


def _metric(serve: Serve, name: str) -> float:
    text = serve.get("/metrics")[1].decode()
    (value,) = re.findall(rf"^{name}\{{[^}}]*\}} (\S+)$", text, re.MULTILINE)
    return float(value)


async def test_two_nats_readers_follow_one_stream(serve: Serve) -> None:
    url = serve.client_url()
    async with await Client.connect(url) as first, await Client.connect(url) as second:
        request_id = "two-readers"

        async def follow() -> list[tuple[int, str]]:
            return [(event.index, event.text) async for event in second.follow(request_id)]

        following = asyncio.create_task(follow())
        await asyncio.sleep(0.3)
        own = [
            (event.index, event.text)
            async for event in first.generate(
                messages=[{"role": "user", "content": "Tell me a story about a fox."}],
                request_id=request_id,
                temperature=0,
            )
        ]
        assert len(own) > 10
        assert await asyncio.wait_for(following, 10) == own


async def test_any_nats_client_can_ask_and_follow(serve: Serve) -> None:
    connection = await nats.connect(serve.client_url(), inbox_prefix=b"_INBOX_client")
    try:
        follower = await connection.subscribe(subjects.stream("by-hand"))
        body = {"id": "by-hand", "prompt": [300, 301, 302], "max_tokens": 5, "ignore_eos": True}
        await connection.publish(subjects.api_generate("pagebus-mini"), json.dumps(body).encode())
        events = []
        while not events or events[-1]["type"] == "tokens":
            events.append(json.loads((await follower.next_msg(timeout=20)).data))
    finally:
        await connection.close()
    ids = [token for event in events[:-1] for token in event["token_ids"]]
    assert len(ids) == 5
    assert events[-1] == {
        "type": "done",
        "id": "by-hand",
        "usage": {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8, "cached_tokens": 0},
    }


async def test_nats_and_http_agree(serve: Serve, sdk: openai.OpenAI) -> None:
    async with await Client.connect(serve.client_url()) as client:
        text = "".join(
            [event.text async for event in client.generate("Once upon a time", max_tokens=30, temperature=0)]
        )
        http = sdk.completions.create(
            model="pagebus-mini", prompt="Once upon a time", max_tokens=30, temperature=0
        )
        assert text == http.choices[0].text
        with pytest.raises(GenerationError, match="max_tokens"):
            async for _ in client.generate("x", max_tokens=-1):
                pass


async def test_a_nats_reader_that_leaves_cancels(serve: Serve) -> None:
    async with await Client.connect(serve.client_url()) as client:
        stream = client.generate("Once", max_tokens=4000, ignore_eos=True)
        await anext(stream)
        await stream.aclose()
    for _ in range(50):
        if _metric(serve, "vllm:num_requests_running") == 0:
            return
        await asyncio.sleep(0.1)
    raise AssertionError("still running")


def test_what_it_prints(serve: Serve) -> None:
    text = serve.output()
    assert f"http://127.0.0.1:{serve.port}" in text
    assert "curl" in text
    assert re.search(r"KV cache [\d,]+ tokens", text)
    assert len(text.splitlines()) < 20, text
    assert "Traceback" not in text


def test_raw_models_list(serve: Serve) -> None:
    listed = json.loads(serve.get("/v1/models")[1])
    assert [model["id"] for model in listed["data"]] == ["pagebus-mini"]
    assert serve.get("/v1/models/pagebus-mini")[0] == 200
    assert serve.get("/v1/models/no/such")[0] == 404
