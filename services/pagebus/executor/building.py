"""Builds what runs a model's steps, and says when to build it anew: with kernels that were compiled late.

The CPU's kernels begin to be compiled before torch is imported: both take about as long. Knows no tensors.
"""

import asyncio
import json
import logging
from collections.abc import Callable
from pathlib import Path

from pagebus.executor.batch import Runner
from pagebus.executor.fake import build_fake_runner
from pagebus.kernels import cpu_compile
from pagebus.settings.structs import ExecutorSettings

_log = logging.getLogger(__name__)

Build = Callable[[ExecutorSettings, Path], Runner]

_POLL_S = 0.25
_CALM_S = 0.5  # so long no row is here: a client that sends one request after the other is served first
_TOLD_AFTER_S = 60.0


def build(settings: ExecutorSettings, path: Path) -> Runner:
    """The model of `settings`: the fake one, or the one in directory `path`."""
    if settings.fake:
        return build_fake_runner(settings)
    begin_compiling(settings, path)
    from pagebus.executor.model_runner import build_runner  # loads torch: not for the fake model

    return build_runner(settings, path)


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


async def until_outgrown(num_live: Callable[[], int]) -> None:
    """Return when kernels that came late are there, and no row has been here for a while; else never.

    Rows keep the kernels that they began with, so a busy executor waits; after a minute any moment will do.
    """
    loop = asyncio.get_running_loop()
    while cpu_compile.is_late() and not cpu_compile.has_come():  # noqa: ASYNC110 - a thread's state
        await asyncio.sleep(_POLL_S)
    if not cpu_compile.is_late():
        await loop.create_future()
    came_s = busy_s = loop.time()
    is_told = False
    while num_live() or not (is_told or loop.time() > busy_s + _CALM_S):
        if num_live():
            busy_s = loop.time()
        if not is_told and loop.time() > came_s + _TOLD_AFTER_S:
            is_told = True
            _log.info("compiled kernels are ready; they are taken as soon as no request is running")
        await asyncio.sleep(_POLL_S)
    _log.info("the model is loaded anew, for compiled kernels")
    cpu_compile.take_late()


def _kind(dtype: str, config: dict[str, object]) -> cpu_compile.Kind:
    """As `loader.choose_dtype` decides, as far as it can be told without torch."""
    own = config.get("dtype", config.get("torch_dtype"))
    if dtype == "bfloat16" or (dtype == "auto" and own == "bfloat16" and _multiplies_bfloat16()):
        return "bf16"
    return "float"


def _multiplies_bfloat16() -> bool:
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    return any(flag in flags for flag in ("avx512_bf16", "amx_tile", " bf16"))
