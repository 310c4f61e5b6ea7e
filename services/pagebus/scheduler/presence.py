"""Who is here: what a `Hello` must look like, executors that still load, and those that said that they leave.

Pure.
"""

from array import array

from pagebus.bus import subjects
from pagebus.bus.messages import DecodeError, Hello, unpack_handles

LOADING_SILENCE_S = 3.0
"""One that loads says so each second."""
LATE_S = 2.0
"""A word of an executor that left may arrive after its last one."""


def sound_handles(hello: Hello) -> "array[int] | None":
    """The handles of a `Hello` that can be true, or None. One that loads or leaves needs no pool."""
    if not subjects.is_part(hello.executor):
        return None
    try:
        handles = unpack_handles(hello.handles)
    except DecodeError:
        return None
    if hello.state in ("loading", "left"):
        return handles
    is_sound = (
        bool(hello.pool)
        and all(
            group.num_blocks > 0 and group.block_size > 0 and (group.window is None or group.window > 0)
            for group in hello.pool
        )
        and len({group.block_size for group in hello.pool}) == 1
    )
    return handles if is_sound and hello.max_num_seqs >= 1 and hello.max_model_len >= 1 else None


class Presence:
    """What `Hello`s tell of executors that take no rows, by name."""

    def __init__(self) -> None:
        self._loading_s: dict[str, float] = {}  # when it was heard last
        self._left_s: dict[str, float] = {}

    def is_here(self, hello: Hello, now_s: float) -> bool:
        """Note what a `Hello` says of its sender's state: whether rows may run there."""
        name = hello.executor
        if hello.state == "loading":
            self._loading_s[name] = now_s
            return False
        self._loading_s.pop(name, None)
        if hello.state == "left":
            self._left_s[name] = now_s
            return False
        # A new process of the same name has obeyed nobody yet.
        is_late = hello.epoch > 0 and now_s - self._left_s.get(name, float("-inf")) < LATE_S
        if not is_late:
            self._left_s.pop(name, None)
        return not is_late

    def num_loading(self, now_s: float) -> int:
        """How many load now; what is long past is forgotten."""
        self._loading_s = {
            name: heard_s for name, heard_s in self._loading_s.items() if now_s - heard_s < LOADING_SILENCE_S
        }
        self._left_s = {name: left_s for name, left_s in self._left_s.items() if now_s - left_s < LATE_S}
        return len(self._loading_s)
