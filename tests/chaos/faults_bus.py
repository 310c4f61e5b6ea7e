"""Faults of the bus and of everything at once."""

import asyncio
import os
import random
import sys
import time
from collections.abc import Callable, Sequence

from tests.chaos.bed import Bed
from tests.chaos.history import StreamHistory
from tests.chaos.load import Afterwards, Fault, Marks
from tests.support.proxy import TcpProxy

_AWAY_S = 3.0
_ROLES = ("executor", "scheduler", "gateway")


async def server_away(bed: Bed, rng: random.Random, marks: Marks) -> None:
    """SIGKILL of every server of the bus, which come back after 3 s with the same store."""
    for number in range(bed.servers.count):
        bed.servers.kill(number)
    await asyncio.sleep(_AWAY_S)
    await bed.servers.start()
    marks.afterwards.append(_go_on_after(time.monotonic(), marks))


def _go_on_after(back_s: float, marks: Marks) -> Afterwards:
    async def after(histories: Sequence[StreamHistory]) -> None:
        """When each stream that was cut had its next token, or its end."""
        live = [h for h in histories if h.started_s < marks.struck_s and h.ended_s > back_s]
        waits_s = [
            min((at for one in h.choices for at in one.times_s if at > back_s), default=h.ended_s) - back_s
            for h in live
        ]
        marks.counts["streams_cut"] += len(live)
        marks.times_s["back_after"] = max(waits_s, default=0.0)

    return after


async def all_but_the_bus(bed: Bed, rng: random.Random, marks: Marks) -> None:
    """SIGKILL of every service at once; all are started again."""
    for service in bed.services:
        service.kill()
    marks.counts["kills"] += len(bed.services)


def path_trouble(make: Callable[[TcpProxy], None], lasts_s: tuple[float, float], first: int) -> Fault:
    """`make` trouble on one service's path to the bus for a while; the roles take turns, from `first` on."""

    async def strike(bed: Bed, rng: random.Random, marks: Marks) -> None:
        role = _ROLES[(first + marks.number - 1) % len(_ROLES)]
        victim = rng.choice(bed.of(role))
        paths = bed.paths[victim.label]
        for proxy in paths.proxies:
            make(proxy)
        await asyncio.sleep(rng.uniform(*lasts_s))
        for proxy in paths.proxies:
            proxy.heal()
        marks.counts[f"{role}s_struck"] += 1

    return strike


def delay_all(delay_s: float) -> Fault:
    """Each way of every service's path takes `delay_s` longer, for some seconds."""

    async def strike(bed: Bed, rng: random.Random, marks: Marks) -> None:
        for paths in bed.paths.values():
            for proxy in paths.proxies:
                proxy.delay_s = delay_s
        await asyncio.sleep(rng.uniform(2.0, 5.0))
        for paths in bed.paths.values():
            for proxy in paths.proxies:
                proxy.heal()

    return strike


async def rolling_restart(bed: Bed, rng: random.Random, marks: Marks) -> None:
    """`pagebus restart` replaces every service of `pagebus serve` in turn."""
    began_s = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", "pagebus.cli", "restart", "--overlap", "--json",
        env={**os.environ, "XDG_RUNTIME_DIR": str(bed.directory)},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        output, _ = await asyncio.wait_for(process.communicate(), 120)
    finally:
        if process.returncode is None:
            process.kill()
    if process.returncode:
        marks.violations.append(f"pagebus restart: {output.decode(errors='replace')[-300:]}")
    marks.times_s["restart_took"] = time.monotonic() - began_s

    async def after(histories: Sequence[StreamHistory]) -> None:
        marks.counts["refused"] += sum(history.num_refused for history in histories)
        marks.counts["cut_connections"] += sum(len(history.resumed_s) for history in histories)

    marks.afterwards.append(after)
