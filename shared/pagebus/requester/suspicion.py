"""Whether a request may have killed an executor: what its owner passes on with the next attempt. Pure."""

from pagebus.bus.messages import Failed

HARMLESS_IDS = 34
"""Who made so many ids since an executor died with it (the longest lease, and two) is beyond doubt."""
_DEATHS_OF_A_SUSPECT = 2
"""One death proves nothing: executors are killed and restarted. Two, and no lease between, ask for a test."""


class Suspicion:
    """Facts of the schedulers about one request; they forget them with each attempt, its owner does not."""

    def __init__(self) -> None:
        self.is_any = False  # whether anything is remembered
        self.num_deaths = 0  # of executors that had it as their only suspect
        self._num_aboard = 0  # deaths of executors that ran it, since it last got on
        self._num_ids = 0

    @property
    def is_suspect(self) -> bool:
        """Whether it is to be tried alone."""
        return self._num_aboard >= _DEATHS_OF_A_SUSPECT

    def note_failure(self, failed: Failed) -> None:
        """An attempt ended, perhaps with its executor."""
        self._num_ids = 0
        self.is_any = self.is_any or failed.is_suspect or failed.was_sole_suspect
        self._num_aboard += failed.is_suspect
        self.num_deaths += failed.was_sole_suspect

    def clear(self) -> None:
        """It had nothing to do with what happened."""
        self._num_aboard = self.num_deaths = 0
        self.is_any = False

    def note_ids(self, num_ids: int) -> None:
        """The request got on: what kills does so at the same id again, so deaths before it prove nothing."""
        self.num_deaths = 0
        if self._num_aboard:
            self._num_ids += num_ids
            if self._num_ids >= HARMLESS_IDS:
                self.clear()
