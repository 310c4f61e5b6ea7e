"""One service as a process: settings, logs, signals, the bus, the service's own `run`, an exit code.

The same for all three; what a service does is known only in its own package.
"""

import asyncio
import contextlib
import errno
import gc
import logging
import os
import re
import secrets
import signal
import socket
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from pagebus.bus.protocol import Bus, BusError
from pagebus.cli.configured import configured
from pagebus.cli.errors import CommandError, ExitCode
from pagebus.cli.faults import end_for_model
from pagebus.cli.lifeline import LOWER_PRIORITY, die_with_launcher, is_launched
from pagebus.cli.port import inherited_listener
from pagebus.cli.processes import READY_VARIABLE
from pagebus.settings.model_files import ModelFilesError, resolve_model
from pagebus.settings.structs import (
    CommonSettings,
    ExecutorSettings,
    GatewaySettings,
    SchedulerSettings,
)
from pagebus.telemetry import logs

log = logging.getLogger("pagebus.cli.services")

NATS_VARIABLE = "NATS_URL"
ALIVE_VARIABLE = "PAGEBUS_ALIVE_FILE"
# Importing torch and transformers makes objects that stay: collecting among them cost a fifth of the start.
_FEW_COLLECTIONS = (100_000, 20, 50)
# What a request leaves in circles is collected every few hundred requests.
_SERVING_COLLECTIONS = (2_000, 10, 10)
_NOT_PART = re.compile(r"[^A-Za-z0-9_-]+")


class Stop(asyncio.Event):
    """Set when the process is to drain and end."""

    is_last = False
    """Ended by hand (SIGINT): nobody takes its place, and nobody needs to be sent there."""


Work = Callable[[Bus, str, Stop], Awaitable[None]]
"""A service's `run` with its settings filled in: bus, instance name, stop."""


def gateway(arguments: Sequence[str]) -> int:
    """`pagebus gateway`."""
    settings = configured(GatewaySettings, arguments)
    if settings is None:
        return ExitCode.OK
    _begin("gateway", settings)
    gc.set_threshold(*_FEW_COLLECTIONS)
    path = _model_directory(settings)

    async def work(bus: Bus, name: str, stop: Stop) -> None:
        from pagebus.gateway.service import run
        from pagebus.gateway.text_errors import TokenizerLoadError
        from pagebus.telemetry import tracing

        traces = tracing.create("pagebus-gateway", name, settings.otlp_traces_endpoint)
        try:
            await run(
                settings,
                bus,
                path,
                name,
                stop,
                traces,
                reuse_port=settings.reuse_port,
                listener=inherited_listener(),
                on_ready=_settle,
                is_last=lambda: stop.is_last,
            )
        except TokenizerLoadError as error:
            raise end_for_model(str(error)) from error
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EACCES):
                raise
            where = f"{settings.host}, port {settings.port}"
            raise CommandError(f"--host, --port: cannot listen on {where}: {error.strerror}") from None
        finally:
            if traces:
                await asyncio.to_thread(traces.close)

    return _run("gateway", settings, work)


def scheduler(arguments: Sequence[str]) -> int:
    """`pagebus scheduler`."""
    settings = configured(SchedulerSettings, arguments)
    if settings is None:
        return ExitCode.OK
    _begin("scheduler", settings)

    async def work(bus: Bus, name: str, stop: Stop) -> None:
        from pagebus.scheduler.service import run
        from pagebus.telemetry import tracing

        traces = tracing.create("pagebus-scheduler", name, settings.otlp_traces_endpoint)
        try:
            await run(settings, bus, name, stop, traces.record if traces else None, on_ready=say_ready)
        finally:
            if traces:
                await asyncio.to_thread(traces.close)

    return _run("scheduler", settings, work)


