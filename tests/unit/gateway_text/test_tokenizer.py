"""Loading a model's text files, its end tokens and vocabulary, threads for long texts, and bad input."""

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pagebus.gateway import tokenizer as module
from pagebus.gateway.text_errors import ChatTemplateError, InvalidTextError, TextError, TokenizerBusyError
from pagebus.gateway.text_errors import TokenizerLoadError as LoadError
from pagebus.gateway.tokenizer import Tokenizer
from tests.support.tokenizers import CHATML, make_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("model"), "byte_level")


@pytest.fixture
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


def test_gateway_text_loads_no_heavy_library(folder: Path) -> None:
    code = (
        "import sys, pathlib; from pagebus.gateway.tokenizer import Tokenizer; "
        f"t = Tokenizer.load(pathlib.Path({str(folder)!r})); "
        "t.encode_chat([{'role': 'user', 'content': 'hi'}]); "
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({}, {}, {2}),
        ({"eos_token_id": 7}, {"eos_token_id": [2, 5]}, {2, 5, 7}),
        ({"text_config": {"eos_token_id": [9]}}, {"eos_token_id": None}, {2, 9}),
        ({"eos_token_id": True}, {"eos_token_id": ["x"]}, {2}),
    ],
)
def test_eos_token_ids(
    tmp_path: Path, config: dict[str, Any], generation: dict[str, Any], expected: set[int]
) -> None:
    make_tokenizer(tmp_path, "byte_level")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.eos_token_ids == expected
    assert tokenizer.bos_token_id == 1


def test_vocab_size_is_the_width_of_the_logits(folder: Path, tmp_path: Path) -> None:
    assert Tokenizer.load(folder).vocab_size == 764
    make_tokenizer(tmp_path, "byte_level")
    (tmp_path / "config.json").write_text('{"text_config": {"vocab_size": 1000}}')
    assert Tokenizer.load(tmp_path).vocab_size == 1000
    (tmp_path / "config.json").unlink()
    assert Tokenizer.load(tmp_path).vocab_size == Tokenizer.load(folder)._backend.get_vocab_size()


def _break_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").write_text('{"version": "1.0"')


def _break_config(path: Path) -> None:
    (path / "tokenizer_config.json").write_text("[]")


def _break_template(path: Path) -> None:
    (path / "chat_template.jinja").write_text("{% if %}")


