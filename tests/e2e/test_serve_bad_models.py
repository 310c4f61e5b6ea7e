"""A missing, broken or unsupported model directory ends `serve` with one clear line, no stack trace."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.models import make_model
from tests.support.serve import free_port


def missing(path: Path) -> None:
    path.rmdir()


def empty(path: Path) -> None:
    del path


def broken_json(path: Path) -> None:
    make_model("llama", path)
    (path / "config.json").write_text("{")


def no_weights(path: Path) -> None:
    make_model("llama", path)
    (path / "model.safetensors").unlink()


def truncated_weights(path: Path) -> None:
    make_model("llama", path)
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


def pickled_weights(path: Path) -> None:
    make_model("llama", path)
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def unsupported(path: Path) -> None:
    make_model("llama", path)
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "bert", "architectures": ["BertModel"]}
    (path / "config.json").write_text(json.dumps(config))


def unknown(path: Path) -> None:
    make_model("llama", path)
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "no-such-thing", "architectures": ["NoSuchModel"]}
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "spoil",
    [missing, empty, broken_json, no_weights, truncated_weights, pickled_weights, unsupported, unknown],
)
def test_one_clear_line(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    path = tmp_path / "model"
    path.mkdir()
    spoil(path)
    ended = subprocess.run(
        [sys.executable, "-m", "pagebus.cli", "serve", str(path), "--port", str(free_port())],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "XDG_RUNTIME_DIR": str(tmp_path)},
        check=False,
    )
    said = ended.stdout + ended.stderr
    assert ended.returncode != 0
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if line.strip()]
    assert 1 <= len(lines) <= 3, said
    assert any(str(path) in line or "model" in line for line in lines), said
