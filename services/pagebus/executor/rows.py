"""One row as the executor holds it: how far it is, where its KV lies, why it ended. Knows no bus."""

from array import array
from collections.abc import Sequence

from pagebus.bus.messages import FinishReason, Logprobs, TokenRow
from pagebus.executor.batch import RowInput
from pagebus.executor.parsed import ParsedChunk, ParsedStart

_UNKNOWN_IDS = (0,)


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
    ids            | prompt and received ones (num_ids) | made 1 | made 2 = last_id | being made |
    position        computed and collected: KV written .............^ next to collect
    next_position   ... or launched .................................................^ next to launch
    ```

    A row may be launched before its last id is known: it *follows* the row number `source` of the launch
    directly before, which makes that id. `next_position` and `next_index` are those of a launch to come;
    `position` and `num_generated` those that were collected. A step in flight ends with all of its rows
    collected or over, so what was launched is never taken back.
    """

    __slots__ = (
        "banned_ids",
        "block_size",
        "error",
        "finish_reason",
        "history",
        "last_id",
        "next_index",
        "next_position",
        "num_generated",
        "num_prompt",
        "position",
        "source",
        "start",
        "stop_ids",
        "tables",
    )

    def __init__(self, parsed: ParsedStart, *, num_groups: int, block_size: int) -> None:
        start = parsed.start
        self.start = start
        self.block_size = block_size
        self.position = self.next_position = start.num_cached
        self.num_generated = self.next_index = start.num_generated
        self.source = -1
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

        Blocks below the row's next position hold its KV, so they can be given up (-1) but never replaced.
        The table is a new array each time: a runner may still look at the old one.
        """
        table = self.tables[group]
        num_written = min(-(-self.next_position // self.block_size), len(table))
        for entry in range(offset, min(offset + len(blocks), num_written)):
            if blocks[entry - offset] not in (table[entry], -1):
                return f"block {table[entry]} of group {group} was replaced under computed positions"
        if offset > len(table):
            table = table + array("i", [-1]) * (offset - len(table))
        self.tables[group] = table[:offset] + blocks + table[offset + len(blocks) :]
        return None

    def has_slots(self, end: int) -> bool:
        """Whether every table holds blocks for the positions from the row's next one to `end`."""
        first, last = self.next_position // self.block_size, (end - 1) // self.block_size
        for table in self.tables:
            if last >= len(table):
                return False
            if table[last] < 0 or (first != last and min(table[first:last]) < 0):
                return False
        return True

    @property
    def is_ahead(self) -> bool:
        """Whether its last id is being made: the next launch of the row follows the one before."""
        return self.next_index > self.num_generated

    @property
    def is_at_end(self) -> bool:
        """Whether it is over, or will be, whatever it makes, once what was launched is collected."""
        return self.is_over or self.next_index >= self.start.max_tokens

    def prefill_input(self, chunk: ParsedChunk, prompt: ParsedChunk) -> RowInput | None:
        """As many positions as `chunk` has, from the row's next position on, or None.

        `prompt` is all that the lease brings of the row. A chunk that was computed before the plan came is so
        made up for by the next one. The chunk must not start beyond the row's next position.
        """
        if self.is_over:
            return None
        first = self.next_position
        end = min(first + chunk.end - chunk.start, prompt.end)
        if end <= first or not self.has_slots(end):
            end = chunk.end
            if end <= first or not self.has_slots(end):
                return None
        source = prompt if end <= prompt.end else chunk
        ids = source.ids[first - source.start : end - source.start]
        return self._input(ids, None, is_sampled=end == self.start.num_ids)

    def decode_input(self) -> RowInput | None:
        """The row's last id as the next position, or None where the row cannot decode now.

        Where that id is being made, the input follows the launch directly before this one.
        """
        if self.is_at_end or not self.has_slots(self.next_position + 1):
            return None
        if self.is_ahead:
            return self._input(_UNKNOWN_IDS, self.source, is_sampled=True)
        return None if self.last_id is None else self._input((self.last_id,), None, is_sampled=True)

    def _input(self, ids: Sequence[int], follows: int | None, *, is_sampled: bool) -> RowInput:
        start, index = self.start, self.next_index
        return RowInput(
            ids,
            self.next_position,
            self.tables,
            start.sampling,
            start.choice,
            index,
            is_sampled,
            self.num_prompt,
            () if self.history is None else self.history,
            self.banned_ids if index < start.min_tokens else (),
            start.handle,
            follows,
        )

    def launch(self, num_computed: int, number: int, *, is_sampled: bool) -> None:
        """`num_computed` more positions are being computed, as row `number` of a launch."""
        self.next_position += num_computed
        if is_sampled:
            self.next_index += 1
            self.source = number

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
