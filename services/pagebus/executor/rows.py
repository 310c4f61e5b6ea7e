"""One row as the executor holds it: how far it is, where its KV lies, why it ended. Knows no bus."""

from array import array
from collections.abc import Sequence

from pagebus.bus.messages import FinishReason, Logprobs, TokenRow
from pagebus.executor.batch import RowInput
from pagebus.executor.parsed import ParsedChunk, ParsedStart


def flaw_of(parsed: ParsedStart, max_model_len: int) -> str | None:
    """Why no row can be made from `parsed`, or None."""
    start = parsed.start
    if start.num_ids > max_model_len:
        return f"{start.num_ids} ids are more than the model's {max_model_len} positions"
    if start.num_ids < 1:
        return f"a row of {start.num_ids} ids"
    if not 0 <= start.num_generated < start.max_tokens:
        return f"{start.num_generated} ids made of at most {start.max_tokens}"
    if start.num_generated >= start.num_ids:
        return f"{start.num_generated} of {start.num_ids} ids are generated ones"
    if not 0 <= start.num_cached < start.num_ids:
        return f"{start.num_cached} of {start.num_ids} positions are cached"
    if start.sampling.needs_history and len(parsed.all_ids) != start.num_ids:
        return f"{len(parsed.all_ids)} of {start.num_ids} ids came where all are needed"
    if not 0 <= start.choice < 1 << 31:
        return f"choice {start.choice}"
    return None


class Row:
    """A row's progress. It alone guards that positions are computed once and in order.

    ```
    ids        | prompt and received ones (num_ids) | made 1 | made 2 = last_id |
    position    computed: KV written ...........................^ next to compute
    ```
    """

    __slots__ = (
        "banned_ids",
        "block_size",
        "error",
        "finish_reason",
        "history",
        "last_id",
        "num_generated",
        "num_prompt",
        "position",
        "start",
        "stop_ids",
        "tables",
    )

    def __init__(self, parsed: ParsedStart, *, num_groups: int, block_size: int) -> None:
        start = parsed.start
        self.start = start
        self.block_size = block_size
        self.position = start.num_cached
        self.num_generated = start.num_generated
        self.num_prompt = start.num_ids - start.num_generated
        self.last_id: int | None = None
        self.stop_ids = parsed.stop_ids
        self.banned_ids = tuple(sorted(parsed.stop_ids)) if start.min_tokens > 0 else ()
        self.history: array[int] | None = parsed.all_ids if start.sampling.needs_history else None
        self.tables: list[array[int]] = [array("i") for _ in range(num_groups)]
        self.finish_reason: FinishReason | None = None
        self.error: str | None = None

    @property
    def is_over(self) -> bool:
        """Finished or failed: it is skipped from now on, and stays until a plan releases it."""
        return self.finish_reason is not None or self.error is not None

    def grant(self, group: int, offset: int, blocks: "array[int]") -> str | None:
        """Put `blocks` into a group's table from `offset` on; or, changing nothing, say why that is wrong.

        Blocks below the row's position hold its KV, so they can be given up (-1) but never replaced.
        The table is a new array each time: a runner may still look at the old one.
        """
        table = self.tables[group]
        num_written = min(-(-self.position // self.block_size), len(table))
        for entry in range(offset, min(offset + len(blocks), num_written)):
            if blocks[entry - offset] not in (table[entry], -1):
                return f"block {table[entry]} of group {group} was replaced under computed positions"
        if offset > len(table):
            table = table + array("i", [-1]) * (offset - len(table))
        self.tables[group] = table[:offset] + blocks + table[offset + len(blocks) :]
        return None

    def has_slots(self, end: int) -> bool:
        """Whether every table holds blocks for the positions from the row's own to `end`."""
        first, last = self.position // self.block_size, (end - 1) // self.block_size
        for table in self.tables:
            if last >= len(table):
                return False
            if table[last] < 0 or (first != last and min(table[first:last]) < 0):
                return False
        return True

    def prefill_input(self, chunk: ParsedChunk, prompt: ParsedChunk) -> RowInput | None:
        """As many positions as `chunk` has, from the row's own position on, or None.

        `prompt` is all that the lease brings of the row. A chunk that was computed before the plan came is so
        made up for by the next one. The chunk must not start beyond the row's position.
        """
        if self.is_over:
            return None
        end = min(self.position + chunk.end - chunk.start, prompt.end)
        if end <= self.position or not self.has_slots(end):
            end = chunk.end
            if end <= self.position or not self.has_slots(end):
                return None
        source = prompt if end <= prompt.end else chunk
        ids = source.ids[self.position - source.start : end - source.start]
        return self._input(ids, is_sampled=end == self.start.num_ids)

    def decode_input(self) -> RowInput | None:
        """The row's last id as the next position, or None where the row cannot decode now."""
        if self.last_id is None or self.is_over or not self.has_slots(self.position + 1):
            return None
        return self._input((self.last_id,), is_sampled=True)

    def _input(self, ids: Sequence[int], *, is_sampled: bool) -> RowInput:
        return RowInput(
            ids=ids,
            start=self.position,
            tables=self.tables,
            sampling=self.start.sampling,
            choice=self.start.choice,
            index=self.num_generated,
            is_sampled=is_sampled,
            num_prompt=self.num_prompt,
            history=() if self.history is None else self.history,
            banned_ids=self.banned_ids if self.num_generated < self.start.min_tokens else (),
        )

    def advance(self, num_computed: int, made: int | None) -> None:
        """`num_computed` more positions have their KV; decide whether the id made, if any, ends the row."""
        self.position += num_computed
        if made is None:
            return
        self.last_id = made
        self.num_generated += 1
        if self.history is not None:
            self.history.append(made)
        if made in self.stop_ids and self.num_generated >= self.start.min_tokens:
            self.finish_reason = "stop"
        elif self.num_generated >= self.start.max_tokens:
            self.finish_reason = "length"

    def token_row(self, packed_id: bytes, logprobs: Logprobs | None) -> TokenRow:
        """What the requester is told of the one id (int32) just made."""
        is_first = self.num_generated == self.start.num_generated + 1
        return TokenRow(
            request_id=self.start.request_id,
            attempt=self.start.attempt,
            choice=self.start.choice,
            index=self.num_generated - 1,
            ids=packed_id,
            finish_reason=self.finish_reason,
            logprobs=logprobs,
            num_cached=self.start.num_cached if is_first else None,
        )
