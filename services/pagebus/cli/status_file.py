"""The file of mode 0600 in which a running `pagebus serve` tells tools where everything is."""

import contextlib
import json
import os
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Status:
    """What a running `pagebus serve` says of itself."""

    pid: int
    version: str
    model: str
    url: str  # HTTP
    nats_url: str  # with the restricted client user's password, unless the bus is the user's own
    num_kv_tokens: int
    max_model_len: int
    executors: int
    gateways: int
    schedulers: int


def runtime_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """`$XDG_RUNTIME_DIR/pagebus`, else `~/.cache/pagebus`, else a folder of this user's in /tmp."""
    given = environ.get("XDG_RUNTIME_DIR", "")
    if given and os.access(given, os.W_OK):
        return Path(given) / "pagebus"
    home = Path(environ.get("HOME") or "/nonexistent")
    if os.access(home, os.W_OK):
        return home / ".cache" / "pagebus"
    return Path(tempfile.gettempdir()) / f"pagebus-{os.getuid()}"


def write(directory: Path, port: int, status: Status) -> Path:
    """Write it whole or not at all, readable by this user only; its path. Raises `OSError`."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    owner = directory.lstat()
    if owner.st_uid != os.getuid() or not stat.S_ISDIR(owner.st_mode):
        raise PermissionError(f"{directory} belongs to somebody else")
    target = directory / f"serve-{port}.json"
    descriptor, name = tempfile.mkstemp(dir=directory, prefix=".serve-")  # mode 0600
    with os.fdopen(descriptor, "w", encoding="utf-8") as opened:
        json.dump(asdict(status), opened, indent=2)
        opened.write("\n")
    os.replace(name, target)
    return target


def read_all(directory: Path) -> list[Status]:
    """Every `pagebus serve` of this user that is alive, by port; files of dead ones are passed over."""
    found = []
    for file in sorted(directory.glob("serve-*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError):
            status = Status(**json.loads(file.read_text("utf-8")))
            if _is_alive(status.pid):
                found.append(status)
    return found


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
