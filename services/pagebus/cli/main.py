"""The `pagebus` command: finds the command that is asked for and turns its errors into one line.

Nothing heavy is imported before a command is known, so that --help answers at once.
"""

import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pagebus.cli.errors import CommandError, ExitCode


class Command(NamedTuple):
    """One command: what --help says of it, and its function from arguments to exit code."""

    help: str
    run: Callable[[Sequence[str]], int]


def _serve(arguments: Sequence[str]) -> int:
    from pagebus.cli.serve import serve

    return serve(arguments)


def _gateway(arguments: Sequence[str]) -> int:
    from pagebus.cli.services import gateway

    return gateway(arguments)


def _scheduler(arguments: Sequence[str]) -> int:
    from pagebus.cli.services import scheduler

    return scheduler(arguments)


def _executor(arguments: Sequence[str]) -> int:
    from pagebus.cli.services import executor

    return executor(arguments)


def _status(arguments: Sequence[str]) -> int:
    from pagebus.cli.status import status

    return status(arguments)


def _restart(arguments: Sequence[str]) -> int:
    from pagebus.cli.restart import restart

    return restart(arguments)


def _bench(arguments: Sequence[str]) -> int:
    from pagebus.cli.bench import bench

    return bench(arguments)


COMMANDS = {
    "serve": Command("everything on one machine; without MODEL the bundled one", _serve),
    "gateway": Command("one gateway on the bus at NATS_URL: HTTP and text", _gateway),
    "scheduler": Command("one scheduler on the bus at NATS_URL: batches and KV blocks", _scheduler),
    "executor": Command("one executor on the bus at NATS_URL: tensors", _executor),
    "status": Command("what runs on this machine, and where", _status),
    "restart": Command("replace every service of a running serve, one after the other", _restart),
    "bench": Command("benchmarks; pagebus bench --help lists them", _bench),
}


def usage() -> str:
    """The help of `pagebus` itself."""
    lines = [f"  {name:<11}{command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: pagebus COMMAND [arguments]",
            "",
            "Serves large language models as services on a NATS message bus.",
            "",
            *lines,
            "",
            "pagebus COMMAND --help shows a command's flags; pagebus --version the version.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code (2: wrong usage, 1: it failed, 3: the model cannot be served)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage(), file=sys.stdout if words else sys.stderr)
        return ExitCode.OK if words else ExitCode.USAGE
    if words[0] in ("-V", "--version", "version"):
        print(f"pagebus {_version()}")
        return ExitCode.OK
    command = COMMANDS.get(words[0])
    if command is None:
        print(f"pagebus: {words[0]!r} is no command; pagebus --help lists them", file=sys.stderr)
        return ExitCode.USAGE
    try:
        return int(command.run(words[1:]))
    except CommandError as error:
        if error.sentence:
            print(f"pagebus {words[0]}: {error.sentence}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        return ExitCode.FAILED


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("pagebus")
    except PackageNotFoundError:
        return "(not installed)"
