"""The truth about one request: which ids arrived, which attempt runs, when to ask again. No I/O, no clock.

Times are monotonic seconds that the caller gives. Tokens are taken for the current attempt only, each id once
and in order; whatever looks lost leads to the next attempt, which carries the ids received so far.
"""

import random
from array import array

from pagebus.bus.messages import (
    Accepted,
    ChoiceState,
    DecodeError,
    Failed,
    Generate,
    Rejected,
    TokenRow,
    pack_ids,
    unpack_ids,
)
from pagebus.requester.events import NewTokens, RequestFailed, RequestSpec

SILENCE_S = 20.0
"""An accepted attempt without any sign for so long is asked for again."""
FIRST_ANSWER_S = 1.0
"""An attempt that nobody answered in this time is asked for again; doubles with every unanswered one."""
MAX_ANSWER_S = 8.0
RETRY_S = 0.05
"""First pause after a retryable failure; doubles up to `MAX_RETRY_S`."""
MAX_RETRY_S = 2.0
JITTER_S = 0.05


class _Choice:
    """Ids of one choice so far, and how it ended."""

    __slots__ = ("finish_reason", "ids")

    def __init__(self) -> None:
        self.ids: array[int] = array("i")
        self.finish_reason: str | None = None


class RequestState:
    """One request from submission to its end."""

    def __init__(self, spec: RequestSpec, now_s: float, rng: random.Random) -> None:
        self.spec = spec
        self.attempt = 0
        self.is_over = False
        self._prompt = pack_ids(spec.prompt)
        self._stop_token_ids = pack_ids(spec.stop_token_ids)
        self._rng = rng
        self._deadline_s = now_s + spec.timeout_s
        self._choices = [_Choice() for _ in range(spec.num_choices)]
        self._num_open = spec.num_choices
        self._ask_s: float | None = now_s  # when to ask next, known beforehand
        self._asked_s = now_s
        self._heard_s: float | None = None  # last sign of the current attempt
        self._epoch = 0  # newest epoch heard when asking, or that answered
        self._num_unanswered = 0
        self._num_failures = 0

    # -- asking ----------------------------------------------------------------------------------------------

    def due_s(self) -> float:
        """When `is_due` or the deadline comes next, if nothing happens before."""
        if self._ask_s is not None:
            return min(self._ask_s, self._deadline_s)
        if self._heard_s is not None:
            return min(self._heard_s + SILENCE_S, self._deadline_s)
        patience_s = min(FIRST_ANSWER_S * 2.0**self._num_unanswered, MAX_ANSWER_S)
        return min(self._asked_s + patience_s, self._deadline_s)

    def expire(self, now_s: float) -> RequestFailed | None:
        """The end of a request whose deadline is over."""
        if now_s < self._deadline_s:
            return None
        return self._fail(
            RequestFailed("timeout", f"the request's deadline of {self.spec.timeout_s:.0f} s is over")
        )

    def is_due(self, now_s: float) -> bool:
        """Whether to ask (again) now."""
        return not self.is_over and now_s >= self.due_s()

    def ask(self, *, model: str, reply: str, life: str, epoch: int, now_s: float) -> Generate:
        """The next attempt's message. `epoch`: the newest that was heard of, 0 for none."""
        if self.attempt and self._heard_s is None:
            self._num_unanswered += 1
        self.attempt += 1
        self._ask_s, self._asked_s, self._heard_s = None, now_s, None
        self._epoch = max(self._epoch, epoch)
        spec = self.spec
        return Generate(
            request_id=spec.request_id,
            attempt=self.attempt,
            model=model,
            prompt=self._prompt,
            choices=tuple(
                ChoiceState(index=index, ids=pack_ids(choice.ids), finish_reason=choice.finish_reason)
                for index, choice in enumerate(self._choices)
            ),
            sampling=spec.sampling,
            stop_token_ids=self._stop_token_ids,
            max_tokens=spec.max_tokens,
            min_tokens=spec.min_tokens,
            priority=spec.priority,
            tenant=spec.tenant,
            cache_salt=spec.cache_salt,
            time_left_ms=max(1, round((self._deadline_s - now_s) * 1000)),
            reply=reply,
            life=life,
        )

    def ask_soon(self, now_s: float, within_s: float = JITTER_S) -> None:
        """Ask again within this time, at a random moment, so that many requests do not ask at once."""
        at_s = now_s + self._rng.random() * within_s
        self._ask_s = at_s if self._ask_s is None else min(self._ask_s, at_s)

    def on_unsent(self, now_s: float) -> None:
        """The attempt could not be published."""
        self._retry(now_s)

    def on_epoch(self, epoch: int, now_s: float) -> None:
        """A leader of this epoch was heard; a later term than ours knows nothing of this request."""
        if epoch > self._epoch:
            self._epoch = epoch
            self.ask_soon(now_s)

    # -- answers ---------------------------------------------------------------------------------------------

    def on_accepted(self, message: Accepted, now_s: float) -> None:
        """A sign of life."""
        if message.attempt == self.attempt:
            self._hear(message.epoch, now_s)

    def on_rejected(self, message: Rejected) -> RequestFailed | None:
        """The scheduler does not take the request."""
        if message.attempt != self.attempt or self.is_over:
            return None
        return self._fail(
            RequestFailed(message.code, message.message, message.is_client_fault, message.retry_after_s)
        )

    def on_failed(self, message: Failed, now_s: float) -> RequestFailed | None:
        """The attempt failed: for good, or to be asked for again after a pause."""
        if message.attempt != self.attempt or self.is_over:
            return None
        if message.is_retryable:
            self._retry(now_s)
            return None
        return self._fail(RequestFailed(message.code, message.message, message.is_client_fault))

    def on_row(self, row: TokenRow, epoch: int, now_s: float) -> NewTokens | None:
        """What is new in a row; None for what is stale, doubled, or shows a gap (then asks again)."""
        if row.attempt != self.attempt or self.is_over or not 0 <= row.choice < len(self._choices):
            return None
        choice = self._choices[row.choice]
        if choice.finish_reason is not None:
            return None
        try:
            ids = unpack_ids(row.ids)
        except DecodeError:
            self.ask_soon(now_s)
            return None
        have = len(choice.ids)
        if row.index > have or row.index < 0:
            self.ask_soon(now_s, 0.0)
            return None
        self._hear(epoch, now_s)
        new = ids[have - row.index :]
        if not new and row.finish_reason is None:
            return None
        self._num_failures = 0
        choice.ids.extend(new)
        if row.finish_reason is not None:
            self._end_choice(choice, row.finish_reason)
        return NewTokens(row.choice, have, new, row.finish_reason)

    # -- ends ------------------------------------------------------------------------------------------------

    def end_choice(self, index: int, reason: str = "stop") -> bool:
        """The owner ends a choice itself (a stop string). False if it had ended."""
        choice = self._choices[index]
        if self.is_over or choice.finish_reason is not None:
            return False
        self._end_choice(choice, reason)
        return True

    def cancel(self) -> None:
        """The owner ends everything."""
        self.is_over = True

    def _end_choice(self, choice: _Choice, reason: str) -> None:
        choice.finish_reason = reason
        self._num_open -= 1
        self.is_over = self._num_open == 0

    def _fail(self, failure: RequestFailed) -> RequestFailed:
        self.is_over = True
        return failure

    def _hear(self, epoch: int, now_s: float) -> None:
        self._heard_s = now_s
        self._epoch = max(self._epoch, epoch)
        self._num_unanswered = 0

    def _retry(self, now_s: float) -> None:
        pause_s = min(RETRY_S * 2.0**self._num_failures, MAX_RETRY_S)
        self._num_failures += 1
        self._ask_s = now_s + pause_s * (0.5 + self._rng.random())
