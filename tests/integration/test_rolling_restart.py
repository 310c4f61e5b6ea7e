"""Every service of a real `pagebus serve` is replaced under load: no request fails, every token is right."""

import asyncio
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from pagebus.bus.messages import Sampling
from pagebus.client import Client
from pagebus.executor.fake import fake_sequence
from tests.support.serve import Serve, serving

MODEL = "rolling"
STEP_S = "0.004"
NUM_KEPT_ALIVE, NUM_NEW, NUM_NATS = 20, 20, 10


@dataclass
class Load:
    """What clients saw."""

    num_ended: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    longest_pause_s: float = 0.0
    is_over: bool = False


async def over_http(
    client: httpx.AsyncClient, prompt: list[int], num: int, seed: int
) -> AsyncIterator[list[int]]:
    body = {
        "model": MODEL, "prompt": prompt, "max_tokens": num, "stream": True, "ignore_eos": True,
        "temperature": seed % 2, "seed": seed, "return_token_ids": True,
    }  # fmt: skip
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            raise RuntimeError(f"{answer.status_code}: {(await answer.aread())[:300]!r}")
        is_done = False
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                is_done = True
            elif line.startswith("data: "):
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise RuntimeError(str(chunk["error"]))
                for choice in chunk["choices"]:
                    yield choice.get("token_ids") or []
        if not is_done:
            raise RuntimeError("the stream ended in the middle")


async def over_nats(client: Client, prompt: list[int], num: int, seed: int) -> AsyncIterator[list[int]]:
    stream = client.generate(prompt, max_tokens=num, temperature=seed % 2, seed=seed, ignore_eos=True)
    async for event in stream:
        yield event.token_ids


async def one_after_the_other(load: Load, name: str, number: int, serve: Serve, nats: Client) -> None:
    """Requests of one client, until the load is over."""
    rng = random.Random(number)
    limits = httpx.Limits(max_keepalive_connections=0) if name == "new" else httpx.Limits()
    async with httpx.AsyncClient(base_url=serve.url, timeout=60.0, limits=limits) as http:
        for turn in itertools.count():
            if load.is_over:
                return
            prompt = [rng.randrange(3, 500) for _ in range(rng.randint(1, 60))]
            num, seed = rng.randint(1, 150), number * 1000 + turn
            events = (
                over_nats(nats, prompt, num, seed) if name == "nats" else over_http(http, prompt, num, seed)
            )
            made: list[int] = []
            heard_s = time.monotonic()
            try:
                async for ids in events:
                    made += ids
                    if ids:
                        load.longest_pause_s = max(load.longest_pause_s, time.monotonic() - heard_s)
                        heard_s = time.monotonic()
            except Exception as error:
                load.faults.append(f"{name} {number}: {type(error).__name__}: {error}")
                continue
            sampling = Sampling(temperature=float(seed % 2), seed=seed)
            if made != fake_sequence(prompt, num, sampling=sampling):
                load.faults.append(f"{name} {number}: wrong tokens, {len(made)} of {num}")
            load.num_ended[name] = load.num_ended.get(name, 0) + 1
            await asyncio.sleep(rng.uniform(0.0, 0.2))


async def under_load(serve: Serve, trouble) -> Load:
    load = Load()
    kinds = ["kept alive"] * NUM_KEPT_ALIVE + ["new"] * NUM_NEW + ["nats"] * NUM_NATS
    async with await Client.connect(serve.client_url(), model=MODEL) as nats:
        clients = [
            asyncio.create_task(one_after_the_other(load, name, number, serve, nats))
            for number, name in enumerate(kinds)
        ]
        await asyncio.sleep(2.0)
        await trouble()
        await asyncio.sleep(1.0)
        load.is_over = True
        await asyncio.gather(*clients)
    return load


def num_rows(serve: Serve) -> int:
    status = json.loads(serve.get("/ready")[1])
    return status["num_running"] + status["num_waiting"]


def serve_fake(tmp_path: Path, *flags: str):
    env = {"PAGEBUS_FAKE_STEP_S": STEP_S}
    return serving(tmp_path, "--fake", "--served-model-name", MODEL, "--gateways", "2", *flags, env=env)


@pytest.mark.parametrize("overlap", ["--overlap", "--no-overlap"])
def test_nothing_fails_while_everything_is_replaced(tmp_path: Path, overlap: str) -> None:
    with serve_fake(tmp_path) as serve:
        before = {
            pid for role in ("executor", "scheduler", "gateway") for pid in serve.children(f"cli {role}")
        }

        async def restart() -> None:
            env = {**os.environ, "XDG_RUNTIME_DIR": str(serve.runtime_dir)}
            command = [sys.executable, "-m", "pagebus.cli", "restart", overlap, "--json"]
            process = await asyncio.create_subprocess_exec(*command, env=env, stdout=subprocess.PIPE)
            out, _ = await asyncio.wait_for(process.communicate(), 90)
            print(out.decode().strip())
            assert process.returncode == 0

        load = asyncio.run(under_load(serve, restart))
        after = {
            pid for role in ("executor", "scheduler", "gateway") for pid in serve.children(f"cli {role}")
        }
        deadline = time.monotonic() + 5
        while (num_left := num_rows(serve)) and time.monotonic() < deadline:
            time.sleep(0.1)
    print(f"{overlap}: {load.num_ended} ended, longest pause {load.longest_pause_s:.2f} s")
    assert not load.faults, load.faults[:5]
    assert min(load.num_ended.values()) >= 3
    assert len(after) == 4
    assert not before & after
    assert num_left == 0


def test_a_scheduler_that_is_asked_to_end_fails_nothing(tmp_path: Path) -> None:
    """Without any standby: the launcher starts it again, and the new one need not wait for a silence."""
    with serve_fake(tmp_path) as serve:

        async def end_it() -> None:
            (pid,) = serve.children("cli scheduler")
            os.kill(pid, signal.SIGTERM)
            await asyncio.sleep(4.0)

        load = asyncio.run(under_load(serve, end_it))
    print(f"scheduler: {load.num_ended} ended, longest pause {load.longest_pause_s:.2f} s")
    assert not load.faults, load.faults[:5]
    assert load.longest_pause_s < 10.0
