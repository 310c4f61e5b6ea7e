"""The comparison's own parts: what commands say, whose turn it is, and what the tables make of runs."""

import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from pagebus.bench.load import LoadError, Wanted
from pagebus.bench.load_figures import Slo, figures
from tests.bench.compare_peers import _as_run, _parser, rows
from tests.bench.peer_results import (
    OURS,
    STATIC,
    Results,
    Run,
    ServerFacts,
    in_readme,
    markdown_table,
    text_table,
)
from tests.bench.peer_servers import CommandPeer
from tests.bench.peer_turns import Turns, cpu_s

ENGINE = """
import json, sys
question = json.load(sys.stdin)
answers = [
    {"sent_s": 1.0, "times_s": [1.5 + 0.1 * at for at in range(num)], "tokens": [sum(prompt)] * num}
    for prompt, num in zip(question["prompts"], question["num_output"])
]
print("a line that is none of ours")
print(json.dumps({"answers": answers[: int(sys.argv[1])], "version": "7"}))
"""


def engine(num_answers, script=ENGINE):
    return CommandPeer("other", f"{sys.executable} -c '{script}' {num_answers}")


def test_a_command_is_measured_by_its_own_clock():
    peer = engine(9)
    wanted = [Wanted(0.0, 20, 4), Wanted(0.0, 20, 6)]
    found = figures(peer.load(wanted, 2, seed=1), Slo())
    assert (found.num_completed, found.num_output_tokens, found.num_input_tokens) == (2, 10, 40)
    assert found.ttft_ms.p50 == pytest.approx(500)
    assert found.tpot_ms.p50 == pytest.approx(100)
    assert found.output_tokens_per_s == pytest.approx(10)
    assert peer.version() == "7"
    assert peer.greedy([[1, 2], [3, 4, 5]], 3) == [[3, 3, 3], [12, 12, 12]]


@pytest.mark.parametrize(
    ("peer", "words"),
    [
        (engine(1), "answered 1 of 2"),
        (engine(2, 'import sys; sys.exit("no such model")'), "no such model"),
        (engine(2, 'print("hello")'), "gives no figures"),
        (CommandPeer("other", "/nowhere/engine"), "gives no figures"),
    ],
)
def test_a_command_that_gives_no_figures_is_an_error(peer, words):
    with pytest.raises(LoadError, match=words):
        peer.load([Wanted(0.0, 4, 2)] * 2, 2, seed=1)


def state(pid):
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def children(pid):
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def until(is_so):
    deadline = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def servers():
    """Two servers of two processes each; the first spins."""
    spin = "while True: pass"
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    scripts = {"spins": spin, "waits": "import time; time.sleep(600)"}
    started = {
        name: subprocess.Popen([sys.executable, "-c", parent, script]) for name, script in scripts.items()
    }
    below = {}
    for name, process in started.items():
        until(lambda pid=process.pid: children(pid))
        below[name] = children(process.pid)[0]
    yield {name: process.pid for name, process in started.items()}, below
    for name, process in started.items():
        for pid in (process.pid, below[name]):
            os.kill(pid, 9)
        process.wait()


def test_what_a_server_burns_while_it_idles_is_seen(servers):
    pids, below = servers
    until(lambda: cpu_s(below["spins"]) > 0.02)
    turns = Turns(pids)
    before = cpu_s(pids["spins"])
    with turns.watching("waits"):
        until(lambda: cpu_s(pids["spins"]) - before >= 0.05)
    with turns.watching("spins"):
        time.sleep(0.05)
    assert turns.idle_cores["spins"][0] > 0
    assert turns.idle_cores["waits"][0] < 0.9  # it may still be starting


def test_only_the_one_whose_turn_it_is_runs_with_all_its_processes(servers):
    pids, below = servers
    turns = Turns(pids)
    for mine, other in (("spins", "waits"), ("waits", "spins"), ("spins", "waits")):
        with turns.alone(mine):
            until(lambda name=other: state(pids[name]) == state(below[name]) == "T")
            assert "T" not in (state(pids[mine]), state(below[mine]))
    turns.end()
    until(lambda: all(state(pid) != "T" for pid in (*pids.values(), *below.values())))


