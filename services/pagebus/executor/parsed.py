"""A `Plan` with all its packed arrays unpacked, before anything of it is applied."""

from array import array
from typing import NamedTuple

from pagebus.bus.messages import DecodeError, Plan, RowStart, unpack_handles, unpack_ids


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


class ParsedGrant(NamedTuple):
    """A `Grant`."""

    handle: int
    group: int
    offset: int
    blocks: "array[int]"


class ParsedPlan(NamedTuple):
    """All packed parts of a plan."""

    released: "array[int]"
    starts: tuple[tuple[RowStart, frozenset[int]], ...]  # with its stop ids
    grants: tuple[ParsedGrant, ...]
    steps: tuple[ParsedStep, ...]


def parse(plan: Plan) -> ParsedPlan:
    """Unpack a plan; raises `DecodeError` where an array has a broken length or a handle is no uint32."""
    for start in plan.rows:
        if not 0 <= start.handle < 1 << 32:
            raise DecodeError(f"handle {start.handle}")
    return ParsedPlan(
        released=unpack_handles(plan.released),
        starts=tuple((start, frozenset(unpack_ids(start.stop_token_ids))) for start in plan.rows),
        grants=tuple(ParsedGrant(g.handle, g.group, g.offset, unpack_ids(g.blocks)) for g in plan.grants),
        steps=tuple(
            ParsedStep(
                chunks=tuple(ParsedChunk(c.handle, c.start, c.end, unpack_ids(c.ids)) for c in step.chunks),
                decode=unpack_handles(step.decode),
            )
            for step in plan.steps
        ),
    )
