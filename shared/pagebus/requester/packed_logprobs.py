"""Reads and cuts packed `Logprobs`. Pure; knows neither tokens' texts nor who asked for them."""

import sys
from array import array
from collections.abc import Sequence
from typing import NamedTuple

from pagebus.bus.messages import Logprobs, unpack_ids

_ITEM = 4  # bytes of an id, a value or a rank


class TokenLogprob(NamedTuple):
    """One id's log-probability (natural) and rank (1: the best), and the best ids, most probable first."""

    token_id: int
    logprob: float
    rank: int
    top: Sequence[tuple[int, float]]


def num_tokens(logprobs: Logprobs) -> int:
    """How many ids it is about."""
    return len(logprobs.ranks) // _ITEM


def is_whole(logprobs: Logprobs, count: int | None = None) -> bool:
    """Whether the lengths fit together, and are those of `count` ids if that is given."""
    count = num_tokens(logprobs) if count is None else count
    wide = count * (1 + logprobs.num_top) * _ITEM
    return (
        logprobs.num_top >= 0
        and len(logprobs.ranks) == count * _ITEM
        and len(logprobs.ids) == len(logprobs.values) == wide
    )


def cut(logprobs: Logprobs, start: int, end: int) -> Logprobs:
    """Those of the ids [start, end)."""
    if start <= 0 and end >= num_tokens(logprobs):
        return logprobs
    start, end = max(start, 0), max(end, start, 0)
    width = (1 + logprobs.num_top) * _ITEM
    return Logprobs(
        num_top=logprobs.num_top,
        ids=logprobs.ids[start * width : end * width],
        values=logprobs.values[start * width : end * width],
        ranks=logprobs.ranks[start * _ITEM : end * _ITEM],
    )


def unpack(logprobs: Logprobs) -> list[TokenLogprob]:
    """One `TokenLogprob` an id; the lengths must fit (`is_whole`)."""
    ids, values = unpack_ids(logprobs.ids), _unpack_floats(logprobs.values)
    width = 1 + logprobs.num_top
    return [
        TokenLogprob(
            ids[at],
            values[at],
            rank,
            list(zip(ids[at + 1 : at + width], values[at + 1 : at + width], strict=True)),
        )
        for at, rank in zip(range(0, len(ids), width), unpack_ids(logprobs.ranks), strict=True)
    ]


def _unpack_floats(data: bytes) -> "array[float]":
    unpacked = array("f")
    unpacked.frombytes(data)
    if sys.byteorder == "big":
        unpacked.byteswap()
    return unpacked
