"""Keeps one service process running: starts it, waits, starts it again after a pause, stops it.

It knows no service; what to start is a command line and an environment.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pagebus.cli.backoff import Backoff
from pagebus.cli.errors import ExitCode
from pagebus.cli.faults import FAULT_VARIABLE, sentence_of
from pagebus.cli.lifeline import LAUNCHER_VARIABLE

log = logging.getLogger("pagebus.cli.processes")

READY_VARIABLE = "PAGEBUS_READY_FILE"
_MOST_FAILURES_AT_START = 5


def service_command(role: str) -> list[str]:
    """The command line of a role, in which `ps` shows it."""
    # -P: a folder in the user's directory must not stand in for a package of ours
    return [sys.executable, "-P", "-m", "pagebus.cli", role]


class ServiceProcess:
    """One process of a role, restarted until it is stopped."""

    def __init__(
        self,
        role: str,
        number: int,
        command: Sequence[str],
        environment: Mapping[str, str],
        directory: Path,
        on_fatal: Callable[[str], None],
        *,
        pass_fds: Sequence[int] = (),
        generation: int = 1,
    ) -> None:
        """`command` starts it in `environment`; nothing secret stands in a command line.

        `directory` takes the files with which the process says that it is ready, or why its model cannot be
        served. `pass_fds`: open files that it inherits. `generation` tells it from one that it replaces.

        `on_fatal(sentence)` is called once when starting it again is of no use.
        """
        self.role = role
        self.label = f"{role}-{number}"
        self.is_settled = False  # set once all was ready: from then on it is restarted for ever
        self.number = number
        self.generation = generation
        self._fault_file = directory / f"{self.label}.{generation}.fault"
        self._ready_file = directory / f"{self.label}.{generation}.ready"
        self._command = list(command)
        self._environment = {
            **environment,
            LAUNCHER_VARIABLE: str(os.getpid()),
            FAULT_VARIABLE: str(self._fault_file),
            READY_VARIABLE: str(self._ready_file),
        }
        self._pass_fds = tuple(pass_fds)
        self._on_fatal = on_fatal
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """The process's id while it runs."""
        return self._process.pid if self._process and self._process.returncode is None else None

    @property
    def is_ready(self) -> bool:
        """Whether the running process has said that it does its part."""
        return self.pid is not None and self._ready_file.exists()

    async def start(self) -> None:
        """Start it and watch it from now on."""
        await self._spawn()
        self._task = asyncio.create_task(self._keep_running(), name=f"watch {self.label}")
        self._task.add_done_callback(self._on_watch_ended)

    def _on_watch_ended(self, task: asyncio.Task[None]) -> None:
        """A process that nobody watches any more must not go unnoticed."""
        if not task.cancelled() and (error := task.exception()):
            log.error("watching a process failed", exc_info=error, extra={"label": self.label})
            self._on_fatal(f"the {self.role} can no longer be watched: {error}")

    async def _spawn(self) -> None:
        self._ready_file.unlink(missing_ok=True)
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            env=self._environment,
            stdin=asyncio.subprocess.DEVNULL,
            pass_fds=self._pass_fds,
            start_new_session=True,  # the terminal's Ctrl-C is the launcher's to handle
        )

    async def _keep_running(self) -> None:
        backoff = Backoff()
        while self._process is not None:
            started = time.monotonic()
            code = await self._process.wait()
            if self._stopping.is_set():
                return
            if code in (ExitCode.MODEL, ExitCode.USAGE):
                self._on_fatal(sentence_of(self._fault_file) or f"the {self.role} cannot start")
                return
            wait_s = backoff.after(time.monotonic() - started)
            if not self.is_settled and backoff.num_failures >= _MOST_FAILURES_AT_START:
                self._on_fatal(
                    f"the {self.role} ended {backoff.num_failures} times while starting ({_ended(code)})"
                )
                return
            log.warning(
                "a process ended and is started again",
                extra={"label": self.label, "ended": _ended(code), "in_s": wait_s},
            )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), wait_s)
                return
            await self._spawn()
            if self._stopping.is_set():  # meanwhile
                self.kill()

    async def stop(self, grace_s: float, *, is_last: bool = False) -> None:
        """Ask it to end, wait for `grace_s`, then kill it. `is_last`: nobody does its part afterwards."""
        self._stopping.set()
        # before it is ready it has nothing to finish, and may not yet know what to do at SIGINT
        self._signal(signal.SIGINT if is_last and self.is_ready else signal.SIGTERM)
        if self._process is not None:
            try:
                await asyncio.wait_for(self._process.wait(), grace_s)
            except TimeoutError:
                log.warning("a process did not end in time and is killed", extra={"label": self.label})
                self.kill()
                await self._process.wait()
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)

    def kill(self) -> None:
        """End it at once."""
        self._stopping.set()
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            send(self._process, number)


def send(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    """Send a signal to a child that was not seen to end.

    Not `send_signal`: it polls, and may so take a dead child's exit code away from asyncio's own watcher.
    """
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, number)


def _ended(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
