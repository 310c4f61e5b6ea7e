"""The house stands: one namespace package from three roots, services apart, readable files, no pickles."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [ROOT / root / "pagebus" for root in ("services", "shared", "kernels")]
SERVICES = ("gateway", "scheduler", "executor")
MOST_LINES = 400
MOST_FUNCTION_LINES = 60

# What is longer, and why.
LONG_FILES: dict[str, str] = {
    "shared/pagebus/bus/messages.py": "all messages stand in one place",
}
LONG_FUNCTIONS: dict[str, str] = {}


def files() -> list[Path]:
    return sorted(path for source in SOURCES for path in source.rglob("*.py"))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}: relative imports hide which service is meant"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_there_is_something_to_check() -> None:
    assert len(files()) > 20
    assert all((ROOT / "services/pagebus" / service).is_dir() for service in SERVICES)


@pytest.mark.parametrize(
    "folder",
    [
        "services",
        "shared",
        "kernels",
        "services/pagebus",
        "shared/pagebus",
        "kernels/pagebus",
        "tests/kernels",
    ],
)
def test_no_package_file_hides_another_root(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


def test_every_root_is_found_as_one_package() -> None:
    import pagebus

    found = {Path(entry).resolve() for entry in pagebus.__path__}
    assert found, "pagebus is not importable"
    assert not hasattr(pagebus, "__file__") or pagebus.__file__ is None


@pytest.mark.parametrize("service", SERVICES)
def test_services_never_import_each_other(service: str) -> None:
    others = tuple(f"pagebus.{other}" for other in (*SERVICES, "cli", "bench", "sim") if other != service)
    for path in (ROOT / "services/pagebus" / service).rglob("*.py"):
        wrong = [
            module for module in imported(path) if (module + ".").startswith(tuple(o + "." for o in others))
        ]
        assert not wrong, f"{name(path)} imports {wrong}"


def test_what_is_shared_imports_no_service() -> None:
    services = tuple(f"pagebus.{service}." for service in (*SERVICES, "cli", "bench", "sim"))
    for source in SOURCES[1:]:
        for path in source.rglob("*.py"):
            wrong = [module for module in imported(path) if (module + ".").startswith(services)]
            assert not wrong, f"{name(path)} imports {wrong}"


@pytest.mark.parametrize("service", ["gateway", "scheduler"])
def test_importing_it_loads_no_tensors(service: str) -> None:
    code = (
        f"import sys, pagebus.{service}.service\n"
        "heavy = {m.split('.')[0] for m in sys.modules} & {'torch', 'transformers', 'triton'}\n"
        "sys.exit(f'loads {sorted(heavy)}' if heavy else 0)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert ended.returncode == 0, ended.stderr


def test_files_stay_readable() -> None:
    lengths = {name(path): len(path.read_text("utf-8").splitlines()) for path in files()}
    long = {file: length for file, length in lengths.items() if length > MOST_LINES}
    assert not {file: length for file, length in long.items() if file not in LONG_FILES}
    assert not set(LONG_FILES) - set(long), "no longer long: take it off the list"


def test_functions_stay_readable() -> None:
    long = {}
    for path in files():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
                length = node.end_lineno - node.lineno + 1
                if length > MOST_FUNCTION_LINES:
                    long[f"{name(path)}:{node.name}"] = length
    assert not {function: length for function, length in long.items() if function not in LONG_FUNCTIONS}
    assert not set(LONG_FUNCTIONS) - set(long), "no longer long: take it off the list"


def test_every_module_says_what_it_owns() -> None:
    assert not [name(path) for path in files() if not ast.get_docstring(tree(path))]


def test_nothing_unpickles_or_runs_foreign_code() -> None:
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal"}
    for path in files():
        assert not {module.split(".")[0] for module in imported(path)} & forbidden, name(path)
        for node in ast.walk(tree(path)):
            match node:
                case ast.Attribute(value=ast.Name(id="torch"), attr="load"):
                    pytest.fail(f"{name(path)}:{node.lineno}: torch.load unpickles")
                case ast.keyword(arg="trust_remote_code", value=ast.Constant(value=False)):
                    pass
                case ast.keyword(arg="trust_remote_code" | "ext_hook"):
                    pytest.fail(f"{name(path)}: {node.arg}")
                case ast.Call(func=ast.Name(id="eval" | "exec")):
                    pytest.fail(f"{name(path)}:{node.lineno}: runs text as code")


def test_only_one_file_spells_subjects() -> None:
    """A text such as `pagebus.x.generate` outside subjects.py is a subject that the table does not show."""
    subjects = ROOT / "shared/pagebus/bus/subjects.py"
    words = re.findall(r"pagebus\.[\w.<>{}()]*", subjects.read_text("utf-8"))
    heads = {word.split(".")[1] for word in words} - {""}
    tails = {"generate", "hello", "done", "heartbeat", "cancel"}
    packages = {path.name for source in SOURCES for path in source.iterdir()}
    for path in files():
        if path == subjects:
            continue
        docstrings = {id(node) for node in _docstrings(tree(path))}
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                parts = node.value.split(".")
                if parts[0] != "pagebus" or len(parts) < 2 or " " in node.value:
                    continue
                is_subject = parts[-1] in {*tails, ">", "*"} or (
                    parts[1] in heads and parts[1] not in packages
                )
                assert not is_subject, f"{name(path)}:{node.lineno} spells the subject {node.value!r}"


def _docstrings(module: ast.Module) -> Iterator[ast.Constant]:
    for node in ast.walk(module):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield node.value
