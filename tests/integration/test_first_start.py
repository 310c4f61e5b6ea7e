"""The first start on a machine: answers before the CPU's kernels are compiled, gets them, and keeps them."""

import concurrent.futures
import shutil
import time
from pathlib import Path

import pytest

from pagebus.kernels import cpu_compile
from tests.support.serve import Serve, serving

pytestmark = pytest.mark.skipif(
    cpu_compile.find_compiler() is None or not cpu_compile.is_supported(), reason="needs a C++ compiler"
)

_ANEW = "the model is loaded anew"
_TAKEN = "compiled kernels for"
_USAGE = "vllm:kv_cache_usage_perc"


def slow_compiler(tmp_path: Path, until: Path) -> str:
    """The machine's compiler, which begins only when the file `until` is there."""
    real = cpu_compile.find_compiler()
    script = tmp_path / "compiler"
    script.write_text(
        f'#!/bin/sh\nif [ "$1" != --version ]; then while [ ! -e {until} ]; do sleep 0.1; done; fi\n'
        f'exec {real} "$@"\n'
    )
    script.chmod(0o700)
    return str(script)


def answer(serve: Serve, prompt: str, num_tokens: int = 12) -> tuple[str, str]:
    """Text and why it ended."""
    body = {"prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    status, found = serve.post("/v1/completions", body, timeout_s=120)
    assert status == 200, found
    (choice,) = found["choices"]  # type: ignore[misc]
    return choice["text"], choice["finish_reason"]


def used(serve: Serve) -> float:
    """The share of blocks in use."""
    lines = serve.get("/metrics")[1].decode().splitlines()
    (value,) = [float(line.split()[-1]) for line in lines if line.startswith(_USAGE)]
    return value


def test_it_answers_first_and_compiles_meanwhile(tmp_path: Path) -> None:
    may_compile = tmp_path / "may-compile"
    env = {
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "CXX": slow_compiler(tmp_path, may_compile),
        "PAGEBUS_COMPILE_WAIT_S": "0",
    }
    with serving(tmp_path / "first", env=env) as serve, concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert answer(serve, "What is 127 + 245?")[1] == "length"
        before = answer(serve, "Once upon a time", 300)
        assert _TAKEN not in serve.output()
        # A row that runs while the kernels come goes on as it began; others are served too.
        running = pool.submit(answer, serve, "Once upon a time", 300)
        time.sleep(0.3)
        may_compile.touch()
        assert running.result(120) == before
        end_s = time.monotonic() + 120
        num_answers = 0
        while _TAKEN not in serve.output():
            assert time.monotonic() < end_s, serve.output()
            found = list(pool.map(lambda _: answer(serve, "The fox", 8), range(2)))
            assert all(reason == "length" for _, reason in found)
            num_answers += len(found)
            time.sleep(0.8)  # longer than the calm that is waited for
        assert num_answers > 0
        assert _ANEW in serve.output()
        after = answer(serve, "Once upon a time", 300)
        assert after[1] == "length"
        assert len(serve.children("executor")) == 1
        end_s = time.monotonic() + 10
        while used(serve) > 0:
            assert time.monotonic() < end_s, "blocks are still in use"
            time.sleep(0.1)

    shutil.rmtree(tmp_path / "runtime", ignore_errors=True)
    with serving(tmp_path / "second", env=env) as serve:
        assert answer(serve, "Once upon a time", 300) == after
        assert _TAKEN in serve.output()
        assert _ANEW not in serve.output()


def test_without_a_compiler_it_says_so_once(tmp_path: Path) -> None:
    with serving(tmp_path, env={"XDG_CACHE_HOME": str(tmp_path / "cache"), "CXX": ""}) as serve:
        assert answer(serve, "The fox", 8)[1] == "length"
        assert serve.output().count("no C++ compiler") == 1
