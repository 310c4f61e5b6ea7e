"""Faults of the fake model that chaos tests ask for through the environment; without it there are none.

```
PAGEBUS_FAKE_STEP_S=0.005           each step takes so long
PAGEBUS_FAKE_POISON=600=exit,601=hang:5   who computes this id of a prompt does so, each time
PAGEBUS_FAKE_TROUBLE=/path/file     once this file is there, the next step takes it away and does what it says
```

`exit` ends the process at once, `raise` and `memory` raise from the step, `hang` never returns, `hang:5` not
for 5 s. The fake model makes ids below 512 only: a poison id from there on comes from prompts alone.
"""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from pagebus.executor.batch import RowInput, RowOutput
from pagebus.executor.fake import FakeRunner

STEP_VARIABLE = "PAGEBUS_FAKE_STEP_S"
POISON_VARIABLE = "PAGEBUS_FAKE_POISON"
TROUBLE_VARIABLE = "PAGEBUS_FAKE_TROUBLE"

EXIT_CODE = 86
"""The exit code of a process that ended by `exit`."""
_FOR_EVER_S = 1e6


class InjectedError(RuntimeError):
    """A step failed because a test wanted it to."""


def do(fault: str) -> None:
    """What a fault's name says; raises `ValueError` for one that does not exist."""
    name, _, seconds = fault.strip().partition(":")
    match name:
        case "exit":
            os._exit(EXIT_CODE)
        case "raise":
            raise InjectedError("a test asked for it")
        case "memory":
            raise MemoryError("a test asked for it")
        case "hang":
            time.sleep(float(seconds or _FOR_EVER_S))
        case _:
            raise ValueError(f"{fault!r} is no fault: exit, raise, memory, hang, hang:SECONDS")


def read_poison(text: str) -> dict[int, str]:
    """Faults by prompt id from `ID=FAULT,ID=FAULT`; raises `ValueError`."""
    poison = {}
    for item in filter(None, text.split(",")):
        token, _, fault = item.partition("=")
        poison[int(token)] = fault
    return poison


class FaultyRunner(FakeRunner):
    """The fake model, with a step that first looks whether a fault is due."""

    def __init__(
        self, *, max_model_len: int, step_time_s: float, poison: Mapping[int, str], trouble: Path | None
    ) -> None:
        super().__init__(max_model_len=max_model_len, step_time_s=step_time_s)
        self._poison = poison
        self._trouble = trouble

    def step(self, rows: Sequence[RowInput]) -> list[RowOutput]:
        """The model's step, unless a fault is due."""
        if self._trouble is not None:
            _take_trouble(self._trouble)
        for row in rows if self._poison else ():
            for token in self._poison.keys() & set(row.ids):
                do(self._poison[token])
        return super().step(rows)


def _take_trouble(path: Path) -> None:
    try:
        fault = path.read_text()
        path.unlink()
    except FileNotFoundError:
        return
    do(fault)


def faulty_runner(max_model_len: int, environ: Mapping[str, str]) -> FaultyRunner | None:
    """The fake model with the faults that the environment asks for, None where it asks for none.

    Raises `ValueError`."""
    if not any(environ.get(name) for name in (STEP_VARIABLE, POISON_VARIABLE, TROUBLE_VARIABLE)):
        return None
    trouble = environ.get(TROUBLE_VARIABLE, "")
    return FaultyRunner(
        max_model_len=max_model_len,
        step_time_s=float(environ.get(STEP_VARIABLE) or 0.0),
        poison=read_poison(environ.get(POISON_VARIABLE, "")),
        trouble=Path(trouble) if trouble else None,
    )