def executor(arguments: Sequence[str]) -> int:
    """`pagebus executor`."""
    settings = configured(ExecutorSettings, arguments)
    if settings is None:
        return ExitCode.OK
    _begin("executor", settings)
    gc.set_threshold(*_FEW_COLLECTIONS)
    path = _model_directory(settings)

    async def work(bus: Bus, name: str, stop: Stop) -> None:
        from pagebus.executor.errors import ModelError
        from pagebus.executor.service import run

        try:
            await run(settings, bus, path, name, stop, on_ready=say_ready)
        except ModelError as error:
            raise end_for_model(str(error)) from error

    return _run("executor", settings, work)


def say_ready() -> None:
    """Tell the launcher, if there is one, that this process does its part from now on."""
    name = os.environ.get(READY_VARIABLE, "")
    if name:
        with contextlib.suppress(OSError):
            Path(name).touch()


def _settle() -> None:
    """Ready; what is there now stays, and need not be looked at by each collection."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_SERVING_COLLECTIONS)
    say_ready()


def instance_name(role: str, given: str) -> str:
    """The instance's name on the bus: the given one, or one that no other process has."""
    if given:
        return given
    host = _NOT_PART.sub("-", socket.gethostname()).strip("-")[:40] or "host"
    return f"{role}-{host}-{secrets.token_hex(4)}"


def _begin(role: str, settings: CommonSettings) -> None:
    die_with_launcher()
    logs.configure(role, settings.log_level)
    if is_launched() and role != "executor":
        with contextlib.suppress(OSError):
            os.nice(LOWER_PRIORITY)


def _model_directory(settings: CommonSettings) -> Path:
    try:
        return resolve_model(settings)
    except ModelFilesError as error:
        raise end_for_model(str(error)) from None


def _run(role: str, settings: CommonSettings, work: Work) -> int:
    from pagebus.bus.subjects import InvalidSubjectPartError, part

    url = os.environ.get(NATS_VARIABLE, "")
    if not url:
        raise CommandError(
            f"{NATS_VARIABLE} is not set; it names the bus, as in nats://user:password@host:4222"
            " (pagebus serve starts a bus of its own)",
            ExitCode.USAGE,
        )
    name = instance_name(role, settings.name)
    try:
        part(name)
    except InvalidSubjectPartError as error:
        raise CommandError(f"--name: {error}", ExitCode.USAGE) from None
    with asyncio.Runner(loop_factory=_new_event_loop) as runner:
        try:
            runner.run(_connected(role, url, name, work))
        except CommandError:
            raise
        except Exception as error:
            log.exception("the service ended by an error", extra={"error": str(error)})
            return ExitCode.FAILED
    return ExitCode.OK


def _new_event_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # where there is no uvloop asyncio's own loop does
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


async def _connected(role: str, url: str, name: str, work: Work) -> None:
    from pagebus.bus.nats_bus import NatsBus

    stop = Stop()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _ask_to_stop, stop, number)
    connecting = asyncio.create_task(NatsBus.connect(url, name=name), name="connect")
    stopping = asyncio.create_task(stop.wait(), name="stop")
    await asyncio.wait((connecting, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not connecting.done():  # no bus yet, and told to stop
        connecting.cancel()
        await asyncio.gather(connecting, return_exceptions=True)
        return
    try:
        bus = connecting.result()
    except (BusError, ValueError) as error:
        raise CommandError(f"{NATS_VARIABLE}: {error}") from None
    alive = asyncio.create_task(_show_life(), name="show life")
    try:
        log.debug("started", extra={"instance": name, "role": role})
        await work(bus, name, stop)
    finally:
        alive.cancel()
        with contextlib.suppress(BusError):
            await bus.close()


async def _show_life() -> None:
    """Touch the file that a container's health check looks at, each second while the loop turns.

    Not more: a bus that is away comes back, and a restart would only cut connections; an executor whose step
    hangs ends itself.
    """
    name = os.environ.get(ALIVE_VARIABLE, "")
    while name:
        with contextlib.suppress(OSError):
            os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600))
            os.utime(name)
        await asyncio.sleep(1.0)


def _ask_to_stop(stop: Stop, number: int) -> None:
    """The first signal asks; the second does not wait."""
    if stop.is_set():
        os._exit(ExitCode.INTERRUPTED)
    stop.is_last = number == signal.SIGINT
    stop.set()
