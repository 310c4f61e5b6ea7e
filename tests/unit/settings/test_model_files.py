"""A model is found, or one sentence says why not; the hub is a small server on loopback."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from pagebus.settings.model_files import ModelFilesError, bundled_model, resolve_model
from pagebus.settings.structs import ExecutorSettings, GatewaySettings, SchedulerSettings

CONFIG = json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}).encode()


def safetensors(num_bytes: int = 8) -> bytes:
    header = json.dumps({"w": {"dtype": "U8", "shape": [num_bytes], "data_offsets": [0, num_bytes]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(num_bytes)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_bytes(CONFIG)
    (path / "model.safetensors").write_bytes(safetensors())
    return path


def resolve(path: Path | str) -> Path:
    return resolve_model(ExecutorSettings(model=str(path)))


def refusal(path: Path | str) -> str:
    with pytest.raises(ModelFilesError) as raised:
        resolve(path)
    sentence = str(raised.value)
    assert "\n" not in sentence
    return sentence


def test_the_bundled_model_is_served_where_none_is_named() -> None:
    assert resolve("") == bundled_model()
    assert (bundled_model() / "tokenizer.json").is_file()


def test_a_directory(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(model) == model
    monkeypatch.chdir(model.parent)
    assert resolve("model") == model
    assert resolve("./model") == model
    monkeypatch.setenv("HOME", str(model.parent))
    assert resolve("~/model") == model


def test_only_executors_with_weights_need_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()
    assert "no .safetensors" in refusal(model)
    assert resolve_model(GatewaySettings(model=str(model))) == model
    assert resolve_model(SchedulerSettings(model=str(model))) == model
    assert resolve_model(ExecutorSettings(model=str(model), load_format="dummy")) == model
    assert resolve_model(ExecutorSettings(model=str(model), fake=True)) == model


def test_pickles_are_refused_by_name(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert ".bin" in refusal(model)


@pytest.mark.parametrize("cut", [0, 4, 30, len(safetensors()) - 1])
def test_cut_weights_are_refused(model: Path, cut: int) -> None:
    (model / "model.safetensors").write_bytes(safetensors()[:cut])
    assert "model.safetensors is broken" in refusal(model)


@pytest.mark.parametrize("config", [b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_broken_config_is_refused(model: Path, config: bytes) -> None:
    (model / "config.json").write_bytes(config)
    assert "config.json" in refusal(model)


def test_missing_parts_are_named(model: Path) -> None:
    index = {"weight_map": {"w": "model.safetensors", "v": "model-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002.safetensors" in refusal(model)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    assert "no config.json" in refusal(tmp_path)
    assert "no such model directory" in refusal(tmp_path / "missing")
    assert "no such model directory" in refusal("./missing")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "this is a file" in refusal(tmp_path / "model.gguf")


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a snapshot needs; one model, `org/tiny`, with a pickle and code beside it."""

    files: ClassVar = {
        "config.json": CONFIG,
        "model.safetensors": safetensors(),
        "tokenizer.json": b"{}",
        "chat_template.jinja": b"hi",
        "pytorch_model.bin": b"pickle",
        "modeling.py": b"raise SystemExit",
    }

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def answer(self) -> None:
        commit = "a" * 40
        path = self.path.split("?")[0]
        if path.startswith("/api/models/org/tiny/revision/main") or path == "/api/models/org/tiny":
            siblings = [{"rfilename": name} for name in self.files]
            self.reply(200, json.dumps({"id": "org/tiny", "sha": commit, "siblings": siblings}).encode())
        elif path.startswith("/api/models/org/tiny/tree/" + commit):
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": name}
                for name, content in self.files.items()
            ]
            self.reply(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
        elif path.startswith("/org/tiny/resolve/"):
            content = self.files[path.rsplit("/", 1)[1]]
            self.reply(200, content, {"ETag": '"' + str(hash(content)) + '"', "X-Repo-Commit": commit})
        elif path.startswith("/api/models/org/tiny"):
            self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith("/api/models/org/gated"):
            self.reply(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif path.startswith("/api/models/org/broken"):
            self.reply(418, b"{}")
        else:
            self.reply(401, b"{}", {"X-Error-Code": "RepoNotFound"})

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


FETCH = """
import sys
from pagebus.settings.model_files import ModelFilesError, resolve_model
from pagebus.settings.structs import ExecutorSettings
try:
    print(resolve_model(ExecutorSettings(model=sys.argv[1], revision=sys.argv[2])))
except ModelFilesError as error:
    sys.exit(str(error))
"""


def fetch(
    home: Path, model: str, hub: str, revision: str = "", env: dict[str, str] | None = None
) -> tuple[int, str]:
    """Exit code and what was said by a process of its own: the hub's client reads its variables once."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        **(env or {}),
    }
    environment.pop("HF_TOKEN", None)
    if not env:
        environment.pop("HF_HUB_OFFLINE", None)
    ended = subprocess.run(
        [sys.executable, "-c", FETCH, model, revision],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=False,
        cwd=home,
    )
    assert "Traceback" not in ended.stderr
    return ended.returncode, (
        ended.stdout.strip() if ended.returncode == 0 else ended.stderr.strip().splitlines()[-1]
    )


def test_a_hub_id_is_fetched_then_found_offline(tmp_path: Path, hub: str) -> None:
    code, path = fetch(tmp_path, "org/tiny", hub)
    assert code == 0, path
    assert {file.name for file in Path(path).iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
    }
    assert str(tmp_path) in path, "HF_HOME counts"
    assert fetch(tmp_path, "org/tiny", hub, env={"HF_HUB_OFFLINE": "1"}) == (0, path)


@pytest.mark.parametrize(
    ("model", "revision", "words"),
    [
        ("org/unknown", "", "neither a directory here nor a model"),
        ("org/tiny", "no-such", "no-such"),
        ("org/gated", "", "HF_TOKEN"),
        ("org/broken", "", "418"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(
    tmp_path: Path, hub: str, model: str, revision: str, words: str
) -> None:
    code, said = fetch(tmp_path, model, hub, revision)
    assert code == 1
    assert model in said
    assert words in said, said


def test_offline_and_not_cached(tmp_path: Path, hub: str) -> None:
    code, said = fetch(tmp_path, "org/tiny", hub, env={"HF_HUB_OFFLINE": "1"})
    assert code == 1
    assert "HF_HUB_OFFLINE" in said


def test_no_hub_to_be_reached(tmp_path: Path) -> None:
    code, said = fetch(tmp_path, "org/tiny", "http://127.0.0.1:9")
    assert code == 1
    assert "cannot be reached" in said or "download failed" in said, said
