"""`pagebus bench gpu` runs from end to end on a tiny shape and a CPU; its floors are those of the shapes."""

import pytest

from pagebus.bench import gpu
from pagebus.bench.gpu import RESULTS_FILE
from pagebus.bench.gpu_parts import Part, parts_of
from pagebus.bench.gpu_results import Measured, line, load
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
    assert Measured(name="t", value=4.0, unit="ms", bar=3.9).is_met is False
    assert Measured(name="r", value=0.99, unit="", bar=0.99, is_less_better=False).is_met is True
    assert "MISSED" in line(Measured(name="t", value=4.0, unit="ms", bar=3.9))


def test_it_runs_and_keeps_its_file(tmp_path, capsys):
    words = ["gpu", "--device", "cpu", "--shapes", "tiny", "--quick", "--out", str(tmp_path)]
    assert bench(words) == 0
    report = load(tmp_path / RESULTS_FILE)
    assert report.failed == {}
    assert report.done == ["ceilings", "tiny, alone", "tiny, served", "tiny, ratio"]
    names = [measured.name for measured in report.measured]
    assert len(names) == len(set(names)) == 14
    assert sum("over NATS" in name for name in names) == 8
    assert all(measured.value > 0 for measured in report.measured)
    table = capsys.readouterr().out
    assert all(name in table for name in names)
    # Another run goes on with the file: nothing is measured twice.
    again = tmp_path / "again"
    again.mkdir()
    assert bench([*words[:-1], str(again), "--resume", str(tmp_path / RESULTS_FILE)]) == 0
    assert load(again / RESULTS_FILE).measured == report.measured


def test_a_part_that_fails_ends_nothing_else(tmp_path, monkeypatch):
    """Its words are kept, and so are the figures before it; what has no time is named."""

    def broken(shapes, **_):
        parts = [
            Part(kind="ceilings", about_s=1),
            Part(kind="alone", shape="no-such", num_rows=(1,), about_s=1),
        ]
        return [*parts, Part(kind="ratio", shape="tiny", about_s=1e6)]

    monkeypatch.setattr(gpu, "parts_of", broken)
    request = gpu.GpuRequest(out=tmp_path, device="cpu", shapes=("tiny",), is_quick=True, budget_s=200.0)
    report = gpu.run(request)
    assert "KeyError" in report.failed["no-such, alone"]
    assert (report.done, report.left) == (["ceilings"], ["tiny, ratio"])
    assert "KeyError" in (tmp_path / gpu.LOG_FILE).read_text()
    assert load(tmp_path / RESULTS_FILE).measured == report.measured


def test_a_part_that_hangs_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "_LEAST_S", 0.5)
    parts = [Part(kind="ceilings", about_s=0.01)]
    monkeypatch.setattr(gpu, "parts_of", lambda *_, **__: parts)
    report = gpu.run(gpu.GpuRequest(out=tmp_path, device="cpu", is_quick=True))
    assert "not done after" in report.failed["ceilings"]


def test_every_bar_of_the_table_is_measured():
    parts = parts_of(["qwen3-0.6b", "llama-3.1-8b"], is_quick=False, has_bus=True, is_cpu=False)
    names = [part.name for part in parts]
    assert len(names) == len(set(names))
    served = {(part.shape, part.variant.name): set(part.loads) for part in parts if part.kind == "served"}
    assert served["qwen3-0.6b", ""] >= {"stream", "mixed"}
    assert served["llama-3.1-8b", ""] == {"stream", "prefill", "saturated"}
    assert served["qwen3-0.6b", "fp8 KV"] == {"mixed"}
    assert served["llama-3.1-8b", "fp8 weights and KV"] == {"saturated"}
    assert "qwen3-0.6b, ratio" in names
    assert {part.variant.name for part in parts if part.kind == "alone"} >= {"", "batch-invariant"}
    assert sum(part.about_s for part in parts) < 2 * 560 + 320


def test_floors_of_whole_loads():
    """The issue's floors, made of the same shapes."""
    llama, fp8 = cost_of("llama-3.1-8b"), cost_of("llama-3.1-8b", is_fp8=True, has_fp8_kv=True)
    assert llama.prefill_floor(785e12, 2048) == pytest.approx(54_000, rel=0.02)
    assert llama.prefill_floor(785e12, 8192) == pytest.approx(49_000, rel=0.02)
    lengths = [(1000, 1000)] * 512
    assert 512e3 / llama.batch_floor_s(lengths, 256, 4.3e12, 785e12) == pytest.approx(12_100, rel=0.04)
    assert 512e3 / fp8.batch_floor_s(lengths, 256, 4.3e12, 785e12) == pytest.approx(17_744 / 0.79, rel=0.1)
    one = llama.batch_floor_s([(0, 3)], 8, 4.3e12, 785e12)
    steps = [llama.decode_floor_s(1, context, 4.3e12, 785e12) for context in (1, 2, 3)]
    assert one == pytest.approx(sum(steps))


def test_bad_flags():
    with pytest.raises(CommandError, match="no folder"):
        bench(["gpu", "--out", "/nowhere"])
    assert bench(["gpu", "--shapes", "gpt-9"]) == 2
