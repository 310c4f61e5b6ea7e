"""`pagebus bench gpu` runs from end to end on a tiny shape and a CPU; its floors are those of the shapes."""

import msgspec
import pytest

from pagebus.bench.gpu import RESULTS_FILE
from pagebus.bench.gpu_results import Measured, Report
from pagebus.bench.gpu_shapes import cost_of
from pagebus.cli.bench import bench
from pagebus.cli.errors import CommandError


def test_floors_are_those_of_the_shapes():
    """At 4.3 TB/s and 785 TFLOP/s, rounded as they are usually told."""
    qwen, llama = cost_of("qwen3-0.6b"), cost_of("llama-3.1-8b")
    assert (qwen.kv_bytes, llama.kv_bytes) == (114_688, 131_072)
    assert round(qwen.num_parameters / 1e6) == 596
    assert round(llama.num_parameters / 1e7) == 750
    for cost, num_rows, floor_ms in ((qwen, 1, 0.30), (qwen, 256, 7.38), (llama, 1, 3.52), (llama, 32, 4.49)):
        found_ms = cost.decode_floor_s(num_rows, 1024, 4.3e12, 785e12) * 1e3
        assert found_ms == pytest.approx(floor_ms, rel=0.03)


def test_how_near_a_floor():
    assert Measured(name="t", value=4.0, unit="ms", floor=3.0).share == 0.75
    assert Measured(name="r", value=30.0, unit="tok/s", floor=40.0, is_less_better=False).share == 0.75
    assert Measured(name="x", value=1.0, unit="ms").share is None


def test_it_runs_and_keeps_its_file(tmp_path, capsys):
    words = ["gpu", "--device", "cpu", "--shapes", "tiny", "--quick", "--out", str(tmp_path)]
    assert bench(words) == 0
    report = msgspec.json.decode((tmp_path / RESULTS_FILE).read_bytes(), type=Report)
    assert report.failed == {}
    names = [measured.name for measured in report.measured]
    assert len(names) == len(set(names)) == 7
    assert sum("over NATS" in name for name in names) == 2
    assert all(measured.value > 0 for measured in report.measured)
    table = capsys.readouterr().out
    assert all(name in table for name in names)


def test_bad_flags():
    with pytest.raises(CommandError, match="no folder"):
        bench(["gpu", "--out", "/nowhere"])
    assert bench(["gpu", "--shapes", "gpt-9"]) == 2
