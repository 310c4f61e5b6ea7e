"""Decoding steps of a ladder of batch sizes, each captured once and launched as a whole. Knows no model.

A step of n rows runs the smallest size that holds them, the rest of its rows being padding. Sizes lie close,
so that little is computed for nothing; all of them share memory, which the largest, captured first, takes.
"""

import logging
import time
from collections.abc import Callable

from pagebus.executor.device import Device, Work
from pagebus.executor.progress import Progress

_log = logging.getLogger(__name__)

_SMALL = (1, 2, 4)
_STEP, _WIDE_STEP, _WIDE = 8, 32, 256


def ladder(most: int) -> list[int]:
    """1, 2, 4, 8, 16, 24, ... 256, 288, ...: up to the first that is not below `most`."""
    sizes = list(_SMALL)
    while sizes[-1] < most:
        sizes.append(
            sizes[-1] + (_STEP if sizes[-1] < _WIDE else _WIDE_STEP) if sizes[-1] >= _STEP else _STEP
        )
    return [size for size in sizes if size < most or size == min(s for s in sizes if s >= most)]


class DecodeGraphs:
    """`run(size)` for every size of the ladder."""

    def __init__(
        self,
        device: Device,
        work_of: Callable[[int], Work],  # of a size: the step over static tensors
        most: int,  # rows
        *,
        beat: Callable[[], None],  # told after each size
    ) -> None:
        self._device = device
        self._sizes = ladder(most)
        self._works = {size: work_of(size) for size in self._sizes}
        self._beat = beat
        self.num_captured = 0

    @property
    def most(self) -> int:
        """Rows of the largest step."""
        return self._sizes[-1]

    def size_for(self, num_rows: int) -> int:
        """The size that a step of so many rows runs in."""
        return next(size for size in self._sizes if size >= num_rows)

    def run(self, size: int) -> None:
        """Launch the step of `size` rows."""
        self._works[size]()

    def capture(self) -> None:
        """Replace each work by its graph, the largest first. Rows must be padding: every work runs once.

        A model with work that no graph can hold (it waits for the device to know what to do) stays as it is.
        """
        began_s = time.monotonic()
        captured = dict[int, Work]()
        for size in Progress(self._sizes[::-1], "capturing CUDA graphs"):
            work = self._works[size]
            self._device.warm_up(work)
            self._beat()
            try:
                captured[size] = self._device.capture(work)
            except RuntimeError as error:
                cause = error.__context__ or error  # the end of a broken capture raises once more
                reason = (str(cause).splitlines() or [type(cause).__name__])[0]
                _log.warning("decoding runs without CUDA graphs, and slowly: %s", reason)
                return
            self._beat()
        self._works = captured
        self.num_captured = len(captured)
        _log.info(
            "captured CUDA graphs for %d batch sizes up to %d in %.1f s",
            len(captured), self._sizes[-1], time.monotonic() - began_s,
        )  # fmt: skip
