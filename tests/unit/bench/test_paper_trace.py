"""Azure's trace format is read; what is no trace is named with its file and line."""

from pathlib import Path

import pytest

from pagebus.bench.paper_trace import TraceError, read_trace

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "trace.csv"
    path.write_bytes(text.encode("utf-8"))
    return path


def test_lengths_and_times_are_read(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        HEADER
        + "2023-11-16 18:15:46.6805900,374,44\n"
        + "2023-11-16 18:15:50.9951690,396,109\n"
        + "2023-11-16 18:16:46.6805900,879,55\n\n",
    )
    trace = read_trace(path, 100, 2048)
    assert trace.lengths.prompts.tolist() == [374, 396, 879]
    assert trace.lengths.outputs.tolist() == [44, 109, 55]
    assert trace.arrivals_s.tolist() == pytest.approx([0.0, 4.314579, 60.0], abs=1e-5)
    assert trace.rate == pytest.approx(2 / 60)
    assert trace.num_cut == 0


def test_windows_line_ends_and_a_byte_order_mark_are_fine(tmp_path: Path) -> None:
    rows = "2023-11-16 18:15:46,374,44\n2023-11-16 18:15:47,374,44\n"
    path = write(tmp_path, "\ufeff" + (HEADER + rows).replace("\n", "\r\n"))
    assert len(read_trace(path, 100, 2048).arrivals_s) == 2


def test_long_requests_are_cut_and_counted(tmp_path: Path) -> None:
    rows = "2023-11-16 18:15:46,7000,10\n2023-11-16 18:15:47,10,1500\n2023-11-16 18:15:48,1024,1024\n"
    trace = read_trace(write(tmp_path, HEADER + rows), 100, 2048)
    assert trace.lengths.prompts.tolist() == [2038, 10, 1024]
    assert trace.lengths.outputs.tolist() == [10, 1024, 1024]
    assert trace.num_cut == 2


def test_no_more_is_read_than_asked_for(tmp_path: Path) -> None:
    rows = "2023-11-16 18:15:46,1,1\n2023-11-16 18:15:47,1,1\nrubbish\n"
    assert len(read_trace(write(tmp_path, HEADER + rows), 2, 2048).arrivals_s) == 2


GOOD = "2023-11-16 18:15:46,374,44\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the first line must be TIMESTAMP,ContextTokens,GeneratedTokens"),
        ("time,in,out\n" + GOOD, "it is 'time,in,out'"),
        (GOOD, "the first line must be"),
        (HEADER, "holds 0 requests; at least 2"),
        (HEADER + GOOD, "holds 1 requests; at least 2"),
        (HEADER + GOOD + "2023-11-16 18:15:47,374\n", r"trace\.csv:3: 2 fields; 3 are needed"),
        (HEADER + GOOD + "yesterday,374,44\n", r"trace\.csv:3: 'yesterday' is no time"),
        (HEADER + "2023-11-16 18:15:46,many,44\n", r"trace\.csv:2: ContextTokens is 'many'"),
        (HEADER + "2023-11-16 18:15:46,12,0\n", r"trace\.csv:2: GeneratedTokens is '0'"),
        (HEADER + "2023-11-16 18:15:46,12,-4\n", "GeneratedTokens is '-4'"),
        (HEADER + "2023-11-16 18:15:46,12,4.5\n", r"GeneratedTokens is '4\.5'"),
        (HEADER + "2023-11-16 18:15:46,\u0661\u0662,4\n", "ContextTokens is"),
        (HEADER + "2023-11-16 18:15:46," + "9" * 5000 + ",4\n", "ContextTokens is"),
        (HEADER + GOOD + "2023-11-16 18:15:45,374,44\n", "earlier than the line before"),
    ],
)
def test_what_is_no_trace_is_refused_with_the_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        read_trace(write(tmp_path, text), 100, 2048)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot be read"):
        read_trace(tmp_path / "missing.csv", 100, 2048)
    with pytest.raises(TraceError, match="cannot be read"):
        read_trace(tmp_path, 100, 2048)
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x01" * 20)
    with pytest.raises(TraceError, match="cannot be read"):
        read_trace(tmp_path / "binary.csv", 100, 2048)
