"""Load, as heartbeats tell it."""

from collections.abc import Mapping
from typing import NamedTuple

from pagebus.scheduler.book import RequestBook
from pagebus.scheduler.executors import ExecutorState
from pagebus.scheduler.presence import Presence
from pagebus.scheduler.watching import Stall


class Figures(NamedTuple):
    """Over all live executors of a model group."""

    num_running: int
    num_waiting: int
    num_executors: int
    num_blocks: int
    num_free_blocks: int
    block_size: int
    max_model_len: int
    full_model_len: int  # the same before it was lowered to what the pools hold
    num_prefix_queries: int  # tokens of rows that were placed in this term
    num_prefix_hits: int  # ... whose KV was there
    num_preemptions: int  # rows, in this term
    num_loading: int = 0  # executors that load or compile
    stalled_ms: int = 0  # how long there has been work and nobody who gets on with it


class Overview:
    """A term's executors and requests, seen as one. Both are the core's own."""

    def __init__(self, executors: Mapping[str, ExecutorState], book: RequestBook) -> None:
        self._executors = executors
        self._book = book
        self._num_loading = 0
        self.presence = Presence()
        self.stall = Stall(float("-inf"))

    def note(self, now_s: float) -> None:
        """Judge anew who loads and whether anybody gets on; call it often."""
        self._num_loading = self.presence.num_loading(now_s)
        figures = self.figures
        self.stall.note(
            self._executors.values(),
            now_s,
            has_work=figures.num_running + figures.num_waiting > 0,
            is_excused=figures.num_loading > 0,
        )

    @property
    def figures(self) -> Figures:
        """What heartbeats say. An executor that drains is not counted as one: it takes nothing new."""
        book = self._book
        live = [executor for executor in self._executors.values() if not executor.is_lost]
        return Figures(
            num_running=sum(len(executor.rows) for executor in live),
            num_waiting=book.lobby.num_rows,
            num_executors=sum(executor.computing.phase != "draining" for executor in live),
            num_blocks=sum(executor.kv.main.num_blocks for executor in live),
            num_free_blocks=sum(executor.kv.main.num_free for executor in live),
            block_size=live[0].kv.groups[0].block_size if live else 16,
            max_model_len=book.max_model_len,
            full_model_len=min((executor.full_len for executor in live), default=0),
            num_prefix_queries=book.num_prefix_queries,
            num_prefix_hits=book.num_prefix_hits,
            num_preemptions=book.num_preemptions,
            num_loading=self._num_loading + sum(executor.computing.phase == "compiling" for executor in live),
            stalled_ms=int(self.stall.stalled_s * 1000),
        )
