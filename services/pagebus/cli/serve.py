"""`pagebus serve`: checks what can be checked before anything starts, then hands over to the launcher."""

import asyncio
import contextlib
import dataclasses
from collections.abc import Sequence

from pagebus.cli.configured import configured, model_directory
from pagebus.cli.errors import ExitCode
from pagebus.cli.port import SharedListener
from pagebus.settings.structs import ServeSettings
from pagebus.telemetry import logs


def serve(arguments: Sequence[str]) -> int:
    """Serve a model on this machine until a signal ends it."""
    settings = configured(ServeSettings, arguments)
    if settings is None:
        return ExitCode.OK
    logs.configure("serve", settings.log_level)
    with contextlib.closing(SharedListener(settings.host, settings.port)) as listener:
        path = model_directory(settings, ExitCode.FAILED)
        # The processes get a directory and a port that are known to be good, and the name that was asked for.
        resolved = dataclasses.replace(
            settings,
            model=str(path),
            served_model_name=settings.served_model_name or (settings.model_name,),
            port=listener.port,
        )
        from pagebus.cli.launcher import Launcher

        return asyncio.run(Launcher(resolved, listener).run())
