"""Load, as heartbeats tell it."""

from collections.abc import Iterable
from typing import NamedTuple

from pagebus.scheduler.book import RequestBook
from pagebus.scheduler.executors import ExecutorState


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


def figures_of(executors: Iterable[ExecutorState], book: RequestBook) -> Figures:
    """What heartbeats say of this state."""
    live = [executor for executor in executors if not executor.is_lost]
    return Figures(
        num_running=sum(len(executor.rows) for executor in live),
        num_waiting=book.lobby.num_rows,
        num_executors=len(live),
        num_blocks=sum(executor.kv.main.num_blocks for executor in live),
        num_free_blocks=sum(executor.kv.main.num_free for executor in live),
        block_size=live[0].kv.groups[0].block_size if live else 16,
        max_model_len=book.max_model_len,
        full_model_len=min((executor.full_len for executor in live), default=0),
        num_prefix_queries=book.num_prefix_queries,
        num_prefix_hits=book.num_prefix_hits,
        num_preemptions=book.num_preemptions,
    )
