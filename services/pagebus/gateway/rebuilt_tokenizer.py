"""Tokenizers that transformers 5 builds anew: vocabulary and merges of tokenizer.json, everything else by
class.

Owns those parts only; special and added tokens are put in by `backend.py`.
"""

import json
from collections.abc import Mapping

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from pagebus.gateway.model_text import JsonObject
from pagebus.gateway.text_errors import TokenizerLoadError
from pagebus.gateway.tokenizer_class import RebuiltClass

# How Qwen cuts words: contractions, letters with one sign before them, single digits, punctuation with line
# ends, white space. Qwen 3.5 counts combining marks as letters.
_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?LETTERS+|\p{N}"
    r"| ?[^\s\p{L}MARKS\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _QWEN_SPLIT.replace("LETTERS", r"\p{L}").replace("MARKS", "")
_QWEN35_SPLIT = _QWEN_SPLIT.replace("LETTERS", r"[\p{L}\p{M}]").replace("MARKS", r"\p{M}")

_NEOX_DEFAULTS = dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>")
SPECIAL_TOKEN_DEFAULTS: Mapping[RebuiltClass, Mapping[str, str]] = {
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "Qwen2Tokenizer": dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>"),
    "Qwen3_5Tokenizer": dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>"),
    "GemmaTokenizer": {
        "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>",
        "mask_token": "<mask>",
    },
    "GPT2Tokenizer": _NEOX_DEFAULTS,
    "GPTNeoXTokenizer": {**_NEOX_DEFAULTS, "pad_token": "<|padding|>"},
    "CohereTokenizer": {
        "unk_token": "<UNK>", "bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>",
        "pad_token": "<PAD>", "cls_token": "<CLS>", "sep_token": "<SEP>", "mask_token": "<MASK_TOKEN>",
    },
}  # fmt: skip
"""Special tokens that a class has where tokenizer_config.json does not say (null there means: none)."""


def rebuild(
    name: RebuiltClass, document: JsonObject, tokenizer_config: JsonObject, unk_token: str | None
) -> Tokenizer:
    """The class's own pipeline around the vocabulary of a parsed tokenizer.json; the post-processor (BOS,
    EOS) is the file's. No added token is in it yet. Raises TokenizerLoadError where the file has no such
    parts."""
    vocabulary, merges = _vocabulary_and_merges(document)
    if name == "LlamaTokenizer":
        tokenizer = _llama(vocabulary, merges, tokenizer_config)
    elif name == "GemmaTokenizer":
        tokenizer = _gemma(vocabulary, merges, unk_token)
    else:
        tokenizer = _byte_level(name, vocabulary, merges, tokenizer_config.get("add_prefix_space") is True)
    if name == "GPTNeoXTokenizer":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A:0", pair="$A:0 $B:1", special_tokens=[]
        )
    else:
        post_processor = _post_processor(document)
        if post_processor is not None:
            tokenizer.post_processor = post_processor
    return tokenizer


def _vocabulary_and_merges(
    document: JsonObject,
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = document.get("model")
    if not isinstance(model, dict):
        raise TokenizerLoadError("tokenizer.json: no model in it")
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, list):  # Unigram: [piece, score]; the class keeps the order only
        vocabulary = {piece[0] if isinstance(piece, list) else piece: i for i, piece in enumerate(vocabulary)}
    if not isinstance(vocabulary, dict):
        raise TokenizerLoadError("tokenizer.json: the model has no vocabulary")
    merges: list[tuple[str, str]] = []
    for merge in model.get("merges") or []:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if len(pair) != 2:
            raise TokenizerLoadError(f"tokenizer.json: merge {merge!r} is not a pair")
        merges.append((pair[0], pair[1]))
    return vocabulary, merges


def _post_processor(document: JsonObject) -> processors.PostProcessor | None:
    """The file's post-processor, loaded through a tokenizer with nothing else in it."""
    shell = {
        "version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "decoder": None,
        "truncation": None, "padding": None, "post_processor": document.get("post_processor"),
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }  # fmt: skip
    made: processors.PostProcessor | None = Tokenizer.from_str(json.dumps(shell)).post_processor
    return made


def _llama(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], tokenizer_config: JsonObject
) -> Tokenizer:
    """Llama 2's: spaces become U+2581, unknown characters become byte tokens."""
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=True, byte_fallback=True))
    has_prefix_space = tokenizer_config.get("add_prefix_space") is not False
    scheme = "never"
    if has_prefix_space:
        scheme = "always" if tokenizer_config.get("legacy") else "first"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    steps: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if has_prefix_space:
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _gemma(vocabulary: dict[str, int], merges: list[tuple[str, str]], unk_token: str | None) -> Tokenizer:
    """Gemma's: as Llama's, without a prefix space."""
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=merges, fuse_unk=True, unk_token=str(unk_token), byte_fallback=True
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern=" ", behavior="merged_with_previous", invert=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def _byte_level(
    name: RebuiltClass, vocabulary: dict[str, int], merges: list[tuple[str, str]], add_prefix_space: bool
) -> Tokenizer:
    """The byte-level families: they differ in how words are cut and whether characters are composed (NFC)."""
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix="",
            fuse_unk=False,
        )
    )
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    if name in ("Qwen2Tokenizer", "Qwen3_5Tokenizer"):
        split = _QWEN2_SPLIT if name == "Qwen2Tokenizer" else _QWEN35_SPLIT
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(split), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=False),
        ])  # fmt: skip
    elif name == "CohereTokenizer":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), by_bytes]
        )
    else:
        tokenizer.pre_tokenizer = by_bytes
    if name != "GPT2Tokenizer":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
