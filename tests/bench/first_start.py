"""The first start on a machine and the next one: how soon pagebus answers, and how fast before and after.

```
python -m tests.bench.first_start [MODEL] --out tests/bench/results/first_start.json
```

The first start finds an empty cache of compiled kernels, the second one what the first has left there. With
`--slow-compiler S` the compiler takes at least so long, so that the first answers are torch's own operators'.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from pagebus.bench.load import LoadConfig, Wanted
from pagebus.bench.load_figures import Slo, figures
from pagebus.bench.serve import measure
from pagebus.kernels.cpu_compile import find_compiler
from tests.support.serve import Serve, serving

TAKEN = "compiled kernels for"
_REQUESTS = 3


class Start(msgspec.Struct, kw_only=True):
    """One start. `switched_s`: from the start to the moment when compiled kernels answer."""

    name: str
    ready_s: float
    first_answer_s: float
    switched_s: float | None
    eager_tokens_per_s: float | None
    compiled_tokens_per_s: float | None


class Results(msgspec.Struct, kw_only=True):
    """What was measured, and where."""

    model: str
    machine: str
    date: str
    load_average: float
    starts: list[Start]


def tokens_per_s(serve: Serve, num_output: int) -> float:
    """Median of some requests, one stream, the first token left out."""
    wanted = [Wanted(0.0, 32, num_output)] * _REQUESTS
    outcomes = measure(LoadConfig(url=serve.url, max_concurrency=1, seed=time.monotonic_ns()), wanted)
    found = figures(outcomes, Slo())
    if found.tpot_ms is None or found.num_completed < _REQUESTS:
        raise RuntimeError(f"requests failed: {found.errors}")
    return 1000 / found.tpot_ms.p50


def measure_start(name: str, model: Sequence[str], env: dict[str, str], num_output: int) -> Start:
    """Start it, answer, wait for compiled kernels, answer again."""
    with tempfile.TemporaryDirectory(prefix="first-start-") as folder:
        began_s = time.monotonic()
        with serving(Path(folder), *model, env=env) as serve:
            ready_s = time.monotonic() - began_s
            status, found = serve.post("/v1/completions", {"prompt": "One", "max_tokens": 1})
            if status != 200:
                raise RuntimeError(f"no answer: {found}")
            answered_s = time.monotonic() - began_s
            eager, switched_s = None, None
            if TAKEN not in serve.output():
                eager = tokens_per_s(serve, num_output)
                if TAKEN in serve.output():
                    raise RuntimeError("the kernels came while the slow path was measured: a slower compiler")
                while TAKEN not in serve.output() and time.monotonic() < began_s + 120:
                    time.sleep(0.05)
                serve.wait_ready()
                switched_s = round(time.monotonic() - began_s, 2)
            compiled = tokens_per_s(serve, num_output) if TAKEN in serve.output() else None
    return Start(
        name=name,
        ready_s=round(ready_s, 2),
        first_answer_s=round(answered_s, 2),
        switched_s=switched_s,
        eager_tokens_per_s=None if eager is None else round(eager, 1),
        compiled_tokens_per_s=None if compiled is None else round(compiled, 1),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module's words."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.first_start", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("model", nargs="?", default="", help="a directory; none: the bundled model")
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--slow-compiler", type=float, default=15.0, metavar="S")
    parser.add_argument("--out", type=Path, help="results file")
    options = parser.parse_args(arguments)
    model = [options.model, "--max-model-len", "2048"] if options.model else []
    starts: list[Start] = []
    with tempfile.TemporaryDirectory(prefix="first-start-") as folder:
        slow = Path(folder) / "compiler"
        slow.write_text(
            f'#!/bin/sh\n[ "$1" = --version ] || sleep {options.slow_compiler}\nexec {find_compiler()} "$@"\n'
        )
        slow.chmod(0o700)
        as_it_is = {"XDG_CACHE_HOME": f"{folder}/a"}
        late = {"XDG_CACHE_HOME": f"{folder}/b", "CXX": str(slow)}
        for name, env in (
            ("first start", as_it_is),
            ("second start", as_it_is),
            ("first start, slow compiler", late),
            ("second start, slow compiler", late),
        ):
            starts.append(measure_start(name, model, env, options.output_len))
            print(msgspec.json.encode(starts[-1]).decode(), flush=True)
    results = Results(
        model=Path(options.model).name or "bundled",
        machine=f"{platform.machine()}, {os.cpu_count()} CPUs",
        date=time.strftime("%Y-%m-%d"),
        load_average=round(statistics.fmean(os.getloadavg()[:1]), 2),
        starts=starts,
    )
    if options.out is not None:
        options.out.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
