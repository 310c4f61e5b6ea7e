"""Builds the `tokenizers.Tokenizer` of a model directory, with every special and added token in its place.

The rules are those of transformers 5 (AutoTokenizer): ids must be the same. Knows nothing of chats or
streams.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer

from pagebus.gateway.model_text import JsonObject, ModelText
from pagebus.gateway.rebuilt_tokenizer import SPECIAL_TOKEN_DEFAULTS, rebuild
from pagebus.gateway.text_errors import TokenizerLoadError
from pagebus.gateway.tokenizer_class import RebuiltClass, rebuilt_class

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

SpecialToken = str | AddedToken


@dataclass(frozen=True)
class Backend:
    """What was built: the tokenizer, its named special tokens, and whether decoding tidies spaces."""

    tokenizer: Tokenizer
    special_tokens: Mapping[str, str]  # "bos_token" -> "<s>"; chat templates see them under these names
    has_space_cleanup: bool


def load_backend(files: ModelText) -> Backend:
    """From tokenizer.json; where there is none, transformers converts what else is there (imported only
    then)."""
    if not files.tokenizer_file.is_file():
        from pagebus.gateway.converted_tokenizer import convert

        return convert(files.path)
    try:
        return _from_tokenizer_json(files)
    except TokenizerLoadError:
        raise
    except Exception as error:  # tokenizers raises plain Exception for whatever it cannot read
        raise TokenizerLoadError(f"{files.tokenizer_file}: {error}") from error


def _from_tokenizer_json(files: ModelText) -> Backend:
    text = files.tokenizer_file.read_text(encoding="utf-8")
    rebuilt = _rebuilt_class(files, is_byte_level='"ByteLevel"' in text)
    settings = _with_special_tokens_map(files)
    named = _named_special_tokens(settings, rebuilt)
    if rebuilt is None:
        tokenizer = Tokenizer.from_str(text)
        in_file = tokenizer.get_added_tokens_decoder()
    else:
        document = json.loads(text)
        in_file = _added_tokens_of(document)
        unk_token = named.get("unk_token")
        tokenizer = rebuild(
            rebuilt, document, files.tokenizer_config, None if unk_token is None else str(unk_token)
        )
    added = _added_tokens(files, settings, in_file)
    by_content = {token.content: token for token in added.values()}
    # A name written in the settings means the added token of that content, with its flags; a class's own
    # default does not.
    named = {
        key: by_content.get(str(value), value) if key in settings and key in _NAMED else value
        for key, value in named.items()
    }
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = settings.get("split_special_tokens") is True
    extra = _extra_special_tokens(settings)
    _add_tokens(tokenizer, added, named, extra)
    if rebuilt == "Qwen2Tokenizer":
        tokenizer.add_tokens([AddedToken(content, special=True) for content in _contents(named, extra)])
    elif rebuilt == "CohereTokenizer":
        tokenizer.add_special_tokens([_as_special(token) for token in (*named.values(), *extra)])
    return Backend(
        tokenizer=tokenizer,
        special_tokens={key: str(value) for key, value in named.items()},
        has_space_cleanup=has_space_cleanup(settings, tokenizer),
    )


def has_space_cleanup(settings: JsonObject, tokenizer: Tokenizer) -> bool:
    """Whether decoding tidies spaces before punctuation: never for BPE, which it would corrupt, unless
    forced."""
    if not settings.get("clean_up_tokenization_spaces"):
        return False
    is_forced = (
        settings.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output") is True
    )
    return is_forced or type(tokenizer.model).__name__ != "BPE"


def _rebuilt_class(files: ModelText, is_byte_level: bool) -> RebuiltClass | None:
    model_type = files.config.get("model_type")
    named = files.tokenizer_config.get("tokenizer_class") or files.config.get("tokenizer_class")
    remote = files.tokenizer_config.get("auto_map")
    return rebuilt_class(
        model_type if isinstance(model_type, str) else "",
        named if isinstance(named, str) else None,
        is_byte_level,
        has_remote_code=isinstance(remote, list) or (isinstance(remote, dict) and "AutoTokenizer" in remote),
    )


def _added_tokens_of(document: JsonObject) -> dict[int, AddedToken]:
    """`added_tokens` of a parsed tokenizer.json."""
    found: dict[int, AddedToken] = {}
    listed = document.get("added_tokens")
    for value in listed if isinstance(listed, list) else ():
        token = _parse_token(value, "added_tokens")
        if isinstance(token, AddedToken) and isinstance(value.get("id"), int):
            found[value["id"]] = token
    return found


def _with_special_tokens_map(files: ModelText) -> JsonObject:
    """tokenizer_config.json, and over it special_tokens_map.json where the older form of added tokens is in
    use."""
    settings = dict(files.tokenizer_config)
    if "additional_special_tokens" in settings and not settings.get("extra_special_tokens"):
        settings["extra_special_tokens"] = settings.pop("additional_special_tokens")
    if "added_tokens_decoder" not in settings:
        settings.update(files.special_tokens_map)
        if "additional_special_tokens" in files.special_tokens_map and "extra_special_tokens" not in settings:
            settings["extra_special_tokens"] = settings.pop("additional_special_tokens")
    return settings


def _parse_token(value: object, where: str) -> SpecialToken:
    """A token as JSON has it: its text, or an object with "content" and flags."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        flags = {flag: value[flag] for flag in _FLAGS if isinstance(value.get(flag), bool)}
        return AddedToken(value["content"], **flags)
    raise TokenizerLoadError(f"{where}: {value!r} is not a token")


