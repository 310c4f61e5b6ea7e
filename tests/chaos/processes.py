"""Real services as processes, each in a process group of its own: started, signalled, kept running, ended.

Whatever happens to the test, none outlives it: the kernel kills them when the test's process ends.
"""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from pagebus.cli.lifeline import before_exec

RESTART_AFTER_S = 0.2
_STOP_TIMEOUT_S = 15.0


class ServiceProcess:
    """One service. With `keeps_running` it is started again 0.2 s after each end that nobody asked for."""

    def __init__(self, role: str, number: int, environment: Mapping[str, str], directory: Path) -> None:
        """`environment` is added to this process's own; logs go to `directory`."""
        self.role = role
        self.label = f"{role}-{number}"
        self.environment = dict(environment)
        self.keeps_running = True
        self.reuses_name = False  # a restarted service goes by the name that the dead one had
        self.num_starts = 0
        self.started_s = 0.0
        self.exit_codes: list[int] = []
        self.log = directory / f"{self.label}.log"
        self._process: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[None] | None = None
        self._is_ending = False
        self._lock = asyncio.Lock()
        self._was_started = asyncio.Event()

    @property
    def name(self) -> str:
        """Its instance's name on the bus."""
        return self.label if self.reuses_name else f"{self.label}-{self.num_starts}"

    @property
    def pid(self) -> int:
        """The running process; 0 where none runs."""
        return self._process.pid if self._process is not None and self.is_running else 0

    @property
    def is_running(self) -> bool:
        """Whether there is a process, stopped or not."""
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Start it, if it does not run, and keep it running."""
        async with self._lock:
            if self.is_running:
                return
            self._is_ending = False
            self.num_starts += 1
            self.started_s = time.monotonic()
            with self.log.open("ab") as log:
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable, "-P", "-m", "pagebus.cli", self.role,
                    env={**_clean(os.environ), **self.environment, "PAGEBUS_NAME": self.name},
                    stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log,
                    start_new_session=True,  # Ctrl-C is the test's, which then ends them
                    preexec_fn=before_exec(),
                )  # fmt: skip
            self._was_started.set()
            if self._watch is None:
                self._watch = asyncio.create_task(self._keep(), name=f"keep {self.label}")

    async def _keep(self) -> None:
        while (process := self._process) is not None:
            self.exit_codes.append(await process.wait())
            if self.keeps_running and not self._is_ending:
                await asyncio.sleep(RESTART_AFTER_S)
            if self.keeps_running and not self._is_ending:
                await self.start()
            if self._process is process:  # until somebody starts it
                self._was_started.clear()
                await self._was_started.wait()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; nothing where no process runs."""
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.signal(signal.SIGKILL)

    async def killed(self) -> None:
        """SIGKILL, and wait until it is gone; it stays away until `start`."""
        self._is_ending = True
        self.kill()
        await self._ended(_STOP_TIMEOUT_S)

    async def terminate(self, timeout_s: float = 60.0) -> int:
        """SIGTERM, and wait; the exit code. It stays away until `start`. Raises `TimeoutError`."""
        self._is_ending = True
        self.signal(signal.SIGTERM)
        return await self._ended(timeout_s)

    async def close(self) -> None:
        """End it for good: asked to, then by force."""
        self._is_ending = True
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        try:
            await self._ended(3.0)
        except TimeoutError:
            self.kill()
            await self._ended(_STOP_TIMEOUT_S)
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)

    async def _ended(self, timeout_s: float) -> int:
        if self._process is None:
            return 0
        return await asyncio.wait_for(self._process.wait(), timeout_s)

    def last_words(self) -> str:
        """The last error or warning in its log, shortened."""
        text = self.log.read_text(errors="replace") if self.log.is_file() else ""
        lines = [line for line in text.splitlines() if '"level": "debug"' not in line]
        return lines[-1][:400] if lines else ""


def _clean(environ: Mapping[str, str]) -> dict[str, str]:
    """Without what would configure the services behind the test's back."""
    return {key: value for key, value in environ.items() if not key.startswith(("PAGEBUS_", "NATS_URL"))} | {
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
