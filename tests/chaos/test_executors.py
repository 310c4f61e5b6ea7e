"""An executor dies or stops in the middle of many streams: all end, with the tokens of a quiet run."""

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from pagebus.client import Client
from tests.support.serve import Serve, serving

NUM_STREAMS = 24
NUM_TOKENS = 300


async def run_streams(serve: Serve, fault: signal.Signals | None) -> tuple[list[list[int]], float]:
    """The ids of all streams, greedy and seeded, and the longest pause between two events of one."""
    pauses = [0.0] * NUM_STREAMS

    async def one(client: Client, i: int) -> list[int]:
        ids: list[int] = []
        last_s = None
        stream = client.generate(
            [5 + i] * 20, max_tokens=NUM_TOKENS, temperature=i % 2, seed=i, ignore_eos=True
        )
        async for event in stream:
            if last_s is not None:
                pauses[i] = max(pauses[i], time.monotonic() - last_s)
            last_s = time.monotonic()
            assert event.index == len(ids), "an id was lost or doubled"
            ids += event.token_ids
        return ids

    async def strike() -> None:
        if fault is None:
            return
        await asyncio.sleep(0.7)
        pid = serve.children("executor")[0]
        os.kill(pid, fault)
        if fault == signal.SIGSTOP:
            await asyncio.sleep(5.0)
            os.kill(pid, signal.SIGCONT)

    async with await Client.connect(serve.client_url(), model="chaos") as client:
        results = await asyncio.gather(*(one(client, i) for i in range(NUM_STREAMS)), strike())
    return [ids for ids in results if ids is not None], max(pauses)


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_streams_move_to_the_other_executor(tmp_path: Path, fault: signal.Signals) -> None:
    flags = ["--executors", "2", "--dtype", "float32", "--served-model-name", "chaos", "--num-threads", "1"]
    with serving(tmp_path, *flags) as serve:
        quiet, pause_s = asyncio.run(run_streams(serve, None))
        struck, stall_s = asyncio.run(run_streams(serve, fault))
    assert [len(ids) for ids in quiet] == [NUM_TOKENS] * NUM_STREAMS
    assert struck == quiet
    print(f"{fault.name}: longest pause {stall_s:.2f} s, {pause_s:.2f} s without the fault")
    assert stall_s < (1.5 if fault == signal.SIGKILL else 3.0) + 2 * pause_s
