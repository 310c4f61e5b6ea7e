"""What a comparison found, and its tables. One file a model with all its runs; figures are medians."""

import statistics
from collections.abc import Iterator, Sequence

import msgspec

from tests.bench.peer_tokens import TokenCheck

OURS = "pagebus"
STATIC = "static batches"
_WHOLE_FROM = 100  # tok/s without decimals
_BEGIN, _END = "<!-- peers: begin -->", "<!-- peers: end -->"


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One server under one load. `tokens_per_s`: of generated ones; for prefill, of the prompt until TTFT."""

    row: str
    server: str
    at_round: int
    num_requests: int
    duration_s: float
    tokens_per_s: float
    ttft_ms: float
    tpot_ms: float | None
    load_average: float  # of the last minute before the run; the comparison itself is in it
    tokens: int = 0  # generated in all


class ServerFacts(msgspec.Struct, kw_only=True):
    """One server. `idle_cores`: CPU seconds a second while another was measured and nothing was stopped."""

    version: str = ""
    how: str = ""
    ready_after_s: float | None = None
    idle_cores: list[float] = []
    is_stopped_meanwhile: bool = False  # while others were measured
    tokens: TokenCheck | None = None


class Results(msgspec.Struct, kw_only=True):
    """All that one comparison found. `medians`: row, server, tok/s; `ratios`: row, peer, ours over it."""

    name: str
    machine: dict[str, str]
    model: dict[str, object]
    load: dict[str, str]
    servers: dict[str, ServerFacts]
    runs: list[Run] = []
    medians: dict[str, dict[str, float]] = {}
    ratios: dict[str, dict[str, list[float]]] = {}

    def add(self, run: Run) -> None:
        """Note a run; medians and ratios are made again."""
        self.runs.append(run)
        self.medians = {
            row: {
                server: statistics.median(each.tokens_per_s for each in self._of(row, server))
                for server in dict.fromkeys(each.server for each in self.runs if each.row == row)
            }
            for row in dict.fromkeys(each.row for each in self.runs)
        }
        self.ratios = {
            row: {server: found for server in servers if server != OURS and (found := self._by(row, server))}
            for row, servers in self.medians.items()
        }

    def _of(self, row: str, server: str) -> list[Run]:
        return [run for run in self.runs if run.row == row and run.server == server]

    def _by(self, row: str, peer: str) -> list[float]:
        """Each round: the mean of our runs, which lie around the peer's, over the mean of the peer's."""
        found = []
        for at_round in sorted({run.at_round for run in self.runs}):
            ours, its = (
                [run.tokens_per_s for run in self._of(row, server) if run.at_round == at_round]
                for server in (OURS, peer)
            )
            if ours and its:
                found.append(statistics.mean(ours) / statistics.mean(its))
        return found


def text_table(results: Results) -> str:
    """A line for each row and server, medians so far."""
    lines = [f"{'':22s}{'server':16s}{'tok/s':>8s}{'ms a token':>12s}{'ms to first':>12s}  pagebus is"]
    for row, servers in results.medians.items():
        for server, tokens_per_s in servers.items():
            runs = [run for run in results.runs if run.row == row and run.server == server]
            tpots = [run.tpot_ms for run in runs if run.tpot_ms is not None]
            tpot = f"{statistics.median(tpots):.1f}" if tpots else ""
            ttft = statistics.median(run.ttft_ms for run in runs)
            ratio = _ratio(results.ratios.get(row, {}).get(server, []))
            lines.append(f"{row:22s}{server:16s}{tokens_per_s:8.1f}{tpot:>12s}{ttft:12.1f}  {ratio}")
    for name, facts in results.servers.items():
        idle = f"; idle: {statistics.mean(facts.idle_cores):.2f} of a core" if facts.idle_cores else ""
        words = facts.tokens.words() if facts.tokens is not None else "tokens not checked"
        lines.append(f"{name} {facts.version}: {words}{idle}")
    return "\n".join(lines)


def _ratio(ratios: Sequence[float]) -> str:
    if not ratios:
        return ""
    spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
    return f"{statistics.median(ratios):.2f} x{spread}"


def markdown_table(files: Sequence[Results]) -> str:
    """The README's table of several models: tok/s, medians, and pagebus over each peer."""
    peers = list(dict.fromkeys(name for one in files for name in one.servers if name != OURS))
    titles = {name: _title(name, files) for name in peers}
    heads = ["tok/s", "pagebus", *(titles[name] for name in peers), *(f"pagebus / {name}" for name in peers)]
    lines = [_line(heads), _line(["---"] * len(heads))]
    for one in files:
        for row, servers in one.medians.items():
            if STATIC in servers:
                continue
            cells = [f"{one.name}: {row}", *(_figure(servers.get(name)) for name in (OURS, *peers))]
            cells += [_ratio(one.ratios.get(row, {}).get(name, [])) for name in peers]
            lines.append(_line(cells))
    return "\n".join([*lines, *_batching(files)])


def measured_how(files: Sequence[Results]) -> str:
    """A sentence on machine and load, as the files say it."""
    one = files[0]
    machine, load = one.machine, one.load
    highest = max(run.load_average for each in files for run in each.runs)
    return (
        f"Measured {machine['date']} on {machine['num_cores']} cores of {machine['cpu'] or 'a CPU'} "
        f"({machine['instructions'].replace(' ', ', ')}), torch {machine['torch']}, bf16, random weights; "
        f"{load['input_len']} tokens in, {load['output_len']} out, streaming, {load['rounds']} rounds; "
        f"load average at most {highest:.1f}, the comparison itself in it."
    )


def in_readme(readme: str, files: Sequence[Results]) -> str:
    """A README with the table between its marks. Raises `ValueError` where it has none."""
    before, begin, rest = readme.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"no {_BEGIN} ... {_END} in it")
    return f"{before}{begin}\n{markdown_table(files)}\n\n{measured_how(files)}\n{end}{after}"


def _batching(files: Sequence[Results]) -> Iterator[str]:
    for one in files:
        for row, servers in one.medians.items():
            if STATIC in servers:
                ratio = _ratio(one.ratios[row][STATIC])
                yield (
                    f"\n{one.name}, {row}: {servers[OURS]:.0f} tok/s with continuous batching, "
                    f"{servers[STATIC]:.0f} with static batches of the same lengths and order: {ratio}."
                )


def _title(name: str, files: Sequence[Results]) -> str:
    facts = next(one.servers[name] for one in files if name in one.servers)
    return " ".join(word for word in (name, facts.version.partition("-")[0], facts.how) if word)


def _figure(tokens_per_s: float | None) -> str:
    if tokens_per_s is None:
        return ""
    return f"{tokens_per_s:,.0f}" if tokens_per_s >= _WHOLE_FROM else f"{tokens_per_s:.1f}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
