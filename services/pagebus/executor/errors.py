"""What ends an executor: a model that cannot be made ready, or one that can no longer be trusted.

Loads no torch, so that the command line can catch it.
"""


class ModelError(Exception):
    """A model cannot be served. The text is one clear sentence for the user."""


class BrokenModelError(Exception):
    """The model or its device fails whatever is computed: only a new process can help."""
