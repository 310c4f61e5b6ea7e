"""Compiled once, found again, and never half: the cache of the CPU's kernels."""

import ctypes
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pagebus.kernels import cpu_compile

needs_compiler = pytest.mark.skipif(
    cpu_compile.find_compiler() is None or not cpu_compile.is_supported(), reason="needs a C++ compiler"
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu_compile, "_running", {})
    monkeypatch.setattr(cpu_compile, "_loaded", {})
    monkeypatch.setattr(cpu_compile, "_late", set())
    return tmp_path / "pagebus" / "kernels"


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a new process begins."""
    monkeypatch.setattr(cpu_compile, "_running", {})
    monkeypatch.setattr(cpu_compile, "_loaded", {})
    monkeypatch.setattr(cpu_compile, "_late", set())


@needs_compiler
def test_compiled_once_and_mended(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu_compile.start("float") is not None
    assert isinstance(cpu_compile.load("float", 300), ctypes.CDLL)
    (made,) = cache.iterdir()
    forget(monkeypatch)
    assert cpu_compile.start("float") is None, "it is compiled again"
    assert isinstance(cpu_compile.load("float", 0), ctypes.CDLL)

    content = made.read_bytes()
    for broken in (content[:-5000], b"", b"nonsense" * 9, content[:700] + b"x" + content[701:]):
        forget(monkeypatch)
        made.unlink()  # a new file: the old one is mapped into this process
        made.write_bytes(broken)
        assert not cpu_compile._is_whole(made)
        assert cpu_compile.start("float") is not None
        monkeypatch.setattr(
            cpu_compile, "_compile", lambda kind, compiler, target: target.write_bytes(content) and target
        )
        assert isinstance(cpu_compile.load("float", 300), ctypes.CDLL)


@needs_compiler
def test_two_processes_at_once(cache: Path) -> None:
    code = (
        "from pagebus.kernels import cpu_compile as c; assert c.load('float', 300) is not None; "
        "print(c.load('float', 0).pb_version())"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    assert [process.communicate(timeout=300)[0].strip() for process in both] == ["1", "1"]
    assert len(list(cache.iterdir())) == 1, "something was left behind"


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert cpu_compile.start("float") is None
    assert cpu_compile.load("float", 1) is None
    assert cpu_compile.load("float", 1) is None
    assert [record.message for record in caplog.records if "no C++ compiler" in record.message].__len__() == 1


def test_a_compiler_and_its_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper = tmp_path / "a cache"
    wrapper.write_text('#!/bin/sh\nexec "$@"\n')
    wrapper.chmod(0o700)
    monkeypatch.setenv("CXX", f"'{wrapper}' sh -c 'exit 0'")
    found = cpu_compile.find_compiler()
    assert found is not None
    assert shlex.split(found) == [str(wrapper), "sh", "-c", "exit 0"]
    monkeypatch.setenv("CXX", "no-such-cache g++")
    assert cpu_compile.find_compiler() is None
    monkeypatch.setenv("CXX", "'g++")
    assert cpu_compile.find_compiler() is None


@needs_compiler
def test_a_wrapped_compiler_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("CXX", f"env {cpu_compile.find_compiler()} -DUNUSED")
    assert isinstance(cpu_compile.load("float", 300.0), ctypes.CDLL)


def test_a_compiler_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no headers here >&2\nexit 1\n")
    broken.chmod(0o700)
    monkeypatch.setenv("CXX", str(broken))
    assert cpu_compile.load("float", 60) is None
    assert "no headers here" in caplog.text


def test_a_slow_compiler_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slow = tmp_path / "slow"
    slow.write_text('#!/bin/sh\n[ "$1" = --version ] || sleep 3\nexit 1\n')
    slow.chmod(0o700)
    monkeypatch.setenv("CXX", str(slow))
    assert cpu_compile.load("float", 0.1) is None
    began_s = time.monotonic()
    assert cpu_compile.load("float", 60.0) is None, "what was answered stays"
    assert time.monotonic() - began_s < 1.0, "each weight waits again"
    assert cpu_compile.is_late()
    cpu_compile._running["float"].join(60)
    assert not cpu_compile.has_come(), "a compiler that failed made something"


@needs_compiler
def test_what_came_late_is_taken_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tmp_path / "slow"
    slow.write_text(f'#!/bin/sh\n[ "$1" = --version ] || sleep 1\nexec {cpu_compile.find_compiler()} "$@"\n')
    slow.chmod(0o700)
    monkeypatch.setenv("CXX", str(slow))
    assert cpu_compile.load("float", 0.0) is None
    assert not cpu_compile.has_come()
    cpu_compile._running["float"].join(300)
    assert cpu_compile.has_come()
    assert cpu_compile.load("float", 0.0) is None, "kernels changed half-way"
    cpu_compile.take_late()
    assert not cpu_compile.is_late()
    assert isinstance(cpu_compile.load("float", 0.0), ctypes.CDLL)


@pytest.mark.skipif(os.name != "posix", reason="modes")
def test_others_may_not_write_where_code_is_loaded_from(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    assert cpu_compile.start("float") is None
    assert cpu_compile.load("float", 1) is None
    assert "not this user's alone" in caplog.text
