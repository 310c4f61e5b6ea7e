"""A step of a real `pagebus serve` that never returns: /health tells it, the process ends, streams go on."""

import asyncio
import time
from pathlib import Path

from pagebus.client import Client
from pagebus.executor.fake import fake_sequence
from tests.support.serve import Serve, serving

MODEL = "hanging"
NUM_TOKENS = 800
WATCHDOG_S = 12


async def one(serve: Serve, number: int) -> bool:
    prompt = [number + 3] * 20
    made: list[int] = []
    async with await Client.connect(serve.client_url(), model=MODEL) as client:
        stream = client.generate(prompt, max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
        async for event in stream:
            made += event.token_ids
    return made == fake_sequence(prompt, NUM_TOKENS)


async def watch_health(serve: Serve) -> list[tuple[float, int]]:
    """(seconds, status) of /health, each time it changes, for as long as this runs."""
    seen: list[tuple[float, int]] = []
    began_s = time.monotonic()
    while True:
        status, _ = await asyncio.to_thread(serve.get, "/health")
        if not seen or seen[-1][1] != status:
            seen.append((time.monotonic() - began_s, status))
        if len(seen) == 3:
            return seen
        await asyncio.sleep(0.1)


def test_a_step_that_never_returns(tmp_path: Path) -> None:
    trouble = tmp_path / "trouble"
    env = {"PAGEBUS_FAKE_STEP_S": "0.004", "PAGEBUS_FAKE_TROUBLE": str(trouble)}
    flags = ["--fake", "--served-model-name", MODEL, "--watchdog-s", str(WATCHDOG_S)]
    with serving(tmp_path, *flags, env=env) as serve:

        async def run() -> tuple[list[bool], list[tuple[float, int]]]:
            streams = [asyncio.create_task(one(serve, number)) for number in range(10)]
            await asyncio.sleep(1.5)
            trouble.write_text("hang")
            changes = await asyncio.wait_for(watch_health(serve), 60)
            return await asyncio.gather(*streams), changes

        rights, changes = asyncio.run(run())
        output = serve.output()
    print(f"/health: {changes}")
    assert all(rights)
    assert [status for _, status in changes] == [200, 503, 200]
    assert 5.0 < changes[1][0] < 10.5
    assert "makes no progress" in output
    assert "fake_faults" in output, "where the thread hangs"
