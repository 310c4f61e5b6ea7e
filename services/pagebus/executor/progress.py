"""How far loading is: a bar on a terminal, log lines elsewhere. Knows neither models nor files."""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Generic, TextIO, TypeVar

import transformers

_log = logging.getLogger(__name__)

_WIDTH = 30
_BAR_EVERY_S = 0.1
_LOG_EVERY_S = 5.0

Item = TypeVar("Item")


class Progress(Generic[Item]):
    """Iterates over `items` and tells on `stream`, if that is a terminal, else in the log, how far it is."""

    def __init__(
        self,
        items: Iterable[Item],
        what: str,
        *,
        num_items: int | None = None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._items = items
        self._what = what
        self._num_items = len(items) if num_items is None and isinstance(items, Sized) else num_items or 0
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock

    def __iter__(self) -> Iterator[Item]:
        is_terminal = self._stream.isatty()
        every_s = _BAR_EVERY_S if is_terminal else _LOG_EVERY_S
        began_s = told_s = self._clock()
        done = 0
        for item in self._items:
            yield item
            done += 1
            now_s = self._clock()
            if now_s - told_s >= every_s:
                told_s = now_s
                if is_terminal:
                    self._draw(done)
                else:
                    _log.info("%s: %d of %d", self._what, done, self._num_items)
        if is_terminal:
            self._draw(done)
            self._stream.write("\n")
            self._stream.flush()
        _log.info("%s: %d in %.1f s", self._what, done, self._clock() - began_s)

    def _draw(self, done: int) -> None:
        total = max(self._num_items, done, 1)
        filled = _WIDTH * done // total
        bar = "#" * filled + "-" * (_WIDTH - filled)
        self._stream.write(f"\r{self._what} [{bar}] {100 * done // total:3d} % ({done}/{total})")
        self._stream.flush()


@contextmanager
def showing_transformers(what: str) -> Iterator[None]:
    """Within the block, transformers' own loading is shown by `Progress`."""

    def instead(
        factory: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]
    ) -> object:
        match args, kwargs:
            case ([Iterable() as items], {"desc": "Loading weights"}):
                return Progress(items, what)
        return factory(*args, **kwargs)

    previous = transformers.utils.logging.set_tqdm_hook(instead)
    try:
        yield
    finally:
        transformers.utils.logging.set_tqdm_hook(previous)
