"""Which tokenizer class transformers would load for a model directory, decided from names alone.

It matters because some classes of transformers 5 take only vocabulary and merges from tokenizer.json and put
their own normalizer, pre-tokenizer and decoder around them: `rebuilt_tokenizer.py` does what those do.
Decoder families are listed here; a test compares the answers with the installed transformers.
"""

from typing import Literal

RebuiltClass = Literal[
    "LlamaTokenizer", "Qwen2Tokenizer", "Qwen3_5Tokenizer", "GemmaTokenizer",
    "GPT2Tokenizer", "GPTNeoXTokenizer", "CohereTokenizer",
]  # fmt: skip

REBUILT: dict[str, RebuiltClass] = {
    "LlamaTokenizer": "LlamaTokenizer",
    "Qwen2Tokenizer": "Qwen2Tokenizer",
    "Qwen3_5Tokenizer": "Qwen3_5Tokenizer",
    "GemmaTokenizer": "GemmaTokenizer",
    "GPT2Tokenizer": "GPT2Tokenizer",
    "GPTNeoXTokenizer": "GPTNeoXTokenizer",
    "CohereTokenizer": "CohereTokenizer",
}

# The class that transformers has registered for a model type; "" stands for the plain one, which takes
# tokenizer.json as it is. Types that are not listed have none.
_REGISTERED: dict[str, str] = {
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next"), "Qwen2Tokenizer"),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "internvl"), "Qwen2Tokenizer"),
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "qwen3_5_text", "qwen3_5_moe_text"), "Qwen3_5Tokenizer"),
    **dict.fromkeys(
        ("gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text"), "GemmaTokenizer"
    ),
    **dict.fromkeys(("recurrent_gemma", "t5gemma"), "GemmaTokenizer"),
    **dict.fromkeys(
        ("gpt2", "gpt_neo", "gptj", "opt", "phi", "starcoder2", "dbrx", "codegen"), "GPT2Tokenizer"
    ),
    **dict.fromkeys(
        ("gpt_neox", "mpt", "olmo", "olmoe", "mamba", "mamba2", "falcon_mamba"), "GPTNeoXTokenizer"
    ),
    **dict.fromkeys(("cohere", "cohere2"), "CohereTokenizer"),
    **dict.fromkeys(("mistral", "mistral3", "ministral", "ministral3", "mixtral"), ""),
    **dict.fromkeys(("granite", "granitemoe", "granitemoehybrid", "granitemoeshared", "gpt_bigcode"), ""),
    **dict.fromkeys(("olmo2", "olmo3", "glm", "glm4", "glm4_moe", "stablelm", "persimmon", "flex_olmo"), ""),
    **dict.fromkeys(("phi3", "phimoe", "nemotron", "molmo", "molmo2", "internlm2", "internlm3", "jamba"), ""),
    **dict.fromkeys(("ernie4_5", "ernie4_5_moe", "minimax_m2", "minicpm3", "arctic"), ""),
}

# What these checkpoints name in tokenizer_config.json is known to be wrong: the registered class is taken.
_NAMED_WRONGLY = frozenset(
    ("qwen2", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "phi3", "phimoe", "nemotron", "molmo", "molmo2",
     "internlm2", "internlm3", "jamba", "ernie4_5", "ernie4_5_moe", "minimax_m2", "minicpm3", "arctic")
)  # fmt: skip

_MISTRAL = frozenset(("mistral", "mistral3", "ministral", "ministral3", "mixtral"))
_PLAIN_NAMES = frozenset(("TokenizersBackend", "PythonBackend", "PreTrainedTokenizer"))


def rebuilt_class(
    model_type: str, named: str | None, is_byte_level: bool, has_remote_code: bool
) -> RebuiltClass | None:
    """The class that rebuilds the tokenizer, or None where tokenizer.json is taken as it is.

    `named` is `tokenizer_class` of tokenizer_config.json, else of config.json; `is_byte_level` says whether
    tokenizer.json has a byte-level part; `has_remote_code` whether the directory names code of its own, which
    is never run but changes which rules apply (as with transformers' trust_remote_code=False).
    """
    registered = _REGISTERED.get(model_type)
    short = named.removesuffix("Fast") if named is not None else None
    if short is None:
        return REBUILT.get(registered or "")
    if not has_remote_code:
        if (
            short == "LlamaTokenizer"
            and is_byte_level
            and model_type not in _MISTRAL
            and model_type not in _NAMED_WRONGLY
        ):
            return None  # Llama 3 and its kin name the class of Llama 2
        if registered is not None and registered != short:
            if registered == "":
                return None
            return REBUILT.get(registered if model_type in _NAMED_WRONGLY else short)
    if short in _PLAIN_NAMES:
        return None
    return REBUILT.get(short)
