"""`pagebus bench paper` end to end: one quick run, its figures in plausible bounds, tables and plot."""

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import msgspec
import pytest

from pagebus.bench.paper_figures import PAGING
from pagebus.bench.paper_results import Results
from pagebus.bench.paper_table import tables
from pagebus.cli.main import main

SYSTEMS = ["Orca (Max)", "Orca (Pow2)", "Orca (Oracle)", PAGING]


def write_trace(path: Path, num_requests: int, num_prompt: int, num_output: int) -> Path:
    """Four requests at once, every eight seconds; lengths around those given."""
    times = [divmod(i // 4 * 8, 60) for i in range(num_requests)]
    rows = [
        f"2023-11-16 18:{minute:02}:{second:02}.5,{num_prompt + 7 * i},{num_output + 3 * i}"
        for i, (minute, second) in enumerate(times)
    ]
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows, ""]), encoding="utf-8")
    return path


class Quick:
    """One quick run through the command line, as JSON and with a plot."""

    def __init__(self, folder: Path) -> None:
        self.plot = folder / "figures.svg"
        trace = write_trace(folder / "bursts.csv", num_requests=40, num_prompt=900, num_output=150)
        printed = StringIO()
        with redirect_stdout(printed):
            self.exit_code = main(
                ["bench", "paper", "--quick", "--json", "--plot", str(self.plot), "--trace", str(trace)]
            )
        self.results = msgspec.json.decode(printed.getvalue(), type=Results)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Quick:
    return Quick(tmp_path_factory.mktemp("paper"))


@pytest.mark.parametrize("workload", ["ShareGPT", "Alpaca", "bursts"])
def test_memory_shares_are_ordered_and_sum_to_the_pool(quick: Quick, workload: str) -> None:
    assert quick.exit_code == 0
    rows = [row for row in quick.results.memory if row.workload == workload]
    assert [row.system for row in rows] == SYSTEMS
    shares = [row.token_state for row in rows]
    assert shares == sorted(shares)
    for row in rows:
        assert row.token_state + row.reserved + row.internal + row.external == pytest.approx(100.0)
        assert row.of_held >= row.token_state


def test_memory_on_sharegpt_is_near_the_paper(quick: Quick) -> None:
    for row in quick.results.memory:
        if row.paper is not None:
            assert row.token_state == pytest.approx(row.paper.token_state, abs=6.0)
    paging = next(row for row in quick.results.memory if row.system == PAGING)
    assert paging.of_held >= 95.5


@pytest.mark.parametrize("workload", ["ShareGPT", "Alpaca"])
def test_batches_rates_and_throughputs_rank_as_in_the_paper(quick: Quick, workload: str) -> None:
    batches = [row for row in quick.results.batches if row.workload == workload]
    assert [row.system for row in batches] == SYSTEMS
    running = [row.num_running for row in batches]
    assert running == sorted(running)
    assert running[0] == pytest.approx(7.0, abs=0.3)
    assert running[3] > 2 * running[0]
    rates = [row.rate for row in quick.results.rates if row.workload == workload]
    assert rates == sorted(rates)
    assert rates[3] > 1.2 * rates[2]
    throughputs = [row.tokens_per_s for row in quick.results.throughputs if row.workload == workload]
    assert throughputs == sorted(throughputs)
    assert throughputs[1] > 1.5 * throughputs[0]  # static against continuous, with equal reservations


@pytest.mark.parametrize(("workload", "low", "high"), [("ShareGPT", 8.0, 40.0), ("Alpaca", 3.0, 14.0)])
def test_more_choices_share_more(quick: Quick, workload: str, low: float, high: float) -> None:
    saved = [100 * row.saved for row in quick.results.sharing if row.workload == workload]
    assert len(saved) == 3
    assert saved == sorted(saved)
    assert low < saved[0]
    assert saved[-1] < high


def test_tables_show_every_figure(quick: Quick) -> None:
    text = tables(quick.results)
    for heading in (
        "1. KV memory",
        "2. Running",
        "3. Highest",
        "4. Block size",
        "5. Parallel",
        "6. Generated",
    ):
        assert heading in text
    for row in quick.results.batches:
        assert f"{row.num_running:.2f}" in text
    for paper in ("96.3", "20.4", "30.42", "132.44", "1.7 to 2.7", "16.2 to 30.5"):
        assert paper in text
    assert max(map(len, text.splitlines())) < 160


def test_the_plot_is_a_drawing_within_its_frame(quick: Quick) -> None:
    root = ElementTree.fromstring(quick.plot.read_text("utf-8"))
    width, height = map(float, root.attrib["viewBox"].split()[2:])
    assert (width, height) > (0, 0)
    rects = [e for e in root.iter("{http://www.w3.org/2000/svg}rect") if "x" in e.attrib]
    assert len(rects) > 40
    for rect in rects:
        assert float(rect.attrib["height"]) >= 0
        assert 0 <= float(rect.attrib["x"]) <= width
        assert 0 <= float(rect.attrib["y"]) <= height
    words = {e.text for e in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"ShareGPT: KV memory, %", PAGING, "256"} <= words


def test_a_trace_is_simulated_beside_the_papers_lengths(quick: Quick) -> None:
    results = quick.results
    for rows in (results.memory, results.batches, results.rates):
        of_trace = [row for row in rows if row.workload == "bursts"]
        assert [row.system for row in of_trace] == SYSTEMS
        assert {row.paper for row in of_trace} == {None}
    assert [row.block_size for row in results.blocks if row.workload == "bursts"] == [1, 16, 256]
    saved = [row.saved for row in results.sharing if row.workload == "bursts"]
    assert 0.3 < saved[0] < saved[-1] < 0.85  # long prompts, short answers


def test_a_trace_that_never_fills_the_memory_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = write_trace(tmp_path / "few.csv", num_requests=4, num_prompt=10, num_output=10)
    assert main(["bench", "paper", "--quick", "--trace", str(trace)]) == 2
    assert "few: these requests are too few or too short" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plot", "figures.png"], "name the file figures.svg"),
        (["--plot", "no/such/folder/a.svg"], "is no folder"),
        (["--horizon", "-1"], "--horizon is -1"),
        (["--horizon", "65"], "--horizon is 65"),
        (["--latency-limit", "nan"], "--latency-limit is nan"),
        (["--latency-limit", "0"], "--latency-limit is 0.0"),
        (["--seed", "-5"], "--seed is -5"),
        (["--trace", "no-such-file.csv"], "no-such-file.csv cannot be read"),
        (["--model", "gpt"], "invalid choice"),
        (["--speed"], "unrecognized arguments"),
    ],
)
def test_wrong_arguments_are_one_sentence(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["bench", "paper", *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""


def test_benchmarks_are_listed_and_unknown_ones_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    assert "paper" in capsys.readouterr().out
    assert main(["bench"]) == 2
    assert "paper" in capsys.readouterr().err
    assert main(["bench", "nothing"]) == 2
    assert "'nothing' is no benchmark" in capsys.readouterr().err


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from pagebus.cli.main import main\n"
        "assert main(['bench', 'paper', '--help']) == 0\n"
        "heavy = {m.split('.')[0] for m in sys.modules} & {'numpy', 'msgspec', 'torch', 'transformers'}\n"
        "sys.exit(f'loads {sorted(heavy)}' if heavy else 0)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "--trace" in ended.stdout
