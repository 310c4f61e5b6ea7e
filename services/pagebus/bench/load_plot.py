"""Draws one run of a load: what came when, and the latencies."""

from collections.abc import Iterator, Sequence

import msgspec

from pagebus.bench import svg
from pagebus.bench.load import Outcome
from pagebus.bench.load_figures import LoadFigures, num_output
from pagebus.bench.svg import COLORS, Panel, Series

_NUM_BINS = 12


def draw(outcomes: Sequence[Outcome], run: LoadFigures) -> str:
    """The whole SVG document."""
    return svg.draw([*_over_time(outcomes, run), *_latencies(run)])


def _over_time(outcomes: Sequence[Outcome], run: LoadFigures) -> Iterator[Panel]:
    began_s = min(outcome.answer.sent_s for outcome in outcomes)
    width_s = run.duration_s / _NUM_BINS
    tokens, ttfts = [0.0] * _NUM_BINS, [[0.0][:0] for _ in range(_NUM_BINS)]
    for outcome in outcomes:
        answer = outcome.answer
        times_s = answer.text_times_s
        if not times_s:
            continue
        share = num_output(answer) / len(times_s)
        for at_s in times_s:
            tokens[min(_NUM_BINS - 1, int((at_s - began_s) / width_s))] += share
        ttfts[min(_NUM_BINS - 1, int((answer.sent_s - began_s) / width_s))].append(times_s[0] - answer.sent_s)
    places = [f"{(i + 1) * width_s:.3g} s" for i in range(_NUM_BINS)]
    yield Panel("output tokens/s", "lines", places, [Series("", COLORS[0], [n / width_s for n in tokens])])
    means = [sum(values) / len(values) * 1e3 if values else None for values in ttfts]
    yield Panel("time to first token by start, ms", "lines", places, [Series("mean", COLORS[0], means)])


def _latencies(run: LoadFigures) -> Iterator[Panel]:
    for title, values in (
        ("time to first token, ms", run.ttft_ms),
        ("time per output token, ms", run.tpot_ms),
        ("between two chunks, ms", run.itl_ms),
        ("end to end, ms", run.e2el_ms),
    ):
        if values is not None:
            numbers = [*msgspec.structs.astuple(values)]
            yield Panel(title, "bars", ["mean", "p50", "p90", "p99", "max"], [Series("", COLORS[0], numbers)])
