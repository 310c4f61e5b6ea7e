"""32 concurrent streams through every service give transformers' own greedy tokens, whatever the horizon."""

import asyncio
import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import pagebus.bundled
from pagebus.client import Client
from tests.support import reference
from tests.support.models import make_model
from tests.support.serve import serving

NUM_STREAMS = 32
NUM_TOKENS = 48
BUNDLED = Path(next(iter(pagebus.bundled.__path__)))


async def generate_all(
    url: str, model: str, prompts: list[list[int]], *, ignore_eos: bool
) -> list[list[int]]:
    async with await Client.connect(url, model=model) as client:

        async def one(prompt: list[int], delay_s: float) -> list[int]:
            await asyncio.sleep(delay_s)
            ids: list[int] = []
            stream = client.generate(prompt, max_tokens=NUM_TOKENS, temperature=0, ignore_eos=ignore_eos)
            async for event in stream:
                ids += event.token_ids
            return ids

        return await asyncio.gather(*(one(prompt, i * 0.01) for i, prompt in enumerate(prompts)))


def random_prompts(vocab_size: int) -> list[list[int]]:
    rng = random.Random(7)
    return [[rng.randrange(5, vocab_size) for _ in range(rng.randint(1, 70))] for _ in range(NUM_STREAMS)]


def bundled_prompts() -> list[list[int]]:
    rng = random.Random(8)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    questions = [
        f"What is {rng.randrange(1000)} {rng.choice('+-')} {rng.randrange(1000)}?"
        for _ in range(NUM_STREAMS - 2)
    ]
    questions += ["Tell me a story about a fox.", "What is pagebus?"]
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": q}], add_generation_prompt=True, return_dict=False
        )
        for q in questions
    ]


@pytest.mark.parametrize(
    ("kind", "horizon", "kv_memory"),
    [
        ("bundled", 1, "auto"),
        ("bundled", 8, "auto"),
        ("llama", 1, "auto"),
        ("llama", 8, "auto"),
        ("llama", 4, "3MiB"),  # 64 blocks for rows that want 250: many are preempted
        ("qwen3", 1, "auto"),
        ("qwen3", 8, "auto"),
    ],
)
def test_streams_give_the_greedy_tokens(tmp_path: Path, kind: str, horizon: int, kv_memory: str) -> None:
    path = BUNDLED if kind == "bundled" else make_model(kind, tmp_path / kind)
    model = reference.load(path)
    prompts = bundled_prompts() if kind == "bundled" else random_prompts(model.config.vocab_size)
    eos_ids = model.generation_config.eos_token_id if kind == "bundled" else []
    arguments = ["--horizon", str(horizon), "--dtype", "float32", "--served-model-name", "exact"]
    arguments += ["--kv-cache-memory", kv_memory]
    if kind != "bundled":
        arguments.insert(0, str(path))
    with serving(tmp_path, *arguments) as serve:
        url = serve.client_url()
        results = asyncio.run(generate_all(url, "exact", prompts, ignore_eos=not eos_ids))
    for prompt, ids in zip(prompts, results, strict=True):
        reference.assert_greedy(model, prompt, ids, NUM_TOKENS, eos_ids)
    assert len({tuple(ids) for ids in results}) > NUM_STREAMS // 2, "the streams differ from each other"