def run(row, server, at_round, tokens_per_s):
    return Run(row=row, server=server, at_round=at_round, num_requests=3, duration_s=1.0,
               tokens_per_s=tokens_per_s, ttft_ms=5.0, tpot_ms=None, load_average=0.5)  # fmt: skip


def found(name="some-1B"):
    servers = {OURS: ServerFacts(), "fast": ServerFacts(version="1.2-g34", how="(in process)")}
    results = Results(name=name, machine={}, model={}, load={}, servers=servers)
    for at_round, (first, its, again) in enumerate([(80, 50, 120), (90, 60, 90), (50, 100, 70)]):
        for server, value in ((OURS, first), ("fast", its), (OURS, again)):
            results.add(run("1 stream", server, at_round, float(value)))
    for server, value in ((OURS, 130.0), (STATIC, 100.0), (OURS, 150.0)):
        results.add(run("trace, batch 16", server, 0, value))
    return results


def test_ratios_are_of_runs_side_by_side_and_figures_medians():
    results = found()
    assert results.medians["1 stream"] == {OURS: 85.0, "fast": 60.0}
    assert results.ratios == {"1 stream": {"fast": [2.0, 1.5, 0.6]}, "trace, batch 16": {STATIC: [1.4]}}
    assert msgspec.json.decode(msgspec.json.encode(results), type=Results) == results
    assert "1.50 x (0.60 to 2.00)" in text_table(results)


def test_the_readmes_table():
    lines = markdown_table([found(), found("other-2B")]).splitlines()
    assert lines[:3] == [
        "| tok/s | pagebus | fast 1.2 (in process) | pagebus / fast |",
        "| --- | --- | --- | --- |",
        "| some-1B: 1 stream | 85.0 | 60.0 | 1.50 x (0.60 to 2.00) |",
    ]
    assert lines[3].startswith("| other-2B: 1 stream")
    assert lines[5] == (
        "some-1B, trace, batch 16: 140 tok/s with continuous batching, "
        "100 with static batches of the same lengths and order: 1.40 x."
    )


def test_the_table_goes_between_the_readmes_marks():
    machine = {"date": "d", "num_cores": "2", "cpu": "chip", "instructions": "a b", "torch": "9"}
    load = {"input_len": "128", "output_len": "64", "rounds": "3"}
    results = msgspec.structs.replace(found(), machine=machine, load=load)
    readme = "# a\n<!-- peers: begin -->\nold\n<!-- peers: end -->\n# b\n"
    text = in_readme(readme, [results])
    assert text.startswith("# a\n<!-- peers: begin -->\n| tok/s | pagebus |")
    assert text.endswith("the comparison itself in it.\n<!-- peers: end -->\n# b\n")
    assert "old" not in text
    assert "2 cores of chip (a, b), torch 9" in text
    assert in_readme(text, [results]) == text
    with pytest.raises(ValueError, match="peers: begin"):
        in_readme("# a", [results])


def test_rows(tmp_path):
    trace = tmp_path / "trace.csv"
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    lines += [f"2023-11-16 18:15:{at},{800 * at},80" for at in range(10, 20)]
    trace.write_text("\n".join(lines))
    words = ["run", "m", "--streams", "1", "8", "--prefill", "500", "--trace", str(trace)]
    alone, eight, prefill, batch = rows(_parser().parse_args([*words, "--most-tokens", "1310"]))
    assert (alone.name, len(alone.wanted), len(eight.wanted)) == ("1 stream", 3, 16)
    assert prefill.is_prefill
    assert prefill.wanted[0] == Wanted(0.0, 500, 1)
    assert batch.is_static_too
    assert batch.wanted == [Wanted(0.0, 100 * at, 10) for at in (10, 11, 12, 13)]


def test_a_run_that_failed_or_was_cached_measures_nothing():
    (row,) = rows(_parser().parse_args(["run", "m", "--streams", "1"]))
    good = figures(engine(9).load(row.wanted, 1, seed=3), Slo())
    assert _as_run(row, OURS, 0, good, 0.0).num_requests == 3
    for field in ({"num_completed": 2}, {"num_cached_tokens": 16}):
        with pytest.raises(LoadError):
            _as_run(row, OURS, 0, msgspec.structs.replace(good, **field), 0.0)
