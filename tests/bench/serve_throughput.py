"""Tokens a second of `pagebus serve`, bundled model, all services: `python -m tests.bench.serve_throughput`.

Alone on the machine, no peer beside it: for a comparison, run both in turn. All streams ask the same greedy
request, and must get the same tokens.
"""

import asyncio
import tempfile
import time
from pathlib import Path

from pagebus.client import Client
from tests.support.serve import serving

NUM_TOKENS = 100


async def _load(url: str, num_streams: int) -> float:
    async with await Client.connect(url) as client:

        async def one() -> tuple[int, ...]:
            stream = client.generate(
                "Once upon a time", max_tokens=NUM_TOKENS, ignore_eos=True, temperature=0
            )
            return tuple([token async for event in stream for token in event.token_ids])

        start = time.perf_counter()
        made = await asyncio.gather(*(one() for _ in range(num_streams)))
        elapsed_s = time.perf_counter() - start
    if len(set(made)) != 1 or len(made[0]) != NUM_TOKENS:
        raise SystemExit("the streams differ: no figure")
    return num_streams * NUM_TOKENS / elapsed_s


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as serve:
        print(f"ready after {serve.seconds_to_ready:.1f} s")
        for num_streams in (1, 8, 32):
            rates = [asyncio.run(_load(serve.client_url(), num_streams)) for _ in range(3)]
            slowest, median, fastest = sorted(rates)
            spread = f"of three: {slowest:.0f} to {fastest:.0f}"
            print(f"{num_streams:3d} streams: {median:6.0f} tok/s ({spread})")


if __name__ == "__main__":
    main()
