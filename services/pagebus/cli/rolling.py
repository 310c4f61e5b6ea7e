"""Replaces running processes in turn: the new one is started, and once it is ready the old one ends.

It knows processes, not services.
"""

import asyncio
import time
from collections.abc import Callable, Collection

from pagebus.cli.processes import ServiceProcess

READY_TIMEOUT_S = 600.0
"""A large model loads for minutes."""
_POLL_S = 0.05

Make = Callable[[ServiceProcess, Callable[[str], None]], ServiceProcess]
"""What is to replace a process, and whom to tell why it can never run."""


async def replace_all(
    processes: list[ServiceProcess],
    make: Make,
    tell: Callable[[str], None],
    alone: Collection[str],
    *,
    grace_s: float,
    ready_timeout_s: float = READY_TIMEOUT_S,
) -> str:
    """Replace all of `processes`, in the list too; why one could not be (it stays, and all after it), or "".

    Roles in `alone` have no room for two: there the old process ends first. `grace_s`: what it gets to end.
    """
    for old in list(processes):
        began_s = time.monotonic()
        fault = await _replace(processes, old, make, old.role in alone, grace_s, ready_timeout_s)
        if fault:
            return fault
        tell(f"{old.label} replaced in {time.monotonic() - began_s:.1f} s")
    return ""


async def _replace(
    processes: list[ServiceProcess],
    old: ServiceProcess,
    make: Make,
    is_alone: bool,
    grace_s: float,
    ready_timeout_s: float,
) -> str:
    faults: list[str] = []
    new = make(old, faults.append)
    if is_alone:
        await old.stop(grace_s)
        processes.remove(old)
    processes.append(new)  # from now on it is stopped with the others
    await new.start()
    end_s = time.monotonic() + ready_timeout_s
    while not (new.is_ready or faults or time.monotonic() > end_s):  # noqa: ASYNC110 - a file
        await asyncio.sleep(_POLL_S)
    fault = ""
    if not new.is_ready:
        fault = faults[0] if faults else f"the new {new.label} was not ready after {ready_timeout_s:.0f} s"
    if is_alone:
        new.is_settled = True  # there is no other: it is tried for ever
        return fault
    if fault:
        await new.stop(grace_s)
        processes.remove(new)
        return f"{fault}; the old {old.label} goes on"
    new.is_settled = True
    await old.stop(grace_s)
    processes.remove(old)
    return ""