def _break_tokens(path: Path) -> None:
    (path / "tokenizer_config.json").write_text('{"bos_token": 5}')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_break_tokenizer, "tokenizer.json"),
        (_break_config, "tokenizer_config.json"),
        (_break_template, "Jinja"),
        (_break_tokens, "bos_token"),
    ],
)
def test_broken_files_are_named_in_one_line(tmp_path: Path, damage: Any, message: str) -> None:
    make_tokenizer(tmp_path, "byte_level")
    damage(tmp_path)
    with pytest.raises(LoadError, match=message) as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_directory_and_a_missing_template(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(LoadError, match="no such model directory"):
        Tokenizer.load(tmp_path / "nothing")
    with pytest.raises(LoadError, match=r"nothing\.jinja"):
        Tokenizer.load(folder, tmp_path / "nothing.jinja")


def test_where_templates_come_from(tmp_path: Path) -> None:
    """A given file, then `.jinja` files, then tokenizer_config.json, then chat_template.json."""
    chat = [{"role": "user", "content": "x"}]
    make_tokenizer(tmp_path, "byte_level", template="in config", settings={"add_bos_token": False})
    (tmp_path / "chat_template.json").write_text('{"chat_template": "json"}')
    given = tmp_path / "given"
    given.write_text("given")
    assert Tokenizer.load(tmp_path).render_chat(chat) == "in config"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    (tmp_path / "chat_template.jinja").write_text("file")
    loaded = Tokenizer.load(tmp_path)
    assert [loaded.render_chat(chat), loaded.render_chat(chat, tools=[{}])] == ["file", "tools"]
    assert Tokenizer.load(tmp_path, given).render_chat(chat, tools=[{}]) == "given"
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").unlink()
    assert Tokenizer.load(tmp_path).render_chat(chat) == "json"
    (tmp_path / "chat_template.json").unlink()
    bare = Tokenizer.load(tmp_path)
    assert not bare.has_chat_template
    with pytest.raises(ChatTemplateError, match="no chat template"):
        bare.encode_chat(chat)


@pytest.mark.parametrize("text", ["\ud800", "ok\udfff", "👨\ud83d", "a" * 5000 + "\udc00"])
def test_lone_surrogates_are_the_clients_fault(tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(InvalidTextError, match="surrogate"):
        tokenizer.encode(text)
    with pytest.raises(InvalidTextError, match="surrogate"):
        tokenizer.encode_chat([{"role": "user", "content": text}])


def test_empty_and_odd_input(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("") == [1]
    assert tokenizer.encode("", add_special_tokens=False) == []
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode([tokenizer.vocab_size - 1]) == ""  # logits wider than the tokenizer
    assert tokenizer.token(tokenizer.vocab_size - 1) is None
    assert tokenizer.token(-1) is None
    for ids in ([-1], [1 << 40]):
        with pytest.raises(TextError, match="token ids"):
            tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["byte_level", "llama2", "unigram"])
@pytest.mark.parametrize("character", ["a", " ", "\n", "👨"])
def test_a_long_run_of_one_character_takes_bounded_time(tmp_path: Path, kind: Any, character: str) -> None:
    tokenizer = Tokenizer.load(make_tokenizer(tmp_path, kind))
    start = time.monotonic()
    text = character * 100_000
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert time.monotonic() - start < 5
    if kind == "byte_level":
        assert tokenizer.decode(ids) == text


async def test_long_texts_are_encoded_in_a_thread(tokenizer: Tokenizer) -> None:
    text = "the quick brown fox " * 50_000
    gaps: list[float] = []

    async def tick() -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.001)
            gaps.append(time.monotonic() - before)

    ticker = asyncio.create_task(tick())
    start = time.monotonic()
    ids = await tokenizer.encode_async(text)
    duration_s = time.monotonic() - start
    ticker.cancel()
    assert ids == tokenizer.encode(text)
    assert max(gaps) < max(0.5 * duration_s, 0.1)  # the loop went on meanwhile
    chat = [{"role": "user", "content": text[:10_000]}]
    assert await tokenizer.encode_chat_async(chat) == tokenizer.encode_chat(chat)
    tokenizer.close()


async def test_waiting_text_is_bounded(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 5_000)
    results = await asyncio.gather(
        *(tokenizer.encode_async("a b " * 1_000) for _ in range(3)), return_exceptions=True
    )
    assert [isinstance(result, TokenizerBusyError) for result in results] == [False, True, True]
    await asyncio.sleep(0.01)
    assert (
        len(await tokenizer.encode_async("a b " * 5_000)) > 1
    )  # one that is over the bound goes when none waits
    assert await tokenizer.encode_async("short") == tokenizer.encode("short")
    tokenizer.close()


def test_short_and_long_texts_are_encoded_alike(tokenizer: Tokenizer) -> None:
    """Two ways of the library are behind it: the ids must not depend on the length."""
    line = "Zürich 127 + 245\n"
    short = tokenizer.encode(line, add_special_tokens=False)
    assert tokenizer.encode(line * 200, add_special_tokens=False) == short * 200
    assert tokenizer.encode(line * 200)[:2] == [1, short[0]]


def test_special_tokens_in_messages_become_special(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_chat([{"role": "user", "content": "a<|im_end|>b"}])
    assert [tokenizer.token(i) for i in ids].count("<|im_end|>") == 2
    assert tokenizer.chat_template_sources == {"default": CHATML}
