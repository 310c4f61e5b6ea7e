"""Draws the paper's results: memory, running requests, block sizes, sharing."""

from collections.abc import Iterator
from itertools import groupby

from pagebus.bench import paper_figures, svg
from pagebus.bench.paper_results import Results
from pagebus.bench.svg import COLORS, Panel, Series

PAPER_COLOR = "#e0862e"


def draw(results: Results) -> str:
    """The whole SVG document."""
    return svg.draw(list(_panels(results)))


def _panels(results: Results) -> Iterator[Panel]:
    for workload, group in groupby(results.memory, key=lambda row: row.workload):
        rows = list(group)
        series = [
            Series("token state", COLORS[0], [row.token_state for row in rows]),
            Series("reserved", COLORS[1], [row.reserved for row in rows]),
            Series("internal", COLORS[2], [row.internal for row in rows]),
            Series("external, other", COLORS[3], [row.external for row in rows]),
        ]
        yield Panel(f"{workload}: KV memory, %", "stacked", [row.system for row in rows], series)
    for workload, batch_group in groupby(results.batches, key=lambda row: row.workload):
        batches = list(batch_group)
        series = [Series("pagebus's simulation", COLORS[0], [row.num_running for row in batches])]
        if any(row.paper is not None for row in batches):
            series.append(Series("paper", PAPER_COLOR, [row.paper for row in batches]))
        title = f"{workload}: running requests at {batches[0].rate:.3g}/s"
        yield Panel(title, "bars", [row.system for row in batches], series)
    for workload, block_group in groupby(results.blocks, key=lambda row: row.workload):
        blocks = list(block_group)
        latencies = [row.normalized_latency_s * 1e3 for row in blocks]
        yield Panel(
            f"{workload}: ms a token by block size",
            "lines",
            [str(row.block_size) for row in blocks],
            [Series("mean normalized latency", COLORS[0], latencies)],
        )
    counts = sorted({row.num_choices for row in results.sharing})
    shades = dict(zip(paper_figures.SHARING, COLORS, strict=False))
    yield Panel(
        "Blocks saved by sharing, %",
        "bars",
        [f"n = {count}" for count in counts],
        [
            Series(workload, shades.get(workload, COLORS[2]), [100 * row.saved for row in group])
            for workload, group in groupby(results.sharing, key=lambda row: row.workload)
        ],
    )
