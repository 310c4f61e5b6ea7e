"""What ends an executor: a model that cannot be made ready, or one that can no longer be trusted.

Loads no torch, so that the command line can catch it.
"""


class ModelError(Exception):
    """A model cannot be served. The text is one clear sentence for the user."""


class BrokenModelError(Exception):
    """The model or its device fails whatever is computed: only a new process can help."""


def first_line(error: BaseException) -> str:
    """What an error says first, for a sentence of our own."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
