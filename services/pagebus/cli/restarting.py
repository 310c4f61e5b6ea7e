"""How a launcher is asked for a rolling restart: a file with the wish, SIGUSR1, a file with the answer.

Both files lie beside the status file. A bare SIGUSR1 asks for a restart with what suits the machine.
"""

import asyncio
import contextlib
import os
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Literal

import msgspec

from pagebus.settings.structs import ServeSettings

_NVIDIA = Path("/dev/nvidiactl")


class Request(msgspec.Struct, frozen=True):
    """What is wished. `overlap` None: old and new executors run side by side unless they share a GPU."""

    id: str = ""
    overlap: bool | None = None


class Answer(msgspec.Struct, frozen=True):
    """How far it is; `fault` is why it failed."""

    id: str
    state: Literal["running", "done", "failed"]
    steps: tuple[str, ...] = ()
    fault: str = ""


Restart = Callable[[Request, Callable[[str], None]], Awaitable[str]]
"""Does it, tells each step, and returns what went wrong, or ""."""


def needs_room(settings: ServeSettings) -> bool:
    """Whether the model would have to fit twice on a GPU while old and new executor overlap."""
    return not settings.fake and settings.device != "cpu" and _NVIDIA.exists()


def request_file(directory: Path, port: int) -> Path:
    """Where the wish stands."""
    return directory / f"restart-{port}.request"


def answer_file(directory: Path, port: int) -> Path:
    """Where the answer stands."""
    return directory / f"restart-{port}.answer"


def write_file(path: Path, content: msgspec.Struct) -> None:
    """Write it whole or not at all, readable by this user only. Raises `OSError`."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".restart-")
    with os.fdopen(descriptor, "wb") as opened:
        opened.write(msgspec.json.encode(content))
    os.replace(name, path)


def read_answer(path: Path) -> Answer | None:
    """The answer, or None where there is none."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Answer)
    except (OSError, msgspec.DecodeError):
        return None


class Restarts:
    """The launcher's side: one restart after the other."""

    def __init__(self, directory: Path, port: int) -> None:
        self._request_file = request_file(directory, port)
        self._answer_file = answer_file(directory, port)
        self._requests: asyncio.Queue[Request] = asyncio.Queue(maxsize=4)

    def on_signal(self) -> None:
        """SIGUSR1: take the wish; further ones wait, and too many are dropped."""
        request = Request()
        with contextlib.suppress(OSError, msgspec.DecodeError):
            request = msgspec.json.decode(self._request_file.read_bytes(), type=Request)
            self._request_file.unlink(missing_ok=True)
        with contextlib.suppress(asyncio.QueueFull):
            self._requests.put_nowait(request)
            if self._requests.qsize() == 1:
                self._tell(Answer(request.id, "running"))

    async def serve(self, restart: Restart) -> None:
        """Do what is wished, for ever."""
        while True:
            request = await self._requests.get()
            steps: list[str] = []

            def tell(step: str, request: Request = request, steps: list[str] = steps) -> None:
                steps.append(step)
                self._tell(Answer(request.id, "running", tuple(steps)))

            try:
                fault = await restart(request, tell)
            except Exception as error:
                fault = f"{type(error).__name__}: {error}"
            self._tell(Answer(request.id, "failed" if fault else "done", tuple(steps), fault))

    def forget(self) -> None:
        """Remove the files."""
        for file in (self._request_file, self._answer_file):
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)

    def _tell(self, answer: Answer) -> None:
        with contextlib.suppress(OSError):
            write_file(self._answer_file, answer)
