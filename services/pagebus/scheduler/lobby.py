"""Rows that do not run: in the queue, held back for a sibling choice, or, as suspects, for other suspects."""

from pagebus.scheduler.requests import Request, Row, RowState
from pagebus.scheduler.suspects import SuspectQueue
from pagebus.scheduler.waiting import WaitingQueue

_HELD = (RowState.HELD, RowState.RETURNING)


class Lobby:
    """Where rows wait. A row that waits and has no ticket is held back.

    Of a request that computes its prompt anew only one choice is in the queue: once it is done, the others
    start with its blocks.
    """

    def __init__(self, queue: WaitingQueue) -> None:
        self.queue = queue
        self.suspects = SuspectQueue()
        self._num_held = 0

    @property
    def num_rows(self) -> int:
        """All rows that wait."""
        return len(self.queue) + self._num_held

    def enter(self, request: Request) -> None:
        """A new request, whose rows are all held, waits for its turn."""
        self._num_held += len(request.rows)
        if request.is_suspect:
            self.suspects.add(request)
        else:
            self._enqueue(request.rows[0])

    def release_suspects(self, num_free: int) -> None:
        """Suspects come back one at a time: as many are on their way as executors (`num_free`) have none."""
        num_free -= sum(row.request.is_suspect for row in self.queue)
        while num_free > 0 and (request := self.suspects.take()) is not None:
            self._enqueue(request.rows[0])
            num_free -= 1

    def release_siblings(self, request: Request) -> None:
        """The choices that waited for another one's prefill wait for their turn from now on."""
        if self._num_held == 0 or request.is_held_back:
            return
        for row in request.rows:
            if row.ticket == 0 and row.state in _HELD:
                self._enqueue(row)

    def come_back(self, rows: list[Row]) -> None:
        """Rows were preempted: one of each request waits for its turn, the others for it."""
        self._num_held += len(rows)
        for request in {row.request: None for row in rows}:
            if any(row.state is RowState.RUNNING for row in request.rows):
                self.release_siblings(request)
            elif not any(row.ticket for row in request.rows):
                self._enqueue(next(row for row in request.rows if row.state in _HELD))

    def leave(self, row: Row) -> None:
        """A row that waits, in the queue or held back, does so no longer."""
        if row.ticket:
            self.queue.remove(row)
        else:
            self._num_held -= 1

    def _enqueue(self, row: Row) -> None:
        if row.state is RowState.HELD:
            row.state = RowState.WAITING
        self._num_held -= 1
        self.queue.add(row)
