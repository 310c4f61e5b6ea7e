"""What was sent lately that nothing follows: last tokens and failures. Sent again after a reconnect.

What is under way when a connection breaks is lost. Whoever waits for more tokens sees the gap with the next
one; after an ending there is none, and its requester would wait for its long silence. It drops what it has.
Knows no bus.
"""

from collections import deque

from pagebus.bus.messages import Failed, Message, Tokens

KEPT_S = 5.0
"""Longer than a broken connection goes unnoticed: three pings of a second."""
MAX_KEPT = 1000


class Endings:
    """The newest endings, each with the time at which it was first sent."""

    def __init__(self) -> None:
        self._kept: deque[tuple[float, str, Message]] = deque(maxlen=MAX_KEPT)

    def note(self, subject: str, message: Message, now_s: float) -> None:
        """A message is sent, or could not be; keep it if it ends something."""
        match message:
            case Tokens(rows=rows) if any(row.finish_reason is not None for row in rows):
                self._kept.append((now_s, subject, message))
            case Failed():
                self._kept.append((now_s, subject, message))
            case _:
                pass

    def forget(self, now_s: float) -> None:
        """The bus is there: what was sent some time ago has arrived. Call it now and then."""
        while self._kept and now_s - self._kept[0][0] > KEPT_S:
            self._kept.popleft()

    @property
    def kept(self) -> list[tuple[str, Message]]:
        """What to send again now that the bus is back, in order."""
        return [(subject, message) for _, subject, message in self._kept]
