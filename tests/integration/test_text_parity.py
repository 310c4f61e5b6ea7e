"""Ids, prompts and decoded text equal those of transformers' AutoTokenizer, for each kind of tokenizer."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from pagebus.gateway import tokenizer_class
from pagebus.gateway.text_errors import ChatTemplateError, TokenizerLoadError
from pagebus.gateway.tokenizer import Tokenizer
from tests.support.tokenizers import (
    CHATML,
    CORPUS,
    INSTRUCT,
    KINDS,
    Kind,
    make_tokenizer,
    random_chat,
    random_text,
)

NUM_PROMPTS = 1_000


def _garbles_byte_level_llama() -> bool:
    """Older releases wrap byte-level vocabularies in Llama 2's pipeline where LlamaTokenizer is declared (as
    Llama 3 checkpoints do), which loses all spaces. Newer ones do not, and nor do we."""
    from transformers import PreTrainedTokenizerFast

    return not hasattr(PreTrainedTokenizerFast, "_tokenizer_json_has_byte_level")


def _auto(folder: Path) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def _compare_texts(ours: Tokenizer, theirs: Any, rng: random.Random, num_texts: int) -> None:
    for _ in range(num_texts):
        text = random_text(rng)
        for add_special_tokens in (True, False):
            ids = theirs.encode(text, add_special_tokens=add_special_tokens)
            assert ours.encode(text, add_special_tokens) == ids, (text, add_special_tokens)
        for skip in (True, False):
            whole = theirs.decode(ids, skip_special_tokens=skip)
            stream = ours.detokenizer(skip)
            assert "".join(stream.push([i]) for i in ids) + stream.finish() == whole, (ids, skip)
            assert ours.decode(ids, skip) == whole


def _compare_chats(ours: Tokenizer, theirs: Any, rng: random.Random, num_chats: int) -> None:
    for _ in range(num_chats):
        chat = random_chat(rng)
        has_prompt = rng.random() < 0.8
        ids = theirs.apply_chat_template(chat, add_generation_prompt=has_prompt, return_dict=False)
        assert ours.encode_chat(chat, add_generation_prompt=has_prompt) == ids, chat


@pytest.mark.parametrize("is_template_file", [False, True], ids=["in_config", "jinja"])
@pytest.mark.parametrize("adds_bos", [True, False], ids=["bos", "no_bos"])
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_and_chats(tmp_path: Path, kind: Kind, adds_bos: bool, is_template_file: bool) -> None:
    if kind == "llama3" and _garbles_byte_level_llama():
        pytest.skip("fixed in a later transformers")
    template = INSTRUCT if adds_bos else CHATML
    make_tokenizer(tmp_path, kind, adds_bos=adds_bos, template=template, is_template_file=is_template_file)
    ours, theirs = Tokenizer.load(tmp_path), _auto(tmp_path)
    rng = random.Random(f"{kind} {adds_bos} {is_template_file}")
    _compare_texts(ours, theirs, rng, NUM_PROMPTS // 2)
    _compare_chats(ours, theirs, rng, NUM_PROMPTS // 2)
    assert ours.bos_token_id == theirs.bos_token_id
    assert theirs.eos_token_id in ours.eos_token_ids
    assert ours.special_tokens == theirs.special_tokens_map


_ADDED = {
    "content": "<|x|>",
    "lstrip": False,
    "rstrip": True,
    "normalized": False,
    "single_word": False,
    "special": True,
}
_SETTINGS: dict[str, dict[str, Any]] = {
    "added_prefix_space": {"add_prefix_space": True},
    "no_prefix_space": {"add_prefix_space": False},
    "split_specials": {"split_special_tokens": True},
    "no_bos_token": {"bos_token": None},
    "unknown_names": {"bos_token": "<start>", "pad_token": "<pad>", "image_token": "<img>",
                      "eot_token": "<|im_end|>"},
    "extra_list": {"additional_special_tokens": ["<|im_end|>", "<extra>", "猫"]},
    "extra_map": {"extra_special_tokens": {"audio_token": "<audio>"}},
    "token_objects": {
        "eos_token": {"__type": "AddedToken", **_ADDED}, "pad_token": {"__type": "AddedToken", **_ADDED},
    },
    "cleanup": {"clean_up_tokenization_spaces": True},
    "forced_cleanup": {
        "clean_up_tokenization_spaces": True,
        "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True,
    },
    "plain_class": {"tokenizer_class": "PreTrainedTokenizerFast"},
    "other_class": {"tokenizer_class": "SomethingOfTheirOwn"},
    "no_class": {"tokenizer_class": None},
    "named_templates": {
        "chat_template": [{"name": "default", "template": CHATML}, {"name": "rag", "template": ""}],
    },
}  # fmt: skip


@pytest.mark.parametrize("settings", _SETTINGS.values(), ids=_SETTINGS.keys())
@pytest.mark.parametrize("lists_added_tokens", [True, False], ids=["listed", "unlisted"])
def test_odd_settings(tmp_path: Path, lists_added_tokens: bool, settings: dict[str, Any]) -> None:
    for kind in KINDS:
        if kind == "llama3" and _garbles_byte_level_llama():
            continue
        folder = make_tokenizer(
            tmp_path / kind, kind, lists_added_tokens=lists_added_tokens, settings=settings, vocab_size=650
        )
        if not lists_added_tokens:
            (folder / "special_tokens_map.json").write_text(
                json.dumps({"eos_token": {**_ADDED, "content": "<|im_end|>"}, "mask_token": "<mask>"})
            )
        ours, theirs = Tokenizer.load(folder), _auto(folder)
        rng = random.Random(kind)
        _compare_texts(ours, theirs, rng, 12)
        _compare_chats(ours, theirs, rng, 4)
        assert ours.special_tokens == theirs.special_tokens_map, kind
        assert ours.encode("<img> <start>猫<|x|> <audio> <pad>") == theirs.encode(
            "<img> <start>猫<|x|> <audio> <pad>"
        )


@pytest.mark.parametrize(
    "declared", ["LlamaTokenizerFast", "Qwen2TokenizerFast", "GPT2Tokenizer", "GemmaTokenizer", None]
)
@pytest.mark.parametrize(
    "model_type", ["llama", "qwen2", "qwen3", "mistral", "gemma3_text", "phi3", "olmo2", "unheard_of"]
)
@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_class_and_model_type_in_any_combination(
    tmp_path: Path, kind: Kind, model_type: str, declared: str | None
) -> None:
    if kind == "byte_level" and declared == "LlamaTokenizerFast" and _garbles_byte_level_llama():
        pytest.skip("fixed in a later transformers")
    folder = make_tokenizer(tmp_path, kind, settings={"tokenizer_class": declared})
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    ours, theirs = Tokenizer.load(folder), _auto(folder)
    _compare_texts(ours, theirs, random.Random(model_type), 20)


def test_the_class_table_is_that_of_the_installed_transformers() -> None:
    from transformers.models.auto import tokenization_auto as auto

    plain = {"TokenizersBackend", "MistralCommonBackend"}
    for model_type, ours in tokenizer_class._REGISTERED.items():
        theirs = auto.TOKENIZER_MAPPING_NAMES.get(model_type)
        if theirs is not None:  # an older release may not know the type yet
            assert ours == ("" if theirs in plain else theirs), model_type
    for model_type, theirs in auto.TOKENIZER_MAPPING_NAMES.items():
        if theirs in tokenizer_class.REBUILT and model_type in _DECODERS:
            assert tokenizer_class._REGISTERED.get(model_type) == theirs, model_type
    wrong = auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
    assert set(tokenizer_class._NAMED_WRONGLY) & {"qwen2", "phi3", "nemotron"} <= set(wrong)


_DECODERS = {
    "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "gemma", "gemma2", "gemma3", "gemma3_text",
    "gpt2", "gpt_neox", "olmo", "olmoe", "cohere", "cohere2", "phi", "starcoder2", "llama", "mixtral",
    "granite", "phi3",
}  # fmt: skip


@pytest.mark.parametrize("template", [CHATML, INSTRUCT], ids=["chatml", "instruct"])
def test_more_of_chat_templates(tmp_path: Path, template: str) -> None:
    """A final message that goes on, reasoning, tools, text with braces and tags in it, and a refusal."""
    folder = make_tokenizer(tmp_path, "byte_level", template=template)
    ours, theirs = Tokenizer.load(folder), _auto(folder)
    rng = random.Random(5)
    for _ in range(100):
        final = {
            "role": "assistant",
            "content": random_text(rng, 4),
            "reasoning_content": "so",
            "tool_calls": None,
        }
        chat = [*random_chat(rng), final]
        options: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
        expected = theirs.apply_chat_template(chat, tokenize=False, **options)
        assert ours.render_chat(chat, **options) == expected
    chat = [{"role": "user", "content": "{{ 1 + 1 }} {% raw %} </s> <b>&amp;"}]
    assert ours.render_chat(chat) == theirs.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )
    if template == INSTRUCT:
        twice = chat * 2
        with pytest.raises(Exception, match="alternate") as caught:
            theirs.apply_chat_template(twice, tokenize=False)
        with pytest.raises(ChatTemplateError, match=str(caught.value)):
            ours.render_chat(twice)


def test_tools_and_variables_reach_the_template(tmp_path: Path) -> None:
    template = (
        "{{ bos_token }}{% for tool in tools or [] %}{{ tool | tojson(indent=2) }}{% endfor %}{{ mode }}"
        "{% for m in messages %}{% for c in m.tool_calls or [] %}"
        "{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
    )
    folder = make_tokenizer(tmp_path, "byte_level", template=template)
    ours, theirs = Tokenizer.load(folder), _auto(folder)
    tools = [
        {"type": "function", "function": {"name": "f<&>", "parameters": {"b": 1, "a": ["é", None, 1.5]}}}
    ]
    call = {"type": "function", "function": {"name": "f", "arguments": {"q": "猫'\""}}}
    chat: list[dict[str, Any]] = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    expected = theirs.apply_chat_template(chat, tools=tools, tokenize=False, mode="m", bos_token="B")
    rendered = ours.render_chat(
        chat, tools=tools, add_generation_prompt=False, template_kwargs={"mode": "m", "bos_token": "B"}
    )
    assert rendered == expected


def test_a_sentencepiece_model_alone(tmp_path: Path) -> None:
    """No tokenizer.json: transformers converts it, once, at start."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    (tmp_path / "corpus.txt").write_text("\n".join(line.replace("\n", " ") for line in CORPUS * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=420,
        model_type="bpe", byte_fallback=True, character_coverage=0.98, minloglevel=2, add_dummy_prefix=True,
    )  # fmt: skip
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": 420}')
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "chat_template": CHATML})
    )
    ours, theirs = Tokenizer.load(tmp_path), _auto(tmp_path)
    assert ours.encode("the dog")[0] == ours.bos_token_id == theirs.bos_token_id
    rng = random.Random(9)
    _compare_texts(ours, theirs, rng, 200)
    _compare_chats(ours, theirs, rng, 100)


def test_a_directory_without_any_tokenizer(tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "empty", ignore_errors=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(TokenizerLoadError, match=r"no tokenizer\.json") as caught:
        Tokenizer.load(tmp_path / "empty")
    assert "\n" not in str(caught.value)
