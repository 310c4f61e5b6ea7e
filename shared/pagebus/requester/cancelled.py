"""Requests of which somebody was told that nobody wants them. Pure."""

from collections import OrderedDict

_AGAIN_S = 1.0
_MAX_REMEMBERED = 4096


class Cancelled:
    """When each was last said to be cancelled, as far back as matters."""

    def __init__(self) -> None:
        self._at_s: OrderedDict[str, float] = OrderedDict()

    def note(self, request_id: str, now_s: float) -> None:
        """It is said now."""
        self._at_s[request_id] = now_s
        self._at_s.move_to_end(request_id)
        if len(self._at_s) > _MAX_REMEMBERED:
            self._at_s.popitem(last=False)

    def is_due(self, request_id: str, now_s: float) -> bool:
        """Whether it may be said (again): once a second and id at most."""
        return now_s - self._at_s.get(request_id, float("-inf")) >= _AGAIN_S
