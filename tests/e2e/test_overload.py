"""Ten times the load that can be served: what is served stays as much, what is refused is refused at once."""

import random

import msgspec
import pytest

from pagebus.bench.load import LoadConfig, Wanted, arrivals
from pagebus.bench.load_figures import LoadFigures, Slo, figures
from pagebus.bench.serve import measure
from pagebus.cli.bench_serve import bench_serve
from tests.support.serve import serving

STEP_S = 0.02
NUM_ROWS = 16
NUM_QUEUED = 32
NUM_TOKENS = 40
CAPACITY = NUM_ROWS / (STEP_S * NUM_TOKENS)  # requests a second, if steps took no longer
OVERLOAD_S = 6.0


def steady_rate(outcomes):
    """Tokens a second in the middle of a run, when neither start nor end show."""
    times = sorted(at_s for outcome in outcomes for at_s in outcome.answer.text_times_s)
    first_s, last_s = times[0], times[-1]
    begin_s, end_s = first_s + 0.25 * (last_s - first_s), first_s + 0.7 * (last_s - first_s)
    return sum(begin_s <= at_s < end_s for at_s in times) / (end_s - begin_s)


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    flags = ["--fake", "--max-num-seqs", str(NUM_ROWS), "--max-num-queued-reqs", str(NUM_QUEUED)]
    with serving(
        tmp_path_factory.mktemp("overload"), *flags, env={"PAGEBUS_FAKE_STEP_S": str(STEP_S)}
    ) as serve:
        yield serve.url


def test_ten_times_the_capacity(url):
    """Compared in one run with a closed loop that keeps every row busy, twice, as neighbours make noise."""
    rng = random.Random(1)
    reached = []
    for attempt in range(3):
        full = [Wanted(0.0, 30, NUM_TOKENS) for _ in range(round(5 * CAPACITY))]
        peak = measure(LoadConfig(url=url, max_concurrency=NUM_ROWS + 8, seed=rng.randrange(1 << 30)), full)
        num_wanted = round(10 * CAPACITY * OVERLOAD_S)
        flood = [Wanted(at_s, 30, NUM_TOKENS) for at_s in arrivals(num_wanted, 10 * CAPACITY, attempt)]
        outcomes = measure(LoadConfig(url=url, seed=rng.randrange(1 << 30)), flood)
        found = figures(outcomes, Slo())
        share = steady_rate(outcomes) / steady_rate(peak)
        reached.append((share, found.refusal_ms.p50))
        print(
            f"goodput {100 * share:.0f} % of the peak; {found.num_completed} completed, {found.num_refused} "
            f"refused in {found.refusal_ms.p50:.1f} ms (p99 {found.refusal_ms.p99:.0f} ms)"
        )
        assert found.num_failed == 0, found.errors
        assert found.num_refused > 0.5 * num_wanted
        assert found.num_refused_without_retry_after == 0
        # Nobody waits longer than the queue is deep.
        assert found.ttft_ms.highest < 1e3 * 3 * (NUM_QUEUED / CAPACITY + 1)
        if share >= 0.9 and found.refusal_ms.p99 < 50:
            return
    assert max(share for share, _ in reached) >= 0.9
    assert min(refusal_ms for _, refusal_ms in reached) < 50


def test_the_command(url, tmp_path, capsys):
    """As a user measures a server."""
    result, plot = tmp_path / "result.json", tmp_path / "run.svg"
    words = ["--base-url", url, "--endpoint", "chat", "--num-prompts", "20", "--max-concurrency", "4"]
    words += [
        "--output-len",
        "10",
        "--save-result",
        str(result),
        "--plot",
        str(plot),
        "--goodput",
        "ttft:5000",
    ]
    assert bench_serve(words) == 0
    found = msgspec.json.decode(result.read_bytes(), type=LoadFigures)
    assert (found.num_completed, found.num_output_tokens, found.num_good) == (20, 200, 20)
    assert found.ttft_ms.p50 > 1e3 * STEP_S / 2
    assert "time per output token" in capsys.readouterr().out
    assert plot.read_text().count("<rect") > 10
