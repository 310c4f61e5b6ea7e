"""Reads request traces in the CSV format of Azure's public LLM inference traces. Knows no simulation."""

import csv
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pagebus.bench.paper_lengths import Floats, Lengths

HEADER = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


class TraceError(ValueError):
    """The file is no trace; the message names the file and the line."""


class Trace(NamedTuple):
    """Requests in the order of their arrival, the first at second 0."""

    lengths: Lengths
    arrivals_s: Floats
    num_cut: int  # requests that were longer than the limit

    @property
    def rate(self) -> float:
        """Mean requests a second."""
        last_s = float(self.arrivals_s[-1])
        return (len(self.arrivals_s) - 1) / last_s if last_s > 0 else float("inf")


def read_trace(path: Path, max_requests: int, max_len: int) -> Trace:
    """The first `max_requests` requests of a trace, each cut to `max_len` tokens as the paper cuts its own.

    An output keeps up to half of `max_len`, the prompt what that leaves. Raises `TraceError` for a file that
    cannot be read, another header, a row that is no request, times out of order, or fewer than two requests.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(_rows(file, path, max_requests))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TraceError(f"{path} cannot be read as a trace: {error}") from error
    if len(rows) < 2:
        raise TraceError(f"{path} holds {len(rows)} requests; at least 2 are needed")
    times = np.array([row.arrival_s for row in rows])
    prompts = np.array([row.num_prompt for row in rows])
    outputs = np.array([row.num_output for row in rows])
    short_outputs = np.minimum(outputs, max_len // 2)
    short_prompts = np.minimum(prompts, max_len - short_outputs)
    num_cut = int(((short_outputs < outputs) | (short_prompts < prompts)).sum())
    return Trace(Lengths(short_prompts, short_outputs), times - times[0], num_cut)


class _Row(NamedTuple):
    arrival_s: float
    num_prompt: int
    num_output: int


def _rows(file: Iterable[str], path: Path, max_requests: int) -> Iterator[_Row]:
    reader = csv.reader(file)
    header = next(reader, [])
    if tuple(name.strip() for name in header) != HEADER:
        found = ",".join(header)[:100]
        raise TraceError(f"{path}: the first line must be {','.join(HEADER)}; it is {found!r}")
    last_s = float("-inf")
    num_rows = 0
    for fields in reader:
        if not fields:
            continue  # an empty line, as at the end of a file
        row = _row(fields, f"{path}:{reader.line_num}")
        if row.arrival_s < last_s:
            raise TraceError(f"{path}:{reader.line_num}: {fields[0]!r} is earlier than the line before it")
        last_s = row.arrival_s
        yield row
        num_rows += 1
        if num_rows == max_requests:
            return


def _row(fields: list[str], where: str) -> _Row:
    if len(fields) != len(HEADER):
        raise TraceError(f"{where}: {len(fields)} fields; {len(HEADER)} are needed ({','.join(HEADER)})")
    try:
        arrival_s = datetime.fromisoformat(fields[0].strip()).timestamp()
    except ValueError as error:
        raise TraceError(f"{where}: {fields[0]!r} is no time such as 2023-11-16 18:15:46.680") from error
    counts = []
    for name, field in zip(HEADER[1:], fields[1:], strict=True):
        if not field.strip().isascii() or not field.strip().isdigit() or len(field) > 12 or int(field) < 1:
            raise TraceError(f"{where}: {name} is {field!r}; a number of 1 or more is needed")
        counts.append(int(field))
    return _Row(arrival_s, counts[0], counts[1])
