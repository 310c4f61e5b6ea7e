"""The same request gives the same tokens alone, among 32 others, preempted, after a hit and a restart."""

import concurrent.futures
import random
from pathlib import Path

from tests.support.models import VOCAB_SIZE, make_model
from tests.support.serve import Serve, serving

PROMPT = list(range(20, 70))
ALL_ON = {
    "prompt": PROMPT,
    "max_tokens": 40,
    "n": 3,
    "seed": 11,
    "temperature": 1.3,
    "top_p": 0.95,
    "top_k": 200,
    "min_p": 0.001,
    "presence_penalty": 0.4,
    "frequency_penalty": 0.3,
    "repetition_penalty": 1.2,
    "logit_bias": {"7": 2.0, "9": -100},
    "min_tokens": 5,
    "stop_token_ids": [3],
    "logprobs": 2,
    "ignore_eos": True,
}


def ask(serve: Serve, body: dict[str, object]) -> list[dict[str, object]]:
    status, answer = serve.post("/v1/completions", {"model": "exact", **body}, timeout_s=120)
    assert status == 200, answer
    choices = answer["choices"]
    assert isinstance(choices, list)
    return choices


def others() -> list[dict[str, object]]:
    rng = random.Random(3)
    return [
        {
            "prompt": [rng.randrange(5, VOCAB_SIZE - 50) for _ in range(rng.randint(1, 90))],
            "max_tokens": rng.randint(5, 50),
            "seed": i,
            "temperature": rng.choice([0.0, 1.0]),
            "ignore_eos": True,
        }
        for i in range(32)
    ]


def test_every_parameter_on_is_repeatable_bit_for_bit(tmp_path: Path) -> None:
    path = make_model("llama", tmp_path / "llama")
    flags = [str(path), "--dtype", "float32", "--served-model-name", "exact"]
    runs: dict[str, list[dict[str, object]]] = {}
    with serving(tmp_path, *flags) as serve, concurrent.futures.ThreadPoolExecutor(33) as pool:
        runs["alone"] = ask(serve, ALL_ON)
        runs["by prefix hit"] = ask(serve, ALL_ON)
        busy = [pool.submit(ask, serve, body) for body in others()]
        runs["among others"] = ask(serve, {**ALL_ON, "cache_salt": "new"})
        for each in busy:
            each.result()
    with (
        serving(tmp_path, *flags, "--kv-cache-memory", "3MiB", "--max-num-batched-tokens", "64") as serve,
        concurrent.futures.ThreadPoolExecutor(33) as pool,
    ):
        busy = [pool.submit(ask, serve, body) for body in others()]
        runs["restarted, on a tiny pool"] = ask(serve, ALL_ON)
        for each in busy:
            each.result()
    texts = [choice["text"] for choice in runs["alone"]]
    assert len(set(texts)) == 3, "each choice has its own noise"
    for name, choices in runs.items():
        assert choices == runs["alone"], name
