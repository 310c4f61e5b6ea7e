"""The text layer's errors: what the client did wrong, what is wrong with a model's files, and a pool that is
full."""


class TextError(ValueError):
    """The client's fault: answer 400 with `str(error)`."""


class InvalidTextError(TextError):
    """Text that no tokenizer can take: it holds a lone surrogate and so has no UTF-8 form."""


class ChatTemplateError(TextError):
    """The chat template refused these messages, or could not render them within its limits."""


class TokenizerLoadError(Exception):
    """The model directory's text files are missing or broken: one line that names the file."""


class TokenizerBusyError(Exception):
    """More text waits for a thread than the pool's bound: answer 503 and let the client try again."""
