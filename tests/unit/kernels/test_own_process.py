"""The interpreter's tests run even where this process has Triton's compiler loaded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from pagebus.kernels.jit import IS_INTERPRETED

HERE = Path(__file__).parent


@pytest.mark.skipif(IS_INTERPRETED, reason="they run in this process")
def test_in_the_interpreter() -> None:
    files = sorted(str(path) for path in HERE.glob("test_triton_*.py"))
    assert len(files) >= 3
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", *files],
        cwd=HERE.parents[2], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
        check=False, timeout=600,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-1000:]
    assert " passed" in ended.stdout
    assert "skipped" not in ended.stdout
