"""`pagebus restart`: replaces every process of a running `pagebus serve` in turn, without a pause."""

import argparse
import contextlib
import json
import os
import secrets
import signal
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

from pagebus.cli import status_file
from pagebus.cli.errors import CommandError, ExitCode
from pagebus.cli.restarting import Answer, Request, answer_file, read_answer, request_file, write_file

_ANSWER_TIMEOUT_S = 10.0
_POLL_S = 0.1


def restart(arguments: Sequence[str]) -> int:
    """Ask a launcher of this user for a rolling restart, and wait; exit code 1 when it failed."""
    parser = argparse.ArgumentParser(prog="pagebus restart", description=__doc__, allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="one JSON object at the end")
    parser.add_argument("--port", type=int, help="the server on this port, where several run")
    parser.add_argument(
        "--overlap",
        action=argparse.BooleanOptionalAction,
        help="start a new executor before the old one ends (default: unless they would share a GPU)",
    )
    try:
        given = parser.parse_args(list(arguments))
    except SystemExit as ended:
        return int(ended.code or 0)
    status = _find(given.port)
    request = Request(secrets.token_hex(8), given.overlap)
    began_s = time.monotonic()
    answer = _ask(status, request, is_quiet=given.json)
    took_s = time.monotonic() - began_s
    if given.json:
        report = {"url": status.url, "state": answer.state, "steps": answer.steps, "fault": answer.fault}
        print(json.dumps(report | {"seconds": round(took_s, 1)}))
    elif answer.state == "done":
        print(f"{status.url}: every service was replaced, in {took_s:.1f} s")
    if answer.state == "failed":
        raise CommandError("" if given.json else answer.fault)
    return ExitCode.OK


def _find(port: int | None) -> status_file.Status:
    found = status_file.read_all(status_file.runtime_dir())
    if port is not None:
        found = [one for one in found if urlsplit(one.url).port == port]
    if not found:
        raise CommandError("no pagebus serve of this user is running here, or it is not ready yet")
    if len(found) > 1:
        ports = ", ".join(str(urlsplit(one.url).port) for one in found)
        raise CommandError(f"several are running; name one with --port: {ports}", ExitCode.USAGE)
    return found[0]


def _ask(status: status_file.Status, request: Request, *, is_quiet: bool) -> Answer:
    """Signal the launcher and follow its answer until the end. Raises `CommandError`."""
    directory, port = status_file.runtime_dir(), urlsplit(status.url).port or 0
    target = answer_file(directory, port)
    try:
        write_file(request_file(directory, port), request)
        os.kill(status.pid, signal.SIGUSR1)
    except OSError as error:
        raise CommandError(f"the launcher (pid {status.pid}) cannot be asked: {error.strerror}") from None
    num_told, asked_s = 0, time.monotonic()
    has_begun = False
    while True:
        time.sleep(_POLL_S)
        answer = read_answer(target)
        if answer is not None and answer.id == request.id:
            has_begun = True
            for step in answer.steps[num_told:] if not is_quiet else ():
                print(step, flush=True)
            num_told = len(answer.steps)
            if answer.state != "running":
                return answer
        if not _is_alive(status.pid):
            raise CommandError(f"the launcher (pid {status.pid}) ended")
        is_busy = answer is not None and answer.state == "running"  # with another one's restart
        if not has_begun and not is_busy and time.monotonic() - asked_s > _ANSWER_TIMEOUT_S:
            raise CommandError(f"the launcher (pid {status.pid}) does not answer")


def _is_alive(pid: int) -> bool:
    with contextlib.suppress(PermissionError):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
    return True
