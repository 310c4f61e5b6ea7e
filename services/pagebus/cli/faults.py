"""How a launched process tells the launcher why its model cannot be served: one sentence in a file."""

import os
from pathlib import Path

from pagebus.cli.errors import CommandError, ExitCode

FAULT_VARIABLE = "PAGEBUS_FAULT_FILE"


def end_for_model(sentence: str) -> CommandError:
    """The error to raise. With a launcher the sentence goes to it, else to the user."""
    line = " ".join(sentence.split()) or "the model cannot be served"
    file = os.environ.get(FAULT_VARIABLE, "")
    if file:
        Path(file).write_text(line, "utf-8")
        return CommandError("", ExitCode.MODEL)
    return CommandError(line, ExitCode.MODEL)


def sentence_of(file: Path) -> str:
    """What a process that ended wrote; empty when it wrote nothing."""
    try:
        return file.read_text("utf-8").strip()
    except OSError:
        return ""
