"""pagebus beside other servers and engines, on one checkpoint, with one load, interleaved.

```
python -m tests.bench.compare_peers make smollm2-135m /tmp/smollm2        # a checkpoint with random weights
python -m tests.bench.compare_peers run /tmp/smollm2 --peer vllm=http://127.0.0.1:8100 --peer-pid vllm=$PID \\
    --command 'openvino=VENV/bin/python tests/bench/peer_openvino.py IR_DIR' --streams 1 8 16 \\
    --prefill 1000 --trace azure_llm_2023_conv.csv --out tests/bench/results/peers-smollm2.json
python -m tests.bench.compare_peers table tests/bench/results/peers-*.json --readme README.md
```

`run` starts `pagebus serve` on the checkpoint; servers named by `--peer` run already, on the same one; a
`--command` is started for each of its runs (`peer_servers.py` says what it reads and prints).

1. Tokens come first: what each makes is read by transformers, teacher-forced, before its speed counts.
2. Everybody warms up until two runs agree. Meanwhile nothing is stopped, and what a server burns while
   another one runs is noted (`idle_cores`): one that waits by spinning slows its neighbours.
3. Then each round measures for every row pagebus, each peer, and pagebus again; every run has prompts of its
   own, and a run that found one in a prefix cache is an error. While one is measured, the processes of all
   others whose process id is known (`--peer-pid`; ours always) are stopped by SIGSTOP, and nothing that idles
   costs the one that works. `--no-stop` leaves them running.

Figures are medians over runs, ratios are of what lay side by side, one a round. The results file is rewritten
after every row.
"""

import argparse
import json
import os
import platform
import re
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import msgspec

from pagebus.bench.load import LoadConfig, LoadError, Wanted
from pagebus.bench.load_figures import LoadFigures, Slo, figures
from pagebus.bench.paper_trace import TraceError
from pagebus.bench.serve import ServeRequest, plan
from tests.bench.peer_checkpoint import SHAPES, make
from tests.bench.peer_results import (
    OURS,
    STATIC,
    Results,
    Run,
    ServerFacts,
    in_readme,
    markdown_table,
    measured_how,
    text_table,
)
from tests.bench.peer_servers import CommandPeer, HttpPeer, Peer
from tests.bench.peer_tokens import check_tokens
from tests.bench.peer_turns import Turns
from tests.support.serve import serving

