"""One repetition: many streams start, a fault strikes at a random moment, all histories are judged.

Knows no particular fault; what a fault did is written into its `Marks`.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace

from tests.chaos.bed import Bed, NotReachedError
from tests.chaos.drivers import drive
from tests.chaos.history import ChoiceHistory, StreamHistory
from tests.chaos.specs import PATHS, ExpectedChoice, Path, StreamSpec, random_specs

_SLOW_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What load a scenario puts on, and when the fault strikes. Of `num_streams` 0 the run decides."""

    num_streams: int = 0
    num_tokens: tuple[int, int] = (100, 250)
    paths: Sequence[Path] = PATHS
    spread_s: float = 1.0
    moment_s: tuple[float, float] = (0.2, 1.8)
    timeout_s: float = 60.0
    resumes: bool = True  # HTTP readers whose connection is lost ask for the rest


Afterwards = Callable[[Sequence[StreamHistory]], Awaitable[None]]
"""Looks at how the streams ended, and at what became of the services."""


@dataclass
class Marks:
    """What a fault tells of itself."""

    number: int = 0  # of the repetition, from 1
    struck_s: float = 0.0
    times_s: dict[str, float] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    afterwards: list[Afterwards] = field(default_factory=list)


Fault = Callable[[Bed, random.Random, Marks], Awaitable[None]]
"""Strikes, and returns once it is over; what waits for the streams' end goes into `Marks.afterwards`."""


@dataclass
class Repetition:
    """What came out of one repetition."""

    seed: str
    num_streams: int = 0
    num_completed: int = 0
    num_tokens: int = 0
    num_lost: int = 0
    num_doubled: int = 0
    num_resumed: int = 0
    violations: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    slow: list[str] = field(default_factory=list)  # streams that stood still for long, and where
    stalls_s: list[float] = field(default_factory=list)
    stalls_by_path_s: dict[str, list[float]] = field(default_factory=dict)
    times_s: dict[str, float] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)


async def repeat(
    bed: Bed, seed: str, shape: Shape, fault: Fault, num_streams: int, extra: Sequence[StreamSpec] = ()
) -> Repetition:
    """One repetition on a healthy bed, which is healthy again afterwards; `seed` ends in its number.

    `extra` streams are judged like the others, but neither counted nor expected to complete: the fault's own
    `afterwards` looks at them. Raises `HealError`, which holds the result, where the bed stays broken.
    """
    rng = random.Random(seed)
    specs = random_specs(
        rng,
        shape.num_streams or num_streams,
        run=f"r{rng.randrange(1 << 40):x}",
        num_gateways=bed.layout.gateways,
        num_tokens=shape.num_tokens,
        paths=shape.paths,
        spread_s=shape.spread_s,
        resumes=shape.resumes,
        is_fake=not bed.layout.is_bundled,
    )
    bed.deadline_s = shape.timeout_s
    if bed.layout.is_bundled:
        specs = await _after_a_quiet_run(bed, specs, shape.timeout_s)
    for spec in specs:
        spec.expected  # noqa: B018  # computed before the clock runs
    marks = Marks(number=int(seed.rpartition("/")[2]))
    streams = [
        asyncio.create_task(drive(bed, spec, shape.timeout_s + 5.0), name=spec.name)
        for spec in (*specs, *extra)
    ]
    try:
        await asyncio.sleep(rng.uniform(*shape.moment_s))
        marks.struck_s = time.monotonic()
        await fault(bed, rng, marks)
        histories = await asyncio.gather(*streams)
    finally:
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    result = Repetition(seed)
    for check in marks.afterwards:
        await check(histories)
    judge(result, histories[: len(specs)], marks)
    for history in histories[len(specs) :]:
        result.violations += history.violations()
    try:
        result.times_s["healed"] = await bed.healed()
    except NotReachedError as error:
        result.violations.append(f"afterwards: {error}")
        raise HealError(result, str(error)) from error
    return result


async def _after_a_quiet_run(bed: Bed, specs: Sequence[StreamSpec], timeout_s: float) -> list[StreamSpec]:
    """The same requests, knowing what each gave where nothing went wrong."""
    quiet = [replace(spec, name=f"{spec.name}-q", known=_UNKNOWN * spec.num_choices) for spec in specs]
    histories = await asyncio.gather(*(drive(bed, spec, timeout_s) for spec in quiet))
    known = []
    for spec, history in zip(specs, histories, strict=True):
        if not history.is_complete or any(len(one.ids) != spec.max_tokens for one in history.choices):
            raise NotReachedError(f"{spec.name}: the quiet run is not complete: {history.error}")
        known.append(replace(spec, known=tuple(_as_expected(one, spec.path) for one in history.choices)))
    return known


def _as_expected(one: ChoiceHistory, path: Path) -> ExpectedChoice:
    ids, text = tuple(one.ids), "".join(one.texts)
    return ExpectedChoice(ids, ids, "length", None if path == "requester" else text)


_UNKNOWN = (ExpectedChoice((), (), "length", None),)


class HealError(AssertionError):
    """The bed is not whole again after a repetition; its processes must be started anew."""

    def __init__(self, result: Repetition, message: str) -> None:
        super().__init__(message)
        self.result = result


def judge(result: Repetition, histories: Sequence[StreamHistory], marks: Marks) -> None:
    """Count what the histories and the fault tell."""
    result.num_streams = len(histories)
    result.times_s |= marks.times_s
    result.counts.update(marks.counts)  # not +=, which forgets what is 0
    result.violations += marks.violations
    for history in histories:
        result.num_completed += history.is_complete
        result.violations += history.violations()
        result.num_resumed += len(history.resumed_s)
        if history.error:
            spec = history.spec
            result.failures.append(f"{spec.name} ({spec.path}): {history.error_code}: {history.error}")
        for choice in history.choices:
            result.num_tokens += len(choice.ids)
            result.num_lost += choice.num_lost
            result.num_doubled += choice.num_doubled
        if history.ended_s > marks.struck_s:
            stall_s = history.stalls(marks.struck_s)
            result.stalls_s.append(stall_s)
            result.stalls_by_path_s.setdefault(history.spec.path, []).append(stall_s)
            if stall_s > _SLOW_S:
                result.slow.append(history.longest_pause(marks.struck_s))
