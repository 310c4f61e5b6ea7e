"""Prints the results as tables, the paper's figure beside each of ours where it has one."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from pagebus.bench import paper_figures
from pagebus.bench.paper_figures import PAGING
from pagebus.bench.paper_results import BlockRow, MemoryRow, Results, SharingRow


def tables(results: Results) -> str:
    """All tables as text."""
    sections = (_memory, _batches, _rates, _blocks, _sharing, _throughputs)
    parts = ["\n".join(section(results)) for section in sections]
    if results.is_quick:
        parts.insert(0, "A quick run: too few requests for more than rough figures.")
    return "\n\n".join(parts)


def _is_papers(results: Results) -> bool:
    return results.machine == paper_figures.MACHINE


def _grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns, the first two to the left and the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        cells = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  " + "  ".join(cells).rstrip()


def _memory(results: Results) -> Iterator[str]:
    yield f"1. KV memory while requests wait, % of the pool of {results.machine} (in brackets: the paper)"
    rows = []
    for row in results.memory:
        paper = row.paper or (None,) * 4
        ours = (row.token_state, row.reserved, row.internal, row.external)
        cells = [_beside(number, other) for number, other in zip(ours, paper, strict=True)]
        rows.append([row.workload, row.system, *cells, f"{row.of_held:.1f}"])
    yield from _grid(
        ["lengths", "system", "token state", "reserved", "internal", "external, other", "of what is held"],
        rows,
    )
    for row in results.memory:
        if row.system == PAGING:
            yield f"  {row.workload}: {_lost(row)}"


def _lost(row: MemoryRow) -> str:
    shares = row.shares
    return (
        f"lost to last blocks {shares.unfilled:.2%}, grants ahead {shares.granted_ahead:.2%}, "
        f"prompts not yet prefilled {shares.prompt_ahead:.2%}, freed late {shares.freed_late:.2%}, "
        f"free {shares.unused:.2%}; {row.num_preemptions} preemptions"
    )


def _beside(ours: float, paper: float | None) -> str:
    return f"{ours:.1f}" + ("       " if paper is None else f" ({paper:4.1f})")


def _batches(results: Results) -> Iterator[str]:
    yield "2. Running requests, mean"
    yield from _grid(
        ["lengths", "system", "requests/s", "running", "paper"],
        [
            [r.workload, r.system, f"{r.rate:.2f}", f"{r.num_running:.2f}", _or_dash(r.paper)]
            for r in results.batches
        ],
    )


def _or_dash(number: float | None) -> str:
    return "-" if number is None else f"{number:.2f}"


def _rates(results: Results) -> Iterator[str]:
    yield f"3. Highest request rate at {results.latency_limit_s:g} s a token (mean normalized latency)"
    yield from _grid(
        ["lengths", "system", "requests/s", "paging's is x times", "paper"],
        [
            [
                r.workload,
                r.system,
                f"{r.rate:.2f}",
                f"{r.ratio:.2f}",
                "-" if r.paper is None else f"{r.paper[0]} to {r.paper[1]}",
            ]
            for r in results.rates
        ],
    )


def _blocks(results: Results) -> Iterator[str]:
    yield "4. Block size: normalized latency in ms a token (running requests)"
    for workload, group in groupby(results.blocks, key=lambda row: row.workload):
        rows: list[BlockRow] = list(group)
        yield from _grid(
            [workload, "", *(str(row.block_size) for row in rows)],
            [
                ["", "ms a token", *(f"{row.normalized_latency_s * 1e3:.1f}" for row in rows)],
                ["", "running", *(f"{row.num_running:.1f}" for row in rows)],
            ],
        )
        best = min(row.normalized_latency_s for row in rows)
        good = [row.block_size for row in rows if row.normalized_latency_s <= 1.1 * best]
        paper = paper_figures.BEST_BLOCK_SIZES.get(workload) if _is_papers(results) else None
        beside = f"; the paper's best: {paper[0]} to {paper[1]}" if paper else ""
        yield f"  within 10 % of the best: {', '.join(map(str, good))}{beside}"


def _sharing(results: Results) -> Iterator[str]:
    yield "5. Parallel sampling: blocks saved by sharing, %"
    rows = []
    for workload, group in groupby(results.sharing, key=lambda row: row.workload):
        found: list[SharingRow] = list(group)
        paper = paper_figures.SHARING.get(workload) if _is_papers(results) else None
        rows.append(
            [
                workload,
                "",
                *(f"{100 * row.saved:.1f}" for row in found),
                f"{paper[0]} to {paper[1]}" if paper else "-",
            ]
        )
    counts = sorted({row.num_choices for row in results.sharing})
    yield from _grid(["lengths", "", *(f"n={count}" for count in counts), "paper, n=2 to 6"], rows)


def _throughputs(results: Results) -> Iterator[str]:
    yield "6. Generated tokens/s under a backlog: static against continuous batching"
    yield from _grid(
        ["lengths", "system", "tokens/s", "x static"],
        [[r.workload, r.system, f"{r.tokens_per_s:.0f}", f"{r.ratio:.2f}"] for r in results.throughputs],
    )
    yield "  The paper: paging sustains up to 22 times FasterTransformer's request rate, with static batches."
