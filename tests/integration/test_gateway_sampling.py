"""Sampling parameters and log-probabilities from the SDK to a real small model and back, on a memory bus."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from pagebus.bus.faults import SeededFaults
from pagebus.bus.memory import MemoryBroker, NoFaults
from pagebus.client import Client
from pagebus.executor import service as executor_service
from pagebus.gateway import service as gateway_service
from pagebus.gateway.tokenizer import Tokenizer
from pagebus.scheduler import service as scheduler_service
from pagebus.settings.structs import ExecutorSettings, GatewaySettings, SchedulerSettings
from tests.support.models import VOCAB_SIZE, make_model

NAME = "tiny"
PROMPTS = [[5, 6, 7, 8] * 9, [300, 20, 41], [9], list(range(100, 170))]


@dataclass
class System:
    """Gateway, scheduler and executor in one process."""

    sdk: openai.AsyncOpenAI
    tokenizer: Tokenizer
    broker: MemoryBroker


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("model"))


@contextlib.asynccontextmanager
async def system(path: Path) -> AsyncIterator[System]:
    broker, stop = MemoryBroker(), asyncio.Event()
    listening: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    executor = ExecutorSettings(
        model=NAME, device="cpu", dtype="float32", kv_cache_memory="32MiB", num_threads=1
    )
    scheduler = SchedulerSettings(model=NAME, max_model_len=512, max_num_batched_tokens=32)
    gateway = GatewaySettings(model=NAME, port=0)
    tasks = [
        asyncio.create_task(work)
        for work in (
            scheduler_service.run(scheduler, broker.connect("scheduler"), "s-1", stop),
            executor_service.run(executor, broker.connect("executor"), path, "e-1", stop),
            gateway_service.run(
                gateway,
                broker.connect("gateway"),
                path,
                "g-1",
                stop,
                on_listening=lambda host, port: listening.set_result(port),
            ),
        )
    ]
    try:
        async with asyncio.timeout(60):
            url = f"http://127.0.0.1:{await listening}"
            async with httpx.AsyncClient(base_url=url) as client:
                while (await client.get("/ready")).status_code != 200:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
        sdk = openai.AsyncOpenAI(base_url=url + "/v1", api_key="x", max_retries=0, timeout=30)
        yield System(sdk, Tokenizer.load(path), broker)
    finally:
        stop.set()
        async with asyncio.timeout(20):
            await asyncio.gather(*tasks)


def reference(path: Path, token_ids: list[int]) -> torch.Tensor:
    """Log-probabilities of what follows each id, by transformers in float32."""  # [ids, vocabulary]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([token_ids])).logits[0].log_softmax(-1)


async def test_a_harness_s_loglikelihood_is_that_of_transformers(path):
    async with system(path) as running:
        for _ in range(2):  # the second time with a filled prefix cache
            answer = await running.sdk.completions.create(
                model=NAME, prompt=PROMPTS, max_tokens=1, echo=True, logprobs=1, temperature=0, seed=1234
            )
            only = await running.sdk.completions.create(
                model=NAME, prompt=PROMPTS, max_tokens=0, echo=True, logprobs=1, temperature=0
            )
            for prompt, choice, bare in zip(PROMPTS, answer.choices, only.choices, strict=True):
                told = choice.logprobs
                made = int(reference(path, prompt)[-1].argmax())
                want = reference(path, [*prompt, made])
                assert len(told.token_logprobs) == len(told.top_logprobs) == len(prompt) + 1
                assert told.token_logprobs[0] is None
                for at, following in enumerate([*prompt, made][1:]):
                    assert told.token_logprobs[at + 1] == pytest.approx(float(want[at, following]), abs=1e-4)
                    is_greedy = told.token_logprobs[at + 1] == max(told.top_logprobs[at + 1].values())
                    assert is_greedy == (int(want[at].argmax()) == following)
                assert bare.logprobs.token_logprobs == told.token_logprobs[:-1]


async def test_streamed_whole_and_over_nats_are_the_same(path):
    async with system(path) as running:
        fields = {"max_tokens": 12, "seed": 7, "n": 2, "temperature": 1.0}
        extra = {"ignore_eos": True, "return_token_ids": True, "cache_salt": "a"}
        prompt = PROMPTS[0]
        whole = await running.sdk.completions.create(
            model=NAME, prompt=prompt, logprobs=3, **fields, extra_body=extra
        )
        stream = await running.sdk.completions.create(
            model=NAME, prompt=prompt, logprobs=3, **fields, extra_body=extra, stream=True
        )
        values: dict[int, list[float]] = {0: [], 1: []}
        texts = {0: "", 1: ""}
        async for chunk in stream:
            for part in chunk.choices:
                texts[part.index] += part.text
                values[part.index] += part.logprobs.token_logprobs if part.logprobs else []
        over_nats: dict[int, list[float]] = {0: [], 1: []}
        made: dict[int, list[int]] = {0: [], 1: []}
        client = Client(running.broker.connect("client"), NAME)
        async for event in client.generate(prompt, logprobs=3, **fields, ignore_eos=True, cache_salt="b"):
            over_nats[event.choice] += [one.logprob for one in event.logprobs]
            made[event.choice] += event.token_ids
        assert whole.choices[0].text != whole.choices[1].text
        for choice in whole.choices:
            assert texts[choice.index] == choice.text
            assert values[choice.index] == over_nats[choice.index] == choice.logprobs.token_logprobs
            assert made[choice.index] == choice.model_extra["token_ids"]
            want = reference(path, [*prompt, *made[choice.index]])[len(prompt) - 1 : -1]
            for told, row, token_id in zip(values[choice.index], want, made[choice.index], strict=True):
                assert told == pytest.approx(float(row[token_id]), abs=1e-4)


async def test_prompt_logprobs_and_cached_tokens(path):
    async with system(path) as running:
        prompt = PROMPTS[3]
        want = reference(path, prompt)
        cached = []
        for asks in (False, True, False):
            answer = await running.sdk.completions.create(
                model=NAME, prompt=prompt, max_tokens=2, temperature=0, n=2,
                extra_body={"prompt_logprobs": 2} if asks else {},
            )  # fmt: skip
            cached.append(answer.usage.prompt_tokens_details.cached_tokens)
            for choice in answer.choices if asks else ():
                listed = choice.model_extra["prompt_logprobs"]
                assert len(listed) == len(prompt)
                for at, following in enumerate(prompt[1:]):
                    entry = listed[at + 1]
                    assert entry[str(following)]["logprob"] == pytest.approx(
                        float(want[at, following]), abs=1e-4
                    )
                    best = want[at].topk(2).indices.tolist()
                    assert set(entry) == {str(following), *map(str, best)}
                    rank = int((want[at] >= want[at, following]).sum())
                    assert abs(entry[str(following)]["rank"] - rank) <= 1
        assert cached[0] == 0
        assert cached[2] == len(prompt) // 16 * 16


async def test_every_parameter_has_its_effect(path):
    async with system(path) as running:

        async def made(**extra) -> list[int]:
            answer = await running.sdk.completions.create(
                model=NAME, prompt=PROMPTS[1], max_tokens=16, temperature=0,
                extra_body={"return_token_ids": True, "ignore_eos": True, **extra},
            )  # fmt: skip
            return answer.choices[0].model_extra["token_ids"]

        plain = await made()
        assert await made(logit_bias={"77": 100}) == [77] * 16
        assert set(await made(logit_bias={str(plain[0]): -100})).isdisjoint({plain[0]})
        assert set(await made(allowed_token_ids=[11, 12, 13])) <= {11, 12, 13}
        repeated = await made(logit_bias={"77": 20, "78": 19}, frequency_penalty=2)
        assert {77, 78} <= set(repeated)
        few = list(range(10, 18))  # with so few to choose from, some come again
        assert await made(allowed_token_ids=few, repetition_penalty=3) != await made(allowed_token_ids=few)
        word = running.tokenizer.decode([65])
        assert set(await made(allowed_token_ids=[65, 66], bad_words=[word])) == {66}
        stopped = await made(stop_token_ids=[plain[3]])
        assert stopped == plain[: plain.index(plain[3]) + 1]
        assert len(await made(stop_token_ids=list(range(128)), min_tokens=16)) == 16
        assert max(plain) < VOCAB_SIZE


@pytest.mark.slow
async def test_log_probabilities_are_the_same_bits_whatever_the_bus_loses(path):
    async with system(path) as running:

        async def ask(number: int, salt: str) -> list[tuple[str, list[int], list[float | None]]]:
            answer = await running.sdk.with_options(timeout=120).completions.create(
                model=NAME, prompt=[(7 * number + at) % 450 for at in range(5 + 13 * number)],
                n=1 + number % 2, max_tokens=1 + 3 * (number % 4), seed=number, logprobs=2, echo=True,
                presence_penalty=0.5,
                extra_body={"return_token_ids": True, "cache_salt": salt, "ignore_eos": True},
            )  # fmt: skip
            return [
                (choice.text, choice.model_extra["token_ids"], choice.logprobs.token_logprobs)
                for choice in answer.choices
            ]

        undisturbed = [await ask(number, "one by one") for number in range(8)]
        running.broker.faults = SeededFaults(3, loss=0.05, duplication=0.1, delay=0.2, max_delay_s=0.03)
        disturbed = await asyncio.gather(*(ask(number, "together") for number in range(8)))
        running.broker.faults = NoFaults()
        assert disturbed == undisturbed
