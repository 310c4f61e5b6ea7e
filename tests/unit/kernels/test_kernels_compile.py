"""Every kernel compiles to Hopper's machine code, without a GPU, and fits its shared memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler runs on Linux")
def test_all_kernels_compile(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "services", "shared", "kernels")),
    }
    ended = subprocess.run(
        [sys.executable, "-m", "tests.support.compile_kernels"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=400,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_references_work_without_triton() -> None:
    """A machine without Triton imports every file, and a launch says what is missing."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from pagebus.kernels import attention_reference, jit, triton_attention, triton_filters\n"
        "from pagebus.kernels import triton_experts, triton_fp8, triton_linear\n"
        "from pagebus.kernels import triton_gated, triton_norm, triton_penalties\n"
        "from pagebus.kernels import triton_rope_kv, triton_sampling\n"
        "assert not jit.HAS_TRITON\n"
        "x = torch.ones(2, 4)\n"
        "assert triton_gated.reference_gated(x, 'silu').shape == (2, 2)\n"
        "try:\n"
        "    triton_gated.triton_gated(x, 'silu')\n"
        "except RuntimeError as error:\n"
        "    assert 'Triton' in str(error)\n"
        "else:\n"
        "    sys.exit('launched')\n"
    )
    paths = os.pathsep.join(str(ROOT / part) for part in ("services", "shared", "kernels"))
    environment = {**os.environ, "PYTHONPATH": paths}
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert ended.returncode == 0, ended.stderr
