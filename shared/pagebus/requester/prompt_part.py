"""What is told of one request's prompt: log-probabilities of each position, once and in order. Pure."""

from pagebus.bus.messages import PromptRow
from pagebus.requester.events import PromptLogprobs
from pagebus.requester.packed_logprobs import cut, is_whole, num_tokens


class PromptPart:
    """Grows from position 1 (nothing has predicted position 0), or behind what is told already, to the
    prompt's end, if that is wanted."""

    def __init__(self, num_ids: int, is_wanted: bool, num_told: int = 1) -> None:
        self._next = max(num_told, 1)
        self._end = num_ids if is_wanted else 0
        self.is_told = self._next >= self._end
        """Whether everything wanted is here."""
        self.num_asked_again = 0  # since it was last told of

    @property
    def num_told(self) -> int:
        """Positions that need not be told any more."""
        return self._next

    def is_gap(self, row: PromptRow) -> bool:
        """Whether something before the row was lost."""
        return not self.is_told and row.start > self._next

    def take(self, row: PromptRow) -> PromptLogprobs | None:
        """What is new in the row; None for what is told already, broken, or lies past a gap."""
        if self.is_told or self.is_gap(row) or not is_whole(row.logprobs):
            return None
        start = self._next
        new = cut(row.logprobs, start - row.start, self._end - row.start)
        if not num_tokens(new):
            return None
        self._next += num_tokens(new)
        self.is_told = self._next >= self._end
        self.num_asked_again = 0
        return PromptLogprobs(start, new)
