"""One choice of a request, as its owner has it: the ids received, which of them were told, how it ended.

Pure; knows neither attempts nor leaders.
"""

import sys
from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from pagebus.bus.messages import ChoiceState, FinishReason, pack_ids, unpack_ids
from pagebus.requester.events import NewTokens, RequestSpec

_IS_LITTLE = sys.byteorder == "little"
_ID_BYTES = 4


@dataclass(slots=True)
class Choice:
    """The ids received. Those from `num_told` on wait to be told (`news`)."""

    ids: "array[int]"
    finish_reason: FinishReason | None = None
    is_unwanted: bool = False  # its owner ended it
    num_told: int = 0

    def append_packed(self, packed: bytes) -> bool:
        """Take packed ids in; False for none, or a broken length."""
        if not packed or len(packed) % _ID_BYTES:
            return False
        if _IS_LITTLE:
            self.ids.frombytes(packed)
        else:
            self.ids.extend(unpack_ids(packed))
        return True

    def take_packed(self, index: int, packed: bytes, is_told: bool) -> bool:
        """Take packed ids in that begin at `index`; False, and nothing taken, where they are not simply the
        next ids of an open choice that its owner wants. `is_told`: nothing of it waits to be told."""
        ids = self.ids
        if index != len(ids) or self.finish_reason is not None or self.is_unwanted:
            return False
        if (is_told and index != self.num_told) or not self.append_packed(packed):
            return False
        if is_told:
            self.num_told = len(ids)
        return True

    def news(self, index: int, at_least: int) -> NewTokens | None:
        """What was not told yet of choice number `index`, where it is at least so many ids, or the first."""
        start, num_new = self.num_told, len(self.ids) - self.num_told
        if self.is_unwanted or num_new < (at_least if start else 1):
            return None
        self.num_told = len(self.ids)
        return NewTokens(index, start, self.ids[start:])

    def own_finish_reason(self, spec: RequestSpec, stop_ids: Collection[int]) -> FinishReason | None:
        """How the ids themselves say that it ended."""
        if not self.ids:
            return None
        if len(self.ids) >= spec.min_tokens and self.ids[-1] in stop_ids:
            return "stop"
        return "length" if len(self.ids) >= spec.max_tokens else None


def asked_choices(choices: Sequence[Choice], is_prompt_wanted_only: bool) -> tuple[ChoiceState, ...]:
    """What is told of the choices to whom they are asked of. One that has ended gets no row: its ids are
    nobody's business any more.

    Where only the prompt's log-probabilities are missing, one choice makes its last id once more, since they
    come with a row.
    """
    states = [
        ChoiceState(index=index, finish_reason=choice.finish_reason)
        if choice.finish_reason is not None
        else ChoiceState(index=index, ids=pack_ids(choice.ids))
        for index, choice in enumerate(choices)
    ]
    if is_prompt_wanted_only:
        states[0] = ChoiceState(index=0, ids=pack_ids(choices[0].ids[:-1]))
    return tuple(states)
