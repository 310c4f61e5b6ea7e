"""Begins to compile the CPU's kernels before torch is imported: both take about as long. Knows no tensors."""

import json
import logging
from pathlib import Path

from pagebus.kernels import cpu_compile
from pagebus.settings.structs import ExecutorSettings

_log = logging.getLogger(__name__)


def begin_compiling(settings: ExecutorSettings, path: Path) -> None:
    """Compile, beside what follows, the kernels that the model in `path` will ask for; never an error.

    A wrong guess costs a few seconds of a niced process: the loader asks for what it needs.
    """
    if settings.device == "cuda" or (settings.device == "auto" and Path("/dev/nvidia0").exists()):
        return
    if not cpu_compile.is_supported():
        return
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        cpu_compile.start(_kind(settings.dtype, config if isinstance(config, dict) else {}))
    except (OSError, ValueError, RecursionError) as error:
        _log.debug("no kernels are compiled ahead: %s", error)


def _kind(dtype: str, config: dict[str, object]) -> cpu_compile.Kind:
    """As `loader.choose_dtype` decides, as far as it can be told without torch."""
    own = config.get("dtype", config.get("torch_dtype"))
    if dtype == "bfloat16" or (dtype == "auto" and own == "bfloat16" and _multiplies_bfloat16()):
        return "bf16"
    return "float"


def _multiplies_bfloat16() -> bool:
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    return any(flag in flags for flag in ("avx512_bf16", "amx_tile", " bf16"))
