"""Reads what a Hugging Face directory says about text: its JSON files and its chat templates.

Knows names and precedence of the files, not what the tokenizer does with them.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from pagebus.gateway.text_errors import TokenizerLoadError

JsonObject = dict[str, object]

TOKENIZER_FILE = "tokenizer.json"
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"


@dataclass(frozen=True)
class ModelText:
    """The files of one model directory; an absent file is an empty dictionary."""

    path: Path
    config: JsonObject
    generation_config: JsonObject
    tokenizer_config: JsonObject
    special_tokens_map: JsonObject
    added_tokens: JsonObject
    chat_templates: dict[str, str]  # by name; "default" is the one for chats without tools

    @property
    def tokenizer_file(self) -> Path:
        """Where `tokenizer.json` is, or would be."""
        return self.path / TOKENIZER_FILE


def read_model_text(path: Path, chat_template_file: Path | None = None) -> ModelText:
    """Reads the directory; a given template file replaces all templates of the model.

    Raises TokenizerLoadError, which names the file, where one is unreadable or is not what it should be."""
    if not path.is_dir():
        raise TokenizerLoadError(f"{path}: no such model directory")
    tokenizer_config = read_json_object(path / "tokenizer_config.json")
    return ModelText(
        path=path,
        config=read_json_object(path / "config.json"),
        generation_config=read_json_object(path / "generation_config.json"),
        tokenizer_config=tokenizer_config,
        special_tokens_map=read_json_object(path / "special_tokens_map.json"),
        added_tokens=read_json_object(path / "added_tokens.json"),
        chat_templates=_chat_templates(path, tokenizer_config, chat_template_file),
    )


def read_json_object(path: Path) -> JsonObject:
    """One JSON file that holds an object; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerLoadError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise TokenizerLoadError(f"{path}: an object is expected, not {type(value).__name__}")
    return value


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerLoadError(f"{path}: chat template not readable ({error})") from error


def _chat_templates(path: Path, tokenizer_config: JsonObject, given: Path | None) -> dict[str, str]:
    """The given file; else the `.jinja` files; else tokenizer_config.json; else a processor's
    chat_template.json."""
    if given is not None:
        return {"default": _read_template(given)}
    found: dict[str, str] = {}
    if (path / TEMPLATE_FILE).is_file():
        found["default"] = _read_template(path / TEMPLATE_FILE)
    for file in sorted((path / TEMPLATE_FOLDER).glob("*.jinja")):
        found[file.name.removesuffix(".jinja")] = _read_template(file)
    return (
        found
        or _named_templates(tokenizer_config.get("chat_template"), path / "tokenizer_config.json")
        or _named_templates(
            read_json_object(path / "chat_template.json").get("chat_template"), path / "chat_template.json"
        )
    )


def _named_templates(value: object, source: Path) -> dict[str, str]:
    """A template as JSON files hold it: a string, a list of {"name", "template"}, or an object by name."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    named: dict[str, str] = {}
    items: list[tuple[object, object]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list) and all(isinstance(item, dict) for item in value):
        items = [(item.get("name"), item.get("template")) for item in value]
    for name, template in items:
        if isinstance(name, str) and isinstance(template, str):
            named[name] = template
    if len(named) != len(items) or not items:
        raise TokenizerLoadError(f"{source}: chat_template is neither a string nor a list of named templates")
    return named


def eos_token_ids(files: ModelText, tokenizer_eos: int | None) -> frozenset[int]:
    """Every id that ends a turn: generation_config.json's, config.json's (the text part's too) and the
    tokenizer's."""
    text_config = files.config.get("text_config")
    found = {tokenizer_eos} if tokenizer_eos is not None else set()
    for source in (files.generation_config, files.config, text_config):
        value = source.get("eos_token_id") if isinstance(source, dict) else None
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, int) and not isinstance(item, bool) and item >= 0:
                found.add(item)
    return frozenset(found)


def logits_width(files: ModelText, tokenizer_size: int) -> int:
    """Ids that the model has logits for: config.json's vocab_size (the text part's too), else the tokenizer's
    size."""
    text_config = files.config.get("text_config")
    for source in (files.config, text_config):
        value = source.get("vocab_size") if isinstance(source, dict) else None
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return tokenizer_size