def _added_tokens(
    files: ModelText, settings: JsonObject, in_file: Mapping[int, AddedToken]
) -> dict[int, AddedToken]:
    """Added tokens by id: tokenizer_config.json's list, or else added_tokens.json's and tokenizer.json's."""
    listed = settings.get("added_tokens_decoder")
    if isinstance(listed, dict):
        found: dict[int, AddedToken] = {}
        for key, value in listed.items():
            token = _parse_token(value, "tokenizer_config.json, added_tokens_decoder")
            found[int(key)] = AddedToken(token) if isinstance(token, str) else token
        return found
    found = {}
    specials = {str(_parse_token(settings[key], key)) for key in _NAMED if settings.get(key)}
    specials.update(str(token) for token in _extra_special_tokens(settings))
    for content, index in files.added_tokens.items():
        if isinstance(index, int):
            is_special = content in specials
            found[index] = AddedToken(content, normalized=not is_special, special=is_special)
    found.update(in_file)
    return found


def _named_special_tokens(settings: JsonObject, rebuilt: RebuiltClass | None) -> dict[str, SpecialToken]:
    """Tokens with a name, the class's defaults first; other `..._token` settings are the model's own
    names."""
    named: dict[str, SpecialToken] = {}
    defaults = SPECIAL_TOKEN_DEFAULTS[rebuilt] if rebuilt is not None else {}
    for key in _NAMED:
        if key in settings:
            if settings[key] is not None:
                named[key] = _parse_token(settings[key], f"tokenizer_config.json, {key}")
        elif key in defaults:
            named[key] = defaults[key]
    own_names: JsonObject = {
        key: value
        for key, value in settings.items()
        if key.endswith("_token") and key not in _NAMED and isinstance(value, (str, dict))
    }
    extra = settings.get("extra_special_tokens")
    if isinstance(extra, dict):
        own_names.update(extra)
    for key, value in own_names.items():
        named[key] = _parse_token(value, f"tokenizer_config.json, {key}")
    return named


def _extra_special_tokens(settings: JsonObject) -> list[SpecialToken]:
    extra = settings.get("extra_special_tokens")
    if not isinstance(extra, list):
        return []
    return [_parse_token(value, "tokenizer_config.json, extra_special_tokens") for value in extra]


def _add_tokens(
    tokenizer: Tokenizer,
    added: dict[int, AddedToken],
    named: Mapping[str, SpecialToken],
    extra: list[SpecialToken],
) -> None:
    """Adds what the tokenizer lacks: listed tokens in the order of their ids, then named, then extra ones."""
    present = tokenizer.get_added_tokens_decoder()
    present_forms = {repr(token) for token in present.values()}
    tokens: list[AddedToken] = [
        token for _, token in sorted(added.items()) if repr(token) not in present_forms
    ]
    contents = {token.content for token in (*present.values(), *tokens)}
    names = {str(token) for token in named.values()}
    for value in (*named.values(), *extra):
        if str(value) not in contents:
            tokens.append(AddedToken(value, special=True) if isinstance(value, str) else value)
            contents.add(str(value))
    for token in tokens:
        if token.content in names and not token.special:
            token.special = True
    if tokens:
        tokenizer.add_tokens(tokens)


def _contents(named: Mapping[str, SpecialToken], extra: list[SpecialToken]) -> list[str]:
    return list(dict.fromkeys(str(token) for token in (*named.values(), *extra)))


def _as_special(token: SpecialToken) -> AddedToken:
    return AddedToken(token, special=True, normalized=False) if isinstance(token, str) else token
