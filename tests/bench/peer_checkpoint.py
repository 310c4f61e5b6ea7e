"""Checkpoints of well-known shapes with random weights, for comparisons. Knows no server."""

import json
from pathlib import Path

import torch

from pagebus.bench.gpu_shapes import CONFIGS, write_config

_SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
SHAPES = ("smollm2-135m", *CONFIGS)


def make(shape: str, folder: Path, seed: int = 0) -> Path:
    """A checkpoint of one of `SHAPES`: random weights, sharp enough that tokens can be told apart."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.support.models import sharpen

    folder.mkdir(parents=True, exist_ok=True)
    if shape == "smollm2-135m":
        (folder / "config.json").write_text(json.dumps(_SMOLLM2), encoding="utf-8")
        source = folder
    else:
        source = write_config(shape, folder)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source), dtype=torch.bfloat16)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            sharpen(name, weight)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    write_tokenizer(folder, int(model.config.vocab_size))
    return folder


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Every id is a word of its own: a server sends text for each token, which so can be timed."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"Ġw{number}" for number in range(vocab_size - len(letters)))]
    tokenizer = Tokenizer(models.BPE(vocab={word: at for at, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
