"""A `Plan` with all its packed arrays unpacked, before anything of it is applied."""

from array import array
from collections.abc import Iterable
from typing import NamedTuple

from pagebus.bus.messages import (
    DecodeError,
    Grant,
    Plan,
    RowStart,
    unpack_grants,
    unpack_handles,
    unpack_ids,
)
from pagebus.executor.batch import BlockCopy

_MAX_STEPS = 1024


class ParsedChunk(NamedTuple):
    """A `Chunk`: prefill positions [start, end) of a row."""

    handle: int
    start: int
    end: int
    ids: "array[int]"


class ParsedStep(NamedTuple):
    """A `Step` of the lease."""

    chunks: tuple[ParsedChunk, ...]
    decode: "array[int]"


class ParsedStart(NamedTuple):
    """A `RowStart`."""

    start: RowStart
    stop_ids: frozenset[int]
    all_ids: "array[int]"
    copies: tuple[BlockCopy, ...]


class ParsedPlan(NamedTuple):
    """All packed parts of a plan."""

    released: "array[int]"
    starts: tuple[ParsedStart, ...]
    grants: list[Grant]
    steps: tuple[ParsedStep, ...]


def parse(plan: Plan) -> ParsedPlan:
    """Unpack a plan; raises `DecodeError` where an array has a broken length or a handle is no uint32."""
    for start in plan.rows:
        if not 0 <= start.handle < 1 << 32:
            raise DecodeError(f"handle {start.handle}")
    return ParsedPlan(
        released=unpack_handles(plan.released),
        starts=tuple(map(_parse_start, plan.rows)),
        grants=unpack_grants(plan),
        steps=_parse_steps(plan),
    )


def _parse_steps(plan: Plan) -> tuple[ParsedStep, ...]:
    steps: list[ParsedStep] = []
    for step in plan.steps:
        if not 1 <= step.num_times <= _MAX_STEPS - len(steps):
            raise DecodeError(f"a step {step.num_times} times; a plan has at most {_MAX_STEPS}")
        parsed = ParsedStep(
            chunks=tuple(ParsedChunk(c.handle, c.start, c.end, unpack_ids(c.ids)) for c in step.chunks),
            decode=unpack_handles(step.decode),
        )
        steps += [parsed] * step.num_times
    return tuple(steps)


def _parse_start(start: RowStart) -> ParsedStart:
    numbers = unpack_ids(start.copies)
    if len(numbers) % 3:
        raise DecodeError(f"{len(numbers)} numbers are no copies of blocks")
    return ParsedStart(
        start,
        frozenset(unpack_ids(start.stop_token_ids)),
        unpack_ids(start.all_ids),
        tuple(BlockCopy(*numbers[at : at + 3]) for at in range(0, len(numbers), 3)),
    )


def joined_chunks(steps: Iterable[ParsedStep]) -> dict[int, ParsedChunk]:
    """By handle, the chunks of all steps as one, as far as there is no gap between them."""
    joined: dict[int, ParsedChunk] = {}
    for step in steps:
        for chunk in step.chunks:
            known = joined.get(chunk.handle)
            if known is None:
                joined[chunk.handle] = chunk
            elif known.start <= chunk.start <= known.end < chunk.end:
                ids = known.ids + chunk.ids[known.end - chunk.start :]
                joined[chunk.handle] = known._replace(end=chunk.end, ids=ids)
    return joined
