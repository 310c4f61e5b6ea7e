"""Small tokenizers of each kind, trained on the fly, saved as Hugging Face directories; and texts to try them
on."""

import json
import random
from pathlib import Path
from typing import Any, Literal

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

Kind = Literal[
    "byte_level", "qwen", "llama3", "byte_fallback", "llama2", "llama2_legacy", "gemma", "unigram", "gpt2",
    "neox", "cohere",
]  # fmt: skip
KINDS: tuple[Kind, ...] = (
    "byte_level", "qwen", "llama3", "byte_fallback", "llama2", "llama2_legacy", "gemma", "unigram", "gpt2",
    "neox", "cohere",
)  # fmt: skip

SPECIALS = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog didn't mind at all.",
    "Pack my box with five dozen liquor jugs! How vexingly quick daft zebras jump?",
    "def main(argv: list[str]) -> int:\n    return sum(int(x) for x in argv)\n",
    "In 1984 there were 365 days; 127 + 245 = 372, and 12 x 12 = 144.",
    "Der Zürcher Bürgermeister trinkt Öl, naïve café, coöperate, façade.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "今日は良い天気ですね。私は猫が好きです。",
    "{\"name\": \"pagebus\", \"tokens\": [1, 2, 3], \"ok\": true}",
    "It's they're we've I'm you'd she'll don't . , ! ? 's 've",
    "   spaces    and\ttabs\n\n\nnew lines   \r\n here   ",
]  # fmt: skip

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim"
    " + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
INSTRUCT = """{{ bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content + '\\n\\n' %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
"""


def _train_bytes(vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIALS), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer


def _train_fallback(vocab_size: int) -> dict[str, Any]:
    """A tokenizer.json like Llama 2's: U+2581 for spaces, `<0x00>` to `<0xFF>` for what the vocabulary
    lacks."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIALS, *byte_tokens],
        show_progress=False,
        limit_alphabet=70,
    )
    tokenizer.train_from_iterator([line.replace("\n", " ") for line in CORPUS * 3], trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    document: dict[str, Any] = json.loads(tokenizer.to_str())
    document["added_tokens"] = [token for token in document["added_tokens"] if token["content"] in SPECIALS]
    return document


def _train_unigram(vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIALS), unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer


_CLASSES: dict[Kind, tuple[str, str]] = {
    "byte_level": ("PreTrainedTokenizerFast", "llama"),
    "qwen": ("Qwen2Tokenizer", "qwen3"),
    "llama3": ("LlamaTokenizerFast", "llama"),
    "byte_fallback": ("PreTrainedTokenizerFast", "llama"),
    "llama2": ("LlamaTokenizerFast", "llama"),
    "llama2_legacy": ("LlamaTokenizer", "llama"),
    "gemma": ("GemmaTokenizerFast", "gemma2"),
    "unigram": ("PreTrainedTokenizerFast", "llama"),
    "gpt2": ("GPT2Tokenizer", "gpt2"),
    "neox": ("GPTNeoXTokenizerFast", "gpt_neox"),
    "cohere": ("CohereTokenizerFast", "cohere"),
}


def _document(kind: Kind, vocab_size: int) -> dict[str, Any]:
    if kind in ("byte_fallback", "llama2", "llama2_legacy", "gemma"):
        return _train_fallback(vocab_size)
    if kind == "unigram":
        return json.loads(_train_unigram(vocab_size).to_str())  # type: ignore[no-any-return]
    return json.loads(_train_bytes(vocab_size).to_str())  # type: ignore[no-any-return]


def make_tokenizer(
    folder: Path,
    kind: Kind,
    *,
    adds_bos: bool = True,
    template: str = CHATML,
    is_template_file: bool = False,
    lists_added_tokens: bool = True,
    settings: dict[str, Any] | None = None,
    vocab_size: int = 700,
) -> Path:
    """Writes tokenizer.json, tokenizer_config.json and a config.json with the model type; returns the
    folder."""
    folder.mkdir(parents=True, exist_ok=True)
    document = _document(kind, vocab_size)
    tokenizer = Tokenizer.from_str(json.dumps(document))
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    class_name, model_type = _CLASSES[kind]
    config: dict[str, Any] = {
        "tokenizer_class": class_name, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "add_bos_token": adds_bos, "model_max_length": 4096, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    if lists_added_tokens:
        # One more than tokenizer.json has, as checkpoints that were extended do
        listed = {str(token.pop("id")): token for token in document["added_tokens"]}
        listed[str(tokenizer.get_vocab_size())] = {
            "content": "<|tool|>", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False,
            "special": False,
        }  # fmt: skip
        config["added_tokens_decoder"] = listed
    if kind == "llama2_legacy":
        config["legacy"] = True
    if is_template_file:
        (folder / "chat_template.jinja").write_text(template)
    else:
        config["chat_template"] = template
    config.update(settings or {})
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": vocab_size + 64}))
    return folder


_SNIPPETS = (
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|tool|>", "<unk>", "<0x0A>", "▁", "Ġ", "\ufffd", "\u200d",
    "\ufeff", "👨‍👩‍👧‍👦", "🇨🇭", "é", "e\u0301", "Å", "ﬁ", "１２", "don't", "I'm", "'s", " .", " ,", " n't",
    "\r\n", "\t", "\x00", "<s", "</", "<|", "|>", "[INST]", "猫", "ก็", "ẍ̧", "𝔘𝔫𝔦", "\U0010fffd",
)  # fmt: skip
_PLANES = ((0x20, 0x7F), (0xA0, 0x250), (0x370, 0x600), (0x900, 0xE00), (0x2000, 0x2C00), (0x3000, 0x9FFF),
           (0xE000, 0xFFFE), (0x10000, 0x10400), (0x1F300, 0x1FAFF), (0x20000, 0x2A6DF),
           (0xE0000, 0xE01FF))  # fmt: skip


def random_text(rng: random.Random, max_parts: int = 12) -> str:
    """Words of the corpus, digits, runs of white space, special tokens spelled out, characters of all
    planes."""
    parts: list[str] = []
    for _ in range(rng.randint(0, max_parts)):
        choice = rng.random()
        if choice < 0.35:
            line = rng.choice(CORPUS)
            start = rng.randrange(len(line))
            parts.append(line[start : start + rng.randint(1, 25)])
        elif choice < 0.5:
            parts.append(rng.choice((" ", "\n", "\t", "  ", "\u00a0", "\u3000")) * rng.randint(1, 6))
        elif choice < 0.65:
            parts.append(str(rng.randrange(10 ** rng.randint(1, 12))))
        elif choice < 0.8:
            parts.append(rng.choice(_SNIPPETS))
        else:
            low, high = rng.choice(_PLANES)
            parts.append("".join(chr(rng.randrange(low, high)) for _ in range(rng.randint(1, 5))))
    return "".join(parts)


def random_chat(rng: random.Random) -> list[dict[str, object]]:
    """A system message or none, then user and assistant in turn, ending with the user."""
    chat: list[dict[str, object]] = []
    if rng.random() < 0.4:
        chat.append({"role": "system", "content": random_text(rng, 5)})
    for turn in range(rng.choice((1, 3, 5))):
        chat.append({"role": "assistant" if turn % 2 else "user", "content": random_text(rng, 8)})
    return chat
