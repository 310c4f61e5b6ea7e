"""`pagebus status`: what runs on this machine, and where; `--json` for programs."""

import argparse
import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict
from urllib.parse import urlsplit

from pagebus.cli import status_file
from pagebus.cli.errors import CommandError, ExitCode
from pagebus.cli.ready import ask


def status(arguments: Sequence[str]) -> int:
    """Show every running `pagebus serve` of this user; exit code 1 when there is none, or none is ready."""
    parser = argparse.ArgumentParser(prog="pagebus status", description=__doc__, allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="one JSON list, NATS password included")
    parser.add_argument("--port", type=int, help="only the server on this port")
    try:
        given = parser.parse_args(list(arguments))
    except SystemExit as ended:
        return int(ended.code or 0)
    found = status_file.read_all(status_file.runtime_dir())
    if given.port is not None:
        found = [one for one in found if urlsplit(one.url).port == given.port]
    if not found and not given.json:
        raise CommandError("no pagebus serve of this user is running here")
    ready = asyncio.run(_ready([one.url for one in found]))
    if given.json:
        rows = [asdict(one) | {"is_ready": is_ready} for one, is_ready in zip(found, ready, strict=True)]
        print(json.dumps(rows, indent=2))
    else:
        for one, is_ready in zip(found, ready, strict=True):
            state = "ready" if is_ready else "not ready"
            print(
                f"{one.url}  {state}  model {one.model}  KV cache {one.num_kv_tokens:,} tokens"
                f"  pid {one.pid}  {one.nats_url}"
            )
    return ExitCode.OK if any(ready) else ExitCode.FAILED


async def _ready(urls: Sequence[str]) -> list[bool]:
    parts = [urlsplit(url) for url in urls]
    answers = await asyncio.gather(*(ask(part.hostname or "", part.port or 80) for part in parts))
    return [answer.status == 200 for answer in answers]