_LEAST_REQUESTS = 3
_WARMED_UP_WITHIN = 0.1
_MOST_WARMUPS = 5


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: a load, and how many requests of it are under way."""

    name: str
    num_streams: int
    wanted: list[Wanted]
    is_prefill: bool = False
    is_static_too: bool = False  # the second server is ourselves, with static batches


def rows(options: argparse.Namespace) -> list[Row]:
    """What is asked for on the command line. Raises `TraceError`."""
    found = []
    for num in options.streams:
        wanted = [Wanted(0.0, options.input_len, options.output_len)]
        found.append(
            Row(
                name=f"{num} stream{'s' * (num > 1)}",
                num_streams=num,
                wanted=wanted * max(_LEAST_REQUESTS, options.waves * num),
            )
        )
    if options.prefill:
        wanted = [Wanted(0.0, options.prefill, 1)] * options.num_prefills
        name = f"prefill of {options.prefill:,}"
        found.append(Row(name=name, num_streams=1, wanted=wanted, is_prefill=True))
    if options.trace is not None:
        wanted = saturated(options.trace, options.num_traced, options.length_scale, options.most_tokens)
        name = f"trace, batch {options.batch}"
        found.append(Row(name=name, num_streams=options.batch, wanted=wanted, is_static_too=True))
    return found


def saturated(trace: Path, num_requests: int, length_scale: float, most_tokens: int) -> list[Wanted]:
    """The first requests of a trace, lengths scaled, all there at once; too long ones are left out."""
    request = ServeRequest(
        load=LoadConfig(url=""), num_requests=num_requests, trace=trace, length_scale=length_scale
    )
    return [
        Wanted(0.0, one.num_prompt, one.num_output)
        for one in plan(request)
        if one.num_prompt + one.num_output <= most_tokens
    ]


def machine() -> dict[str, str]:
    """What the figures depend on, without naming the machine."""
    facts = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    names = re.findall(r"model name\s*: (.*)", facts)
    kinds = [kind for kind in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {kind}" in facts]
    kib = re.findall(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text(encoding="utf-8"))
    packages = {name: version(name) for name in ("torch", "transformers")}
    return {
        "cpu": names[0] if names else "", "num_cores": str(os.cpu_count()), "instructions": " ".join(kinds),
        "memory_gib": f"{int(kib[0]) / 2**20:.0f}", "kernel": platform.release(),
        "python": platform.python_version(), "date": time.strftime("%Y-%m-%d"), **packages,
    }  # fmt: skip


class Comparison:
    """One `run`: the peers, whose turn it is, and what was found."""

    def __init__(self, options: argparse.Namespace, peers: Sequence[Peer], turns: Turns) -> None:
        self._options = options
        self._peers = {peer.name: peer for peer in peers}
        self._turns = turns
        self._rows = rows(options)
        self._next_seed = options.seed
        self.results = Results(
            name=options.name or options.model.resolve().name,
            machine=machine(),
            model=json.loads((options.model / "config.json").read_text(encoding="utf-8")),
            load={
                "input_len": str(options.input_len), "output_len": str(options.output_len),
                "waves": str(options.waves), "rounds": str(options.rounds), "seed": str(options.seed),
                "trace_length_scale": f"{options.length_scale:g}", "serve": " ".join(options.serve),
            },
            servers={peer.name: ServerFacts() for peer in peers},
        )  # fmt: skip

    def run(self) -> None:
        """Tokens, warm-up, rounds. Raises `LoadError`."""
        checks = check_tokens(self._options.model, self._peers)
        for name, check in checks.items():
            self.results.servers[name].tokens = check
        self._warm_up()
        for name, peer in self._peers.items():
            facts = self.results.servers[name]
            facts.version = peer.version()
            facts.how = "(in process, no HTTP)" if isinstance(peer, CommandPeer) else ""
            facts.idle_cores = [round(one, 3) for one in self._turns.idle_cores.get(name, [])]
            facts.is_stopped_meanwhile = not self._options.no_stop and name in self._turns.idle_cores
        for at_round in range(self._options.rounds):
            for row in self._rows:
                self._measure(row, at_round)
                self._save()
            print(f"round {at_round + 1} of {self._options.rounds}\n{text_table(self.results)}\n", flush=True)

    def _warm_up(self) -> None:
        """Until two runs in a row agree, such as when kernels are still being compiled."""
        num = max(row.num_streams for row in self._rows)
        wanted = [Wanted(0.0, self._options.input_len, self._options.output_len)] * num
        for name, peer in self._peers.items():
            if isinstance(peer, CommandPeer):
                continue  # it warms up in each of its runs
            last = 0.0
            for _ in range(_MOST_WARMUPS):
                with self._turns.watching(name):
                    found = figures(peer.load(wanted, num, self._seed()), Slo())
                print(f"warm-up of {name}: {found.output_tokens_per_s:.1f} tok/s", flush=True)
                if abs(found.output_tokens_per_s - last) < _WARMED_UP_WITHIN * last:
                    break
                last = found.output_tokens_per_s

    def _measure(self, row: Row, at_round: int) -> None:
        """Ours, each other one, ours again."""
        if row.is_static_too:
            order = [(OURS, 0), (STATIC, row.num_streams), (OURS, 0)]
        else:
            others = [(name, 0) for name in self._peers if name != OURS]
            order = [(OURS, 0), *others, *([(OURS, 0)] if others else [])]
        for name, batch in order:
            peer = self._peers[OURS if batch else name]
            with self._turns.watching(peer.name) if self._options.no_stop else self._turns.alone(peer.name):
                before = os.getloadavg()[0]
                outcomes = peer.load(row.wanted, row.num_streams, self._seed(), batch)
            self.results.add(_as_run(row, name, at_round, figures(outcomes, Slo()), before))

    def _seed(self) -> int:
        self._next_seed += 1
        return int(self._next_seed)

    def _save(self) -> None:
        if self._options.out is not None:
            encoded = msgspec.json.format(msgspec.json.encode(self.results), indent=2)
            self._options.out.write_bytes(encoded + b"\n")


def _as_run(row: Row, server: str, at_round: int, found: LoadFigures, load_average: float) -> Run:
    """Raises `LoadError` where a request failed or was served from a cache: such a run measures nothing."""
    if found.num_completed < found.num_requests or found.ttft_ms is None:
        raise LoadError(f"{server}: {found.num_completed} of {found.num_requests}: {found.errors}")
    if found.num_cached_tokens:
        raise LoadError(f"{server}: {found.num_cached_tokens} prompt tokens came from a prefix cache")
    tokens_per_s = found.output_tokens_per_s
    if row.is_prefill:
        tokens_per_s = row.wanted[0].num_prompt / found.ttft_ms.p50 * 1e3
    return Run(
        row=row.name,
        server=server,
        at_round=at_round,
        num_requests=found.num_requests,
        duration_s=found.duration_s,
        tokens_per_s=tokens_per_s,
        ttft_ms=found.ttft_ms.p50,
        tpot_ms=found.tpot_ms.p50 if found.tpot_ms is not None else None,
        load_average=load_average,
        tokens=found.num_output_tokens,
    )


def _run(options: argparse.Namespace) -> int:
    urls, pids, commands = (
        dict(one.split("=", 1) for one in given)
        for given in (options.peer, options.peer_pid, options.command_peer)
    )
    if unknown := set(pids) - set(urls):
        raise LoadError(f"--peer-pid names {', '.join(sorted(unknown))}, which no --peer does")
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(Path(folder), str(options.model.resolve()), *options.serve) as serve,
    ):
        peers: list[Peer] = [HttpPeer(OURS, serve.url)]
        peers += [HttpPeer(name, url) for name, url in urls.items()]
        peers += [CommandPeer(name, command) for name, command in commands.items()]
        known = {name: int(pid) for name, pid in pids.items()}
        turns = Turns({OURS: serve.process.pid, **known})
        try:
            comparison = Comparison(options, peers, turns)
            comparison.results.servers[OURS].ready_after_s = round(serve.seconds_to_ready, 2)
            comparison.run()
        finally:
            turns.end()
    checks = [facts.tokens for facts in comparison.results.servers.values()]
    return 0 if all(check is not None and check.is_right for check in checks) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.compare_peers", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="write a checkpoint with random weights")
    making.add_argument("shape", choices=SHAPES)
    making.add_argument("folder", type=Path)
    running = commands.add_parser("run", help="compare")
    add = running.add_argument
    add("model", type=Path, help="the checkpoint that all servers serve")
    add("--name", default="", help="of the model in tables (default: the folder's)")
    add("--peer", action="append", default=[], metavar="NAME=URL")
    add("--peer-pid", action="append", default=[], metavar="NAME=PID", help="first process of that peer")
    add("--command", dest="command_peer", action="append", default=[], metavar="NAME=COMMAND")
    add("--no-stop", action="store_true", help="let the others idle while one is measured")
    add("--streams", type=int, nargs="*", default=[1, 8, 16])
    add("--input-len", type=int, default=128)
    add("--output-len", type=int, default=64)
    add("--waves", type=int, default=2, help="requests a stream (default: %(default)s)")
    add("--prefill", type=int, default=0, metavar="N", help="also: prompts of N tokens, one at a time")
    add("--num-prefills", type=int, default=5, metavar="N")
    add("--trace", type=Path, help="also: static against continuous batching with a trace's lengths")
    add("--num-traced", type=int, default=160, metavar="N", help="requests of it (default: %(default)s)")
    add("--length-scale", type=float, default=0.125, help="of its lengths (default: %(default)s)")
    add("--most-tokens", type=int, default=1024, metavar="N", help="longer ones are left out")
    add("--batch", type=int, default=16)
    add("--rounds", type=int, default=3)
    add("--seed", type=int, default=int(time.time()), help="of the prompts; new ones in each comparison")
    add("--out", type=Path, help="results file, e.g. in tests/bench/results")
    add("--serve", nargs=argparse.REMAINDER, default=[], help="more flags of pagebus serve")
    showing = commands.add_parser("table", help="results as a table in Markdown")
    showing.add_argument("files", type=Path, nargs="+")
    showing.add_argument("--readme", type=Path, help="put it there, between its marks")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module's words."""
    options = _parser().parse_args(arguments)
    if options.command == "make":
        print(make(options.shape, options.folder))
        return 0
    if options.command == "table":
        decoded = [msgspec.json.decode(file.read_bytes(), type=Results) for file in options.files]
        print(f"{markdown_table(decoded)}\n\n{measured_how(decoded)}")
        if options.readme is not None:
            options.readme.write_text(in_readme(options.readme.read_text("utf-8"), decoded), "utf-8")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that nothing stays stopped
    try:
        return _run(options)
    except (LoadError, TraceError) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
