"""How commands fail: one sentence and an exit code, never a stack trace."""

from enum import IntEnum


class ExitCode(IntEnum):
    """What a command's process says when it ends."""

    OK = 0
    FAILED = 1
    USAGE = 2  # a flag, variable, key or command is wrong
    MODEL = 3  # the model cannot be served; trying again is of no use
    INTERRUPTED = 130


class CommandError(Exception):
    """The command cannot go on; `sentence` is all that the user needs to read."""

    def __init__(self, sentence: str, exit_code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.exit_code = exit_code
