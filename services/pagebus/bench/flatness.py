"""`pagebus bench memory`: whether many tokens through all services leave every process's memory as it was.

A fake model makes them, so that a million take a minute; they go the whole way, to an HTTP client.
"""

import asyncio
import contextlib
import time
from pathlib import Path

import msgspec

from pagebus.bench.fake_stack import fake_stack
from pagebus.bench.load import Load, LoadConfig, Outcome, Wanted
from pagebus.bench.processes import Machine, machine, rss_bytes

_MIB = 1 << 20
_SETTLE_S = 1.0


class Memory(msgspec.Struct, frozen=True):
    """Resident MiB of one process: after the warm-up, in the middle, at the end."""

    before: float
    middle: float
    after: float

    @property
    def growth(self) -> float:
        """From the warm-up's end on."""
        return self.after - self.before


class Flatness(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured. `num_warm_tokens` came before the `num_tokens` that count."""

    machine: Machine
    num_warm_tokens: int
    num_tokens: int
    seconds: float
    memory: dict[str, Memory]


async def measure_flatness(num_tokens: int, *, num_streams: int = 64, output_len: int = 500) -> Flatness:
    """Tokens in two halves, after a third of them to warm up (of a million: until the prefix cache is full).

    Raises `FakeStackError`, `LoadError`.
    """
    async with fake_stack() as stack:
        url = f"http://127.0.0.1:{stack.port}"

        async def make(wanted: int, seed: int) -> int:
            config = LoadConfig(
                url=url, model=stack.model, max_concurrency=num_streams, temperature=1.0, seed=seed
            )
            requests = [Wanted(0.0, 32, output_len)] * max(1, wanted // output_len)
            outcomes: list[Outcome] = await Load(config).run(requests)
            await asyncio.sleep(_SETTLE_S)
            return sum(one.answer.usage.completion_tokens for one in outcomes if one.answer.usage)

        def resident() -> dict[str, float]:
            return {role: rss_bytes(pid) / _MIB for role, pid in stack.pids.items()}

        num_warm = await make(max(num_tokens // 3, num_streams * output_len), 0)
        before, began_s = resident(), time.monotonic()
        num_made = await make(num_tokens // 2, 1)
        middle = resident()
        num_made += await make(num_tokens - num_tokens // 2, 2)
        after = resident()
    return Flatness(
        machine=machine(),
        num_warm_tokens=num_warm,
        num_tokens=num_made,
        seconds=round(time.monotonic() - began_s, 1),
        memory={
            role: Memory(round(before[role], 1), round(middle[role], 1), round(after[role], 1))
            for role in before
        },
    )


def table(found: Flatness) -> str:
    """For people."""
    lines = [
        f"{found.num_tokens:,} tokens in {found.seconds:g} s, after {found.num_warm_tokens:,} to warm up",
        "process        before    middle     after    growth (MiB)",
    ]
    for role, memory in found.memory.items():
        lines.append(
            f"{role:12} {memory.before:8.1f}  {memory.middle:8.1f}  {memory.after:8.1f}  {memory.growth:8.1f}"
        )
    return "\n".join(lines)


def run_flatness(num_tokens: int, num_streams: int, json_file: Path | None) -> Flatness:
    """Measure and print. Raises as `measure_flatness`, and `OSError`."""
    runner = asyncio.run
    with contextlib.suppress(ImportError):
        import uvloop

        runner = uvloop.run
    found = runner(measure_flatness(num_tokens, num_streams=num_streams))
    print(table(found))
    if json_file is not None:
        json_file.write_text(msgspec.json.format(msgspec.json.encode(found), indent=2).decode() + "\n")
    return found
