"""What each stream received and when, judged against what it must receive. Pure: knows no bus and no HTTP."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tests.chaos.specs import ExpectedChoice, StreamSpec


@dataclass
class ChoiceHistory:
    """What arrived of one choice, in the order of arrival."""

    ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    num_lost: int = 0  # indices that were passed over
    num_doubled: int = 0


class StreamHistory:
    """One stream as its reader saw it. Times are `time.monotonic()` seconds."""

    def __init__(self, spec: StreamSpec) -> None:
        self.spec = spec
        self.choices = [ChoiceHistory() for _ in range(spec.num_choices)]
        self.started_s = 0.0
        self.ended_s = 0.0
        self.num_ends = 0
        self.error = ""  # why the stream failed, if it did
        self.error_code = ""
        self.resumed_s: list[float] = []  # connections that were lost and resumed
        self.num_refused = 0  # answers like 429 and 503, and refused connections, before it started
        self.strays: list[str] = []  # what makes no sense, such as events of a choice that nobody asked for

    def begin(self, now_s: float) -> None:
        """The request is sent."""
        self.started_s = now_s

    def tokens(
        self, choice: int, index: int | None, ids: Sequence[int], text: str, reason: str | None, now_s: float
    ) -> None:
        """Ids from `index` on (None: the next ones), their text, and perhaps the end of the choice."""
        if not 0 <= choice < len(self.choices):
            self.strays.append(f"choice {choice} was never asked for")
            return
        if self.num_ends:
            self.strays.append("tokens after the end")
        one = self.choices[choice]
        at = len(one.ids) if index is None else index
        if at > len(one.ids):
            one.num_lost += at - len(one.ids)
        elif at < len(one.ids):
            one.num_doubled += len(one.ids) - at
        if one.reasons and ids:
            self.strays.append(f"ids after the finish reason of choice {choice}")
        one.ids.extend(ids)
        one.texts.append(text)
        if ids:
            one.times_s.append(now_s)
        if reason is not None:
            one.reasons.append(reason)

    def end(self, now_s: float) -> None:
        """The whole stream says that it is over."""
        self.num_ends += 1
        self.ended_s = now_s

    def fail(self, code: str, message: str, now_s: float) -> None:
        """The stream ended with an error."""
        self.end(now_s)
        self.error_code, self.error = code, message

    @property
    def is_complete(self) -> bool:
        """Whether it ended without an error."""
        return self.num_ends > 0 and not self.error

    def violations(self) -> list[str]:
        """Everything that must never happen; a stream that failed or never ended is counted apart."""
        found = list(self.strays)
        if self.num_ends > 1:
            found.append(f"ended {self.num_ends} times")
        for number, (one, expected) in enumerate(zip(self.choices, self.spec.expected, strict=True)):
            found += [f"choice {number}: {flaw}" for flaw in _flaws(one, expected, self)]
        return [f"{self.spec.name} ({self.spec.path}): {flaw}" for flaw in found]

    def stalls(self, since_s: float) -> float:
        """The longest pause without a token of some choice that reaches past `since_s`; the wait for a
        choice's first token is one."""
        longest = 0.0
        for one in self.choices:
            marks = [self.started_s, *one.times_s]
            for before, after in itertools.pairwise(marks):
                if after > since_s:
                    longest = max(longest, after - before)
        return longest

    def longest_pause(self, struck_s: float) -> str:
        """Where it stood still longest, in words, with times from the fault on."""
        told = []
        for number, one in enumerate(self.choices):
            marks = [self.started_s, *one.times_s, self.ended_s]
            length, before = max((after - before, before) for before, after in itertools.pairwise(marks))
            have = sum(at <= before for at in one.times_s)
            told.append(
                f"choice {number}: {length:.2f} s from {before - struck_s:+.2f} s on, after {have} of "
                f"{len(one.times_s)} events, {len(self.spec.expected[number].ids)} ids expected"
            )
        return f"{self.spec.name} ({self.spec.path}): {'; '.join(told)}"


def _flaws(one: ChoiceHistory, expected: ExpectedChoice, stream: StreamHistory) -> Iterable[str]:
    spec = stream.spec
    if one.num_lost:
        yield f"{one.num_lost} ids lost"
    if one.num_doubled:
        yield f"{one.num_doubled} ids doubled"
    if len(one.reasons) > 1:
        yield f"finished {len(one.reasons)} times"
    if spec.is_poison:
        return
    for at, (token, known) in enumerate(zip(one.ids, expected.run, strict=False)):
        if token != known:
            yield f"id {at} is {token} instead of {known}"
            break
    if not stream.is_complete:
        return
    if not one.reasons:
        yield "ended without a finish reason"
    elif one.reasons[0] != expected.finish_reason:
        yield f"finished with {one.reasons[0]} instead of {expected.finish_reason}"
    if len(one.ids) < len(expected.ids) or (len(one.ids) > len(expected.ids) and not spec.stop_text):
        yield f"{len(one.ids)} ids instead of {len(expected.ids)}"
    text = "".join(one.texts)
    if expected.text is not None and text != expected.text:
        yield f"the text differs: {_first_difference(text, expected.text)}"


def _first_difference(text: str, expected: str) -> str:
    at = next(
        (i for i, (a, b) in enumerate(zip(text, expected, strict=False)) if a != b),
        min(len(text), len(expected)),
    )
    return f"at {at}: {text[at : at + 20]!r} instead of {expected[at : at + 20]!r}"


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of them do not exceed; 0 of none."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
