"""The benchmarks of bus, gateway and engine run, count right, and write what they print."""

import json
from pathlib import Path

import pytest

from pagebus.bench.gateway import GatewayRequest, measure
from pagebus.bench.processes import cpu_s, percentile, rss_bytes
from pagebus.cli.bench import bench
from pagebus.cli.errors import CommandError


def figures(path: Path) -> dict:
    found = json.loads(path.read_text())
    assert found["machine"]["num_cpus"] >= 1
    assert "/" not in found["machine"]["python"]
    return found


async def test_every_token_of_every_stream_arrives_with_and_without_coalescing():
    """`measure` itself compares what was made with what arrived, and fails where they differ."""
    found = await measure(GatewayRequest(num_streams=48, num_executors=4, seconds=0.5))
    one, adaptive = found.variants
    assert (one.stream_interval, adaptive.stream_interval) == (1, 0)
    assert one.saturated.tokens_per_event == pytest.approx(1.0)
    assert adaptive.saturated.tokens_per_event > 1.05
    for variant in found.variants:
        for stage in (variant.saturated, variant.half_load):
            assert stage.tokens > 48
            assert stage.gateway_cpu_s > 0
            assert 0 < stage.latency_p50_ms <= stage.latency_p99_ms


async def test_several_gateways_share_one_port_evenly():
    found = await measure(
        GatewayRequest(num_streams=64, num_executors=4, num_gateways=2, seconds=0.3, intervals=(0,))
    )
    (variant,) = found.variants
    assert min(variant.streams_by_gateway) >= 0.25 * sum(variant.streams_by_gateway)


def test_bus(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert (
        bench(["bus", "--sizes", "16", "2048", "--messages", "400", "--json", str(tmp_path / "b.json")]) == 0
    )
    sizes = figures(tmp_path / "b.json")["sizes"]
    assert [size["num_bytes"] for size in sizes] == [16, 2048]
    assert all(0 < size["hot_p50_us"] <= size["hot_p99_us"] and size["messages_per_s"] > 0 for size in sizes)
    assert "messages/s" in capsys.readouterr().out


def test_hops(tmp_path: Path):
    assert bench(["hops", "--num-prompts", "10", "--json", str(tmp_path / "h.json")]) == 0
    found = json.loads((tmp_path / "h.json").read_text())
    assert found["num_requests"] == 10
    assert found["bus_part_of_first_token"]["p50"] < found["first_token"]["p50"]


def test_latency_and_throughput(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    few = ["--fake", "--input-len", "8", "--output-len", "8"]
    file = str(tmp_path / "l.json")
    latency = ["latency", *few, "--num-iters", "2", "--num-iters-warmup", "1", "--output-json", file]
    assert bench(latency) == 0
    found = figures(tmp_path / "l.json")
    assert len(found["latencies"]) == 2
    assert found["percentiles"]["10"] <= found["avg_latency"] <= found["percentiles"]["99"]
    assert bench(["throughput", *few, "--num-prompts", "6", "--in-one-process"]) == 0
    assert "(one-process)" in capsys.readouterr().out


def test_both_ways_make_the_same_tokens(tmp_path: Path):
    words = ["throughput", "--fake", "--input-len", "8", "--output-len", "8", "--num-prompts", "6"]
    assert bench([*words, "--ratio", "--rounds", "2", "--json", str(tmp_path / "r.json")]) == 0
    found = figures(tmp_path / "r.json")
    assert found["is_same"] is True
    assert len(found["over_bus"]) == len(found["in_one_process"]) == 2


def test_many_tokens_leave_memory_as_it_was(tmp_path: Path):
    """100,000 tokens after 32,000: what each request left behind would be megabytes in each process."""
    words = ["memory", "--tokens", "100000", "--limit", "24", "--json", str(tmp_path / "m.json")]
    assert bench(words) == 0
    found = figures(tmp_path / "m.json")
    assert found["num_tokens"] == 100_000
    assert set(found["memory"]) == {"executor", "scheduler", "gateway", "nats-server"}


def test_scheduler(tmp_path: Path):
    assert bench(["scheduler", "--rows", "32", "--steps", "20", "--json", str(tmp_path / "s.json")]) == 0
    assert figures(tmp_path / "s.json")["figures"][0]["rows"] == 32


@pytest.mark.parametrize(
    "words",
    [
        ["gateway", "--streams", "0"],
        ["bus", "--sizes", "-1"],
        ["latency", "--num-iters", "0"],
        ["throughput", "--num-prompts", "x"],
        ["memory", "--tokens", "1"],
    ],
)
def test_numbers_that_make_no_sense_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]):
    assert bench(words) == 2
    assert words[1] in capsys.readouterr().err


@pytest.mark.parametrize("name", ["gateway", "bus", "hops", "memory", "latency", "throughput"])
def test_a_file_that_cannot_be_written_is_told_before_anything_starts(name: str, tmp_path: Path):
    with pytest.raises(CommandError, match="no folder"):
        bench([name, "--json", str(tmp_path / "absent" / "x.json")])


def test_what_a_process_used():
    import os

    assert cpu_s(os.getpid()) > 0
    assert rss_bytes(os.getpid()) > 1 << 20
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([], 0.5) == 0.0
