"""Settings for a command: reads them, shows the help, and turns what is wrong into a `CommandError`."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from pagebus.cli.errors import CommandError, ExitCode
from pagebus.settings.load import HelpWanted, read_settings
from pagebus.settings.model_files import ModelFilesError, resolve_model
from pagebus.settings.options import SettingsError
from pagebus.settings.structs import CommonSettings

S = TypeVar("S", bound=CommonSettings)


def configured(settings: type[S], arguments: Sequence[str]) -> S | None:
    """The settings; None when the help was asked for and shown."""
    try:
        return read_settings(settings, arguments, os.environ)
    except HelpWanted as help_wanted:
        print(help_wanted, end="")
        return None
    except SettingsError as error:
        raise CommandError(str(error), ExitCode.USAGE) from None


def model_directory(settings: CommonSettings, failure: ExitCode) -> Path:
    """The model's directory; `CommandError` with the exit code `failure` when there is none."""
    try:
        return resolve_model(settings)
    except ModelFilesError as error:
        raise CommandError(str(error), failure) from None
