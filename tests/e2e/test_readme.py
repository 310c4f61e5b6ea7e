"""The README's programs, run as they stand there, against a real `pagebus serve`."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.serve import Serve, serving

README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    with serving(tmp_path_factory.mktemp("serve")) as running:
        deadline = time.monotonic() + 10
        while "curl " not in running.output():  # told a moment after /ready
            assert time.monotonic() < deadline, running.output()
            time.sleep(0.02)
        yield running


def run(serve: Serve, command: list[str]) -> str:
    """What a program says, started as a user would with this interpreter's scripts on PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(serve.runtime_dir), "PATH": path}
    ended = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=False,
        cwd=serve.runtime_dir,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)


@pytest.mark.needs("curl")
def test_curl(serve: Serve) -> None:
    (block,) = re.findall(r"```sh\n(curl .*?)```", README.read_text("utf-8"), re.DOTALL)
    assert "372" in run(serve, ["bash", "-c", block.replace("http://127.0.0.1:8000", serve.url)])


def sh_block(words: str) -> str:
    (block,) = [
        block
        for block in re.findall(r"```sh\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
        if words in block
    ]
    return str(block)


def text_of(events: str) -> str:
    """The content of a chat stream's events."""
    chunks = [json.loads(data) for data in re.findall(r"^data: (\{.*\})$", events, re.MULTILINE)]
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


@pytest.mark.needs("curl")
def test_a_stream_goes_on(serve: Serve) -> None:
    run(serve, ["bash", "-c", sh_block("Last-Event-ID").replace("http://127.0.0.1:8000", serve.url)])
    first, rest = ((serve.runtime_dir / name).read_text() for name in ("first.txt", "rest.txt"))
    assert first.count("data: ") == 14
    assert rest.endswith("data: [DONE]\n\n")
    ids = [int(number) for number in re.findall(r"^id: (\d+)$", first + rest, re.MULTILINE)]
    assert ids == sorted(set(ids))  # tokens that arrived together are one event, named by its last
    last = len(re.findall(r"^id: ", first, re.MULTILINE))
    assert ids[last] > ids[last - 1]
    (stream,) = set(re.findall(r"chatcmpl-[0-9a-f]+", first))
    with urllib.request.urlopen(f"{serve.url}/v1/streams/{stream}", timeout=30) as answer:
        whole = answer.read().decode()
    assert text_of(first) + text_of(rest) == text_of(whole) != ""


@pytest.mark.needs("curl")
def test_a_request_that_is_sent_twice(serve: Serve) -> None:
    run(serve, ["bash", "-c", sh_block("Idempotency-Key").replace("http://127.0.0.1:8000", serve.url)])
    first, second = ((serve.runtime_dir / f"{name}.json").read_text() for name in ("first", "second"))
    assert first == second
    assert '"text"' in first


@pytest.mark.needs("curl")
def test_the_command_that_serve_prints(serve: Serve) -> None:
    (command,) = [line for line in serve.output().splitlines() if line.startswith("curl ")]
    assert "372" in run(serve, ["bash", "-c", command])


def test_the_openai_sdk(serve: Serve) -> None:
    (block,) = [block for block in python_blocks() if "OpenAI(" in block]
    told = run(serve, [sys.executable, "-c", block.replace("http://127.0.0.1:8000", serve.url)])
    assert len(told.split()) > 10


@pytest.mark.needs("pagebus")
def test_the_nats_reader(serve: Serve) -> None:
    (block,) = [block for block in python_blocks() if "pagebus.client" in block]
    assert "372" in run(serve, [sys.executable, "-c", block])
