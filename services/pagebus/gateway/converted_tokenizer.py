"""For directories without tokenizer.json: transformers converts what is there (a sentencepiece
tokenizer.model, say).

The only module of the gateway that imports transformers, and only when it is called.
"""

from pathlib import Path

from tokenizers import Tokenizer

from pagebus.gateway.backend import Backend, has_space_cleanup
from pagebus.gateway.text_errors import TokenizerLoadError


def convert(path: Path) -> Backend:
    """The tokenizer that AutoTokenizer makes, as a `tokenizers.Tokenizer` of our own; no code of the model is
    run."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        made = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever goes wrong in there, it is one line at start
        reason = str(error).strip().splitlines()
        raise TokenizerLoadError(f"{path}: no tokenizer.json, and no other tokenizer that can be read "
                                 f"({reason[0] if reason else type(error).__name__})") from error  # fmt: skip
    if not isinstance(made, PreTrainedTokenizerFast):
        raise TokenizerLoadError(f"{path}: no tokenizer.json, and its tokenizer cannot be converted to one")
    tokenizer = Tokenizer.from_str(made.backend_tokenizer.to_str())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    settings: dict[str, object] = {"clean_up_tokenization_spaces": made.clean_up_tokenization_spaces}
    return Backend(
        tokenizer=tokenizer,
        special_tokens=dict(made.special_tokens_map),
        has_space_cleanup=has_space_cleanup(settings, tokenizer),
    )
