"""The gateway's service with the real requester, scheduler and executor (a fake model) on one bus."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest

from pagebus.bus.memory import MemoryBroker
from pagebus.executor import service as executor_service
from pagebus.executor.fake import fake_sequence
from pagebus.gateway import service as gateway_service
from pagebus.gateway.server import listen
from pagebus.gateway.text_errors import TokenizerLoadError
from pagebus.gateway.tokenizer import Tokenizer
from pagebus.scheduler import service as scheduler_service
from pagebus.settings.structs import ExecutorSettings, GatewaySettings, SchedulerSettings
from tests.support.gateway import EOS, MODEL, byte_model

CONTEXT = 2048


@dataclass
class System:
    """Three services on a memory bus."""

    client: httpx.AsyncClient
    url: str
    tokenizer: Tokenizer
    stop: asyncio.Event
    tasks: list[asyncio.Task[None]]


def model_path(folder: Path) -> Path:
    """The byte model with as many logits as the fake model has."""
    path = byte_model(folder)
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 512}))
    return path


@contextlib.asynccontextmanager
async def system(folder: Path, **fields) -> AsyncIterator[System]:
    path = model_path(folder)
    broker, stop = MemoryBroker(), asyncio.Event()
    listening: asyncio.Future[tuple[str, int]] = asyncio.get_running_loop().create_future()
    limits = SchedulerSettings(model=MODEL, max_model_len=CONTEXT)
    tasks = [
        asyncio.create_task(work)
        for work in (
            scheduler_service.run(limits, broker.connect("scheduler"), "s-1", stop),
            executor_service.run(
                ExecutorSettings(model=MODEL, fake=True), broker.connect("executor"), path, "e-1", stop
            ),
            gateway_service.run(
                GatewaySettings(model=MODEL, port=0, **fields),
                broker.connect("gateway"),
                path,
                "g-1",
                stop,
                on_listening=lambda host, port: listening.set_result((host, port)),
            ),
        )
    ]
    try:
        async with asyncio.timeout(10):
            _, port = await listening
            url = f"http://127.0.0.1:{port}"
            async with httpx.AsyncClient(base_url=url, timeout=20) as client:
                while (await client.get("/ready")).status_code != 200:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
        async with httpx.AsyncClient(base_url=url, timeout=20) as client:
            yield System(client, url, Tokenizer.load(path), stop, tasks)
    finally:
        stop.set()
        async with asyncio.timeout(20):
            await asyncio.gather(*tasks)


def expected(tokenizer: Tokenizer, prompt: list[int], num_ids: int) -> str:
    return tokenizer.decode(fake_sequence(prompt, num_ids, stop_token_ids=[EOS]))


async def test_streams_and_whole_answers_say_what_the_model_says(tmp_path):
    async with system(tmp_path) as running:
        client = openai.AsyncOpenAI(base_url=running.url + "/v1", api_key="x", max_retries=0)

        async def one(number: int) -> None:
            prompt = [number % 250, *range(number)]
            want = expected(running.tokenizer, prompt, 40)
            fields = {"model": MODEL, "prompt": prompt, "max_tokens": 40, "temperature": 0}
            if number % 2:
                answer = await client.completions.create(**fields)
                assert answer.choices[0].text == want
            else:
                stream = await client.completions.create(**fields, stream=True)
                assert "".join([chunk.choices[0].text async for chunk in stream]) == want

        await asyncio.gather(*(one(number) for number in range(32)))
        beat = (await running.client.get("/ready")).json()
        assert beat["num_executors"] == 1
        assert beat["max_model_len"] == CONTEXT


async def test_chat_and_limits_of_the_scheduler(tmp_path):
    async with system(tmp_path) as running:
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 10, "temperature": 0, "n": 3}
        answer = (await running.client.post("/v1/chat/completions", json=body)).json()
        want = expected(running.tokenizer, list(b"[user]hi\n[assistant]"), 10)
        assert [choice["message"]["content"] for choice in answer["choices"]] == [want] * 3
        assert (await running.client.get("/v1/models")).json()["data"][0]["max_model_len"] == CONTEXT
        too_long = await running.client.post("/v1/completions", json={"prompt": "x" * CONTEXT})
        assert too_long.json()["error"]["code"] == "context_length_exceeded"


async def test_a_client_that_leaves_frees_its_blocks(tmp_path):
    async with system(tmp_path) as running:

        async def state() -> dict:
            return (await running.client.get("/ready")).json()

        num_free = (await state())["num_free_blocks"]
        body = {"prompt": "x", "max_tokens": CONTEXT - 100, "ignore_eos": True, "stream": True}
        async with running.client.stream("POST", "/v1/completions", json=body) as answer:
            async for _ in answer.aiter_lines():
                break
        async with asyncio.timeout(5):
            while True:
                now = await state()
                if now["num_running"] == 0 and now["num_free_blocks"] == num_free:
                    break
                await asyncio.sleep(0.05)
        assert (await running.client.get("/metrics")).text.count('finished_reason="abort"') == 1


async def test_stop_ends_all_services(tmp_path):
    async with system(tmp_path) as running:
        prompt = list(b"abc")
        body = {"prompt": prompt, "max_tokens": 30, "temperature": 0, "stream": True}
        answer = await running.client.post("/v1/completions", json=body)
        assert answer.text.endswith("data: [DONE]\n\n")
        running.stop.set()
        async with asyncio.timeout(10):
            await asyncio.gather(*running.tasks)
        with pytest.raises(httpx.ConnectError):
            await running.client.get("/health")


async def test_a_port_in_use_and_broken_model_files_raise(tmp_path):
    taken = listen("127.0.0.1", 0)
    port = taken.getsockname()[1]
    bus = MemoryBroker().connect("gateway")
    settings = GatewaySettings(model=MODEL, port=port)
    with pytest.raises(OSError, match="in use"):
        await gateway_service.run(settings, bus, byte_model(tmp_path), "g", asyncio.Event())
    taken.close()
    with pytest.raises(TokenizerLoadError):
        await gateway_service.run(
            GatewaySettings(model=MODEL, port=0), bus, tmp_path / "nothing", "g", asyncio.Event()
        )


async def test_two_gateways_share_a_port():
    first = listen("127.0.0.1", 0, reuse_port=True)
    second = listen("127.0.0.1", first.getsockname()[1], reuse_port=True)
    assert first.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT)
    first.close()
    second.close()
