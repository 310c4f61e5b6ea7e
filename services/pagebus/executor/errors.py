"""What goes wrong while a model is made ready. Loads no torch, so that the command line can catch it."""


class ModelError(Exception):
    """A model cannot be served. The text is one clear sentence for the user."""
