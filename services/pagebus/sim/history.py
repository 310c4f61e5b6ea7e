"""What happened in a run: a digest of every message, and, where it is asked for, lines for a person."""

import contextlib
import hashlib
from collections import Counter
from collections.abc import Callable

from pagebus.bus.messages import AnyMessage, DecodeError, Failed, Generate, Heartbeat, Hello, Rejected, decode
from pagebus.bus.protocol import Msg

_COUNTED = (".generate", ".heartbeat")  # subjects of messages that are looked at in every run


class History:
    """Counts by kind, the digest, and lines."""

    def __init__(self, clock: Callable[[], float], *, is_told: bool = False) -> None:
        self.counts: Counter[str] = Counter()
        self._clock = clock
        self._is_told = is_told
        self._digest = hashlib.blake2b(digest_size=16)
        self._leader = 0
        self.num_attempts = self.num_terms = 0

    @property
    def digest(self) -> str:
        """Of all messages so far: who sent what, where and when."""
        return self._digest.hexdigest()

    def note(self, kind: str, text: str) -> None:
        """Something other than a message."""
        self.counts[kind] += 1
        self.say(f"{kind}: {text}")

    def say(self, line: str) -> None:
        """For a person."""
        if self._is_told:
            print(f"{self._clock():9.4f}  {line}")

    def take(self, sender: str, message: Msg) -> None:
        """A message was sent."""
        self._digest.update(f"{self._clock():.6f} {sender} {message.subject} {message.reply} ".encode())
        self._digest.update(message.data)
        if message.data and (self._is_told or message.subject.endswith(_COUNTED)):
            with contextlib.suppress(DecodeError):  # a probe's answer
                self._tell(sender, decode(message.data))

    def _tell(self, sender: str, message: AnyMessage) -> None:
        self.num_attempts += isinstance(message, Generate)
        match message:
            case Generate() if message.attempt > 1:
                received = [len(choice.ids) // 4 for choice in message.choices]
                self.say(
                    f"{sender} asks again for {message.request_id}: attempt {message.attempt}, {received}"
                )
            case Failed():
                self.say(f"{sender} failed {message.request_id}.{message.attempt}: {message.message}")
            case Rejected():
                self.say(f"{sender} rejects {message.request_id}: {message.code}")
            case Heartbeat() if message.epoch > self._leader:
                self._leader = message.epoch
                self.num_terms += 1
                self.say(f"{sender} leads with epoch {message.epoch}")
            case Hello() if message.state != "serving":
                self.say(f"{sender} says that it is {message.state}")
            case _:
                pass
