"""A step from its launch to what it did to its rows. Knows neither plans nor the runner."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pagebus.executor.batch import BlockCopy, RowInput, RowOutput
from pagebus.executor.reports import RowFailure, RowResult
from pagebus.executor.rows import Row


@dataclass(slots=True, eq=False)
class LaunchedStep:
    """A step being computed: `inputs[i]` belongs to `rows[i]`; `plan` was the last one at its launch.

    `copies` of blocks come first.
    """

    epoch: int
    plan: int
    rows: list[Row]
    inputs: list[RowInput]
    copies: list[BlockCopy]
    makes_history: bool = False  # the host must know an id that it makes before the row's next step

    def add(self, row: Row, row_input: RowInput) -> None:
        """One row more. From here on the row counts these positions as launched."""
        row.launch(len(row_input.ids), len(self.rows), is_sampled=row_input.is_sampled)
        self.rows.append(row)
        self.inputs.append(row_input)
        self.makes_history |= row_input.is_sampled and row.history is not None


@dataclass(slots=True)
class Landed:
    """What a step did."""

    results: list[RowResult]
    failures: list[RowFailure]


def land(step: LaunchedStep, outputs: Sequence[RowOutput]) -> Landed:
    """Bring the rows up to what the step made of them. Rows that are over stay as they were: an id that was
    made after the end of a row, before that end was known, is dropped here."""
    landed = Landed([], [])
    for row, row_input, output in zip(step.rows, step.inputs, outputs, strict=True):
        if row.is_over:
            continue
        made = output.id if row_input.is_sampled else None
        error = output.error
        if error is None and row_input.is_sampled and (made is None or not 0 <= made < 1 << 31):
            error = f"the model made {made} as an id"
        if error is not None:
            row.error = error
            landed.failures.append(RowFailure(row, error, "row_failed", is_retryable=False))
            continue
        row.advance(len(row_input.ids), made)
        prompt = output.prompt_logprobs
        told = None if prompt is None else (row_input.start + 1, prompt)
        landed.results.append(RowResult(row, made, output.logprobs, told))
    return landed


def crash(step: LaunchedStep, message: str) -> Landed:
    """The step could not be computed: its rows fail, requesters may ask again."""
    landed = Landed([], [])
    for row in step.rows:
        if not row.is_over:
            row.error = message
            landed.failures.append(RowFailure(row, message, "step_failed", is_retryable=True))
    return landed


def known_inputs(step: LaunchedStep) -> list[tuple[int, RowInput]]:
    """Of the rows that are not over: their number in the step and their input, from ids that are known.

    Everything launched before the step must have been collected.
    """
    known = []
    for number, (row, row_input) in enumerate(zip(step.rows, step.inputs, strict=True)):
        if row.is_over:
            continue
        if row_input.follows is not None and row.last_id is not None:
            known.append((number, replace(row_input, ids=(row.last_id,), follows=None)))
        else:
            known.append((number, row_input))
    return known
