"""Compiles the C++ kernels of a CPU once, and keeps them in the user's cache. Knows no tensors and no torch.

A library's file is named after everything that it depends on: the sources, the compiler, its flags and the
processor (torch is none of it: the kernels see plain pointers). Its last 32 bytes are the sha256 of the rest,
so that a file that was cut off or changed is compiled again.
"""

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Literal

_log = logging.getLogger(__name__)

Kind = Literal["bf16", "float"]

_SOURCES = Path(__file__).parent / "cpu"
_FLAGS = ("-std=c++17", "-O2", "-march=native", "-fPIC", "-shared", "-pthread", "-fno-math-errno", "-w")
_COMPILERS = ("g++", "c++", "clang++")
_TIMEOUT_S = 300.0
_DIGEST_BYTES = 32
_NOWHERE = (OSError, subprocess.SubprocessError, RuntimeError)
"""What a place for libraries may raise; RuntimeError: there is no home directory."""

_lock = threading.Lock()
_running: dict[Kind, "Compilation"] = {}
_loaded: dict[Kind, ctypes.CDLL | None] = {}
_late: set[Kind] = set()  # what was wanted before it was there


class Compilation(threading.Thread):
    """A compiler at work in a niced process of its own. `path` is None until it has made the library."""

    def __init__(self, kind: Kind, compiler: str, target: Path) -> None:
        super().__init__(name=f"compile-{kind}", daemon=True)
        self.kind = kind
        self.path: Path | None = None
        self._compiler = compiler
        self._target = target

    def run(self) -> None:
        try:
            self.path = _compile(self.kind, self._compiler, self._target)
        except subprocess.CalledProcessError as error:
            text = error.stderr.strip()[:300] or f"{self._compiler} ended with {error.returncode}"
            _log.warning("the CPU's kernels were not compiled: %s", text)
        except (OSError, subprocess.SubprocessError) as error:
            _log.warning("the CPU's kernels were not compiled: %s", str(error)[:300])


def start(kind: Kind) -> Compilation | None:
    """Begin to compile what the cache does not hold; None where it does, or where nothing can compile."""
    with _lock:
        if kind in _running or kind in _loaded:
            return _running.get(kind)
        compiler = find_compiler()
        if compiler is None:
            return None
        try:
            target = library_path(kind, compiler)
        except _NOWHERE as error:
            _log.warning("no place to keep compiled kernels, torch's slower operators serve: %s", error)
            _loaded[kind] = None  # said once
            return None
        if _is_whole(target):
            return None
        _log.info("compiling the CPU's kernels for %s once, about 5 s", kind)
        _running[kind] = Compilation(kind, compiler, target)
        _running[kind].start()
        return _running[kind]


def load(kind: Kind, timeout_s: float) -> ctypes.CDLL | None:
    """The kernels for weights of this kind, compiled now if need be; None where there are none in time.

    What was answered once stays the answer, until `take_late`: a model never changes its kernels half-way. A
    compiler that takes longer than `timeout_s` goes on.
    """
    if kind in _loaded:
        return _loaded[kind]
    compilation = start(kind)
    if compilation is not None:
        compilation.join(timeout_s)
    with _lock:
        if kind not in _loaded:
            _loaded[kind] = _load(kind, compilation)
        return _loaded[kind]


def _load(kind: Kind, compilation: Compilation | None) -> ctypes.CDLL | None:
    compiler = find_compiler()
    if compiler is None:
        _log.warning("no C++ compiler (g++) here: the model runs on torch's own operators, which is slower")
        return None
    if compilation is not None and compilation.is_alive():
        _log.info("the CPU's kernels are still being compiled: until then torch's own operators answer")
        _late.add(compilation.kind)
        return None
    if compilation is not None and compilation.path is None:
        return None
    try:
        library = ctypes.CDLL(str(library_path(kind, compiler)))
        _log.info("compiled kernels for %s: %s", kind, library._name)
    except _NOWHERE as error:
        _log.warning("the CPU's compiled kernels cannot be loaded: %s", error)
        return None
    return library


def is_late() -> bool:
    """Whether a model does without kernels that were being compiled when it wanted them."""
    return bool(_late)


def has_come() -> bool:
    """Whether all that was late is compiled by now."""
    return bool(_late) and all(_running[kind].path is not None for kind in _late)


def take_late() -> None:
    """From now on `load` finds what was late: to be called where a model is loaded anew."""
    with _lock:
        for kind in _late:
            del _loaded[kind], _running[kind]
        _late.clear()


def find_compiler() -> str | None:
    """The C++ compiler as a shell would be told: CXX where it is set (empty: none), which may be a program
    and its arguments ("ccache g++"), else the first on PATH."""
    if (chosen := os.environ.get("CXX")) is not None:
        program, *arguments = _words(chosen) or [""]
        found = shutil.which(program) if program else None
        return None if found is None else shlex.join((found, *arguments))
    return next((found for name in _COMPILERS if (found := shutil.which(name))), None)


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError:  # a quote that is not closed
        return []


def library_path(kind: Kind, compiler: str) -> Path:
    """Where the library lies, or will lie. Raises `OSError` where there is no directory of our own for it."""
    digest = hashlib.sha256()
    for source in sorted(_SOURCES.iterdir()):
        if source.suffix in (".h", ".cpp"):
            digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    asked = [*_words(compiler), "--version"]
    version = subprocess.run(asked, capture_output=True, text=True, errors="replace", timeout=30, check=False)
    digest.update("\0".join((*_flags(kind), compiler, version.stdout, _processor())).encode())
    return _cache_directory() / f"step-{kind}-{digest.hexdigest()[:24]}.so"


def _flags(kind: Kind) -> tuple[str, ...]:
    return (*_FLAGS, f"-DPB_TYPE={kind}")


def _processor() -> str:
    """What -march=native looks at: a home directory may be shared by different machines."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        wanted = ("model name", "flags", "Features", "CPU part", "CPU implementer")
        return platform.machine() + "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
    return platform.machine() + platform.processor()


def _cache_directory() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    directory = (Path(root) if root else Path.home() / ".cache") / "pagebus" / "kernels"
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = directory.stat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise PermissionError(f"{directory} is not this user's alone")  # its files run as code
    return directory


def _is_whole(path: Path) -> bool:
    try:
        if path.stat().st_uid != os.geteuid():
            return False
        content = path.read_bytes()
    except OSError:
        return False
    body, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    return len(body) > 0 and hashlib.sha256(body).digest() == digest


def _compile(kind: Kind, compiler: str, target: Path) -> Path:
    """Compile into a file beside `target` and rename it: nobody ever sees a part of one."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="compiling-") as scratch:
        made = Path(scratch) / "library.so"
        command = [*_words(compiler), *_flags(kind), "-o", str(made), str(_SOURCES / "step.cpp")]
        nice = shutil.which("nice")
        if nice is not None:
            command = [nice, "-n", "5", *command]
        subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S, check=True
        )
        body = made.read_bytes()
        with made.open("ab") as file:  # a loader does not look behind the last section
            file.write(hashlib.sha256(body).digest())
        made.replace(target)
    return target


def is_supported() -> bool:
    """Whether the kernels' threads exist here (they sleep on Linux's futex)."""
    return sys.platform == "linux"
