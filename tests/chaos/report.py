"""From repetitions to the table: figures, bars, one line a scenario, and the results file."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.history import percentile
from tests.chaos.load import Repetition

_MOST_TOLD = 20


@dataclass(frozen=True)
class Bar:
    """What must be reached: the figure's name, how it compares, and with what."""

    figure: str
    limit: float
    is_exact: bool = False  # equal to the limit, else below it

    def is_met(self, figures: dict[str, float], slack: float = 1.0) -> bool:
        """Whether the figures reach it; a figure that is missing does not. Times may take `slack` times as
        long."""
        value = figures.get(self.figure)
        if value is None:
            return False
        if self.is_exact:
            return value == self.limit
        return value < self.limit * (slack if self.figure.endswith("_s") else 1.0)

    def __str__(self) -> str:
        return f"{self.figure} {'=' if self.is_exact else '<'} {self.limit:g}"


COMPLETE = (Bar("incomplete", 0, is_exact=True), Bar("violations", 0, is_exact=True))
"""Every stream ended once, with every token that it must have and no other."""


@dataclass
class Row:
    """One line of the table."""

    name: str
    fault: str
    bars: Sequence[Bar]
    repetitions: list[Repetition] = field(default_factory=list)
    slack: float = 1.0  # for times, on a machine that is busy with other things
    error: str = ""  # why the scenario could not be run to its end
    seconds: float = 0.0

    @property
    def figures(self) -> dict[str, float]:
        """All figures by name: `*_max_s` and `*_p99_s` of times, sums of counts."""
        reps = self.repetitions
        stalls = [stall for rep in reps for stall in rep.stalls_s]
        num_streams = sum(rep.num_streams for rep in reps)
        num_completed = sum(rep.num_completed for rep in reps)
        figures: dict[str, float] = {
            "repetitions": len(reps),
            "streams": num_streams,
            "completed": num_completed,
            "incomplete": num_streams - num_completed,
            "tokens": sum(rep.num_tokens for rep in reps),
            "lost": sum(rep.num_lost for rep in reps),
            "doubled": sum(rep.num_doubled for rep in reps),
            "violations": sum(len(rep.violations) for rep in reps),
            "resumed": sum(rep.num_resumed for rep in reps),
        }
        if stalls:
            figures |= {
                "stall_p50_s": percentile(stalls, 0.5),
                "stall_p99_s": percentile(stalls, 0.99),
                "stall_max_s": max(stalls),
            }
        for path in sorted({path for rep in reps for path in rep.stalls_by_path_s}):
            values = [stall for rep in reps for stall in rep.stalls_by_path_s.get(path, ())]
            figures[f"stall_{path}_p99_s"] = percentile(values, 0.99)
        for name in sorted({name for rep in reps for name in rep.times_s}):
            values = [rep.times_s[name] for rep in reps if name in rep.times_s]
            figures |= {f"{name}_p50_s": percentile(values, 0.5), f"{name}_max_s": max(values)}
        total: Counter[str] = Counter()
        for rep in reps:
            total.update(rep.counts)
        return figures | {name: float(count) for name, count in total.items()}

    @property
    def missed(self) -> list[str]:
        """The bars that were not reached; all of them where nothing ran."""
        figures = self.figures
        missed = [str(bar) for bar in self.bars if not bar.is_met(figures, self.slack)]
        if self.error:
            missed.append(f"it stopped: {self.error}")
        return missed if self.repetitions else ["no repetition ran", *missed]

    @property
    def details(self) -> list[str]:
        """Violations, and failures where none may be, with the seed that shows them again."""
        judges_failures = any(bar.figure == "incomplete" for bar in self.bars)
        return [
            f"[{rep.seed}] {flaw}"
            for rep in self.repetitions
            for flaw in (*rep.violations, *(rep.failures if judges_failures else ()))
        ]


def table(rows: Sequence[Row]) -> str:
    """The table as Markdown, and below it what was missed."""
    lines = ["| fault | repetitions | bar | reached | |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        verdict = "MISSED" if row.missed else "passed"
        bars = ", ".join(str(bar) for bar in row.bars)
        lines.append(f"| {row.fault} | {len(row.repetitions)} | {bars} | {reached(row)} | {verdict} |")
    for row in rows:
        if row.missed:
            lines.append(f"\n{row.name}: missed {'; '.join(row.missed)}")
            lines += [f"  {detail}" for detail in row.details[:_MOST_TOLD]]
    return "\n".join(lines)


_TOLD_APART = frozenset(
    ("repetitions", "streams", "completed", "incomplete", "tokens", "lost", "doubled", "violations")
)


def reached(row: Row) -> str:
    """A row's figures in words."""
    figures = row.figures
    lost, doubled, violations = (f"{figures[name]:.0f} {name}" for name in ("lost", "doubled", "violations"))
    words = [
        f"{figures['completed']:.0f}/{figures['streams']:.0f} complete",
        f"{lost}, {doubled}, {violations}",
        *_stalls(figures),
    ]
    for name, value in figures.items():
        is_told = name in _TOLD_APART or name.startswith("stall_") or name.endswith("_p50_s")
        if is_told or (name == "resumed" and not value):
            continue
        if name.endswith("_max_s"):
            middle = figures[name.replace("_max_s", "_p50_s")]
            words.append(f"{name.removesuffix('_max_s')} p50 {middle:.2f}, max {value:.2f} s")
        else:
            words.append(f"{value:g} {name.replace('_', ' ')}")
    return "; ".join(words)


def _stalls(figures: dict[str, float]) -> list[str]:
    if "stall_p99_s" not in figures:
        return []
    p50, p99, most = (figures[f"stall_{which}_s"] for which in ("p50", "p99", "max"))
    paths = [
        f"{name.removeprefix('stall_').removesuffix('_p99_s')} {value:.2f}"
        for name, value in figures.items()
        if name.startswith("stall_") and name.endswith("_p99_s") and name != "stall_p99_s"
    ]
    return [f"stall p50 {p50:.2f}, p99 {p99:.2f} ({', '.join(paths)}), max {most:.2f} s"]


def write(rows: Sequence[Row], path: Path) -> None:
    """The results file, whole each time."""
    told = [
        {
            "name": row.name,
            "fault": row.fault,
            "bars": [str(bar) for bar in row.bars],
            "missed": row.missed,
            "figures": row.figures,
            "seconds": round(row.seconds, 1),
            "details": row.details,
            "slow": [f"[{rep.seed}] {one}" for rep in row.repetitions for one in rep.slow],
        }
        for row in rows
    ]
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(told, indent=1) + "\n")
    temporary.replace(path)
