"""One request, seen by its owner: what it has, which attempt counts, when to ask again. Pure.

Times are seconds of whatever clock the caller uses; "send" means that the caller publishes what is returned.
"""

import random
from array import array

import msgspec

from pagebus.bus.messages import (
    Accepted,
    Cancel,
    DecodeError,
    Failed,
    FinishReason,
    Generate,
    PromptRow,
    Rejected,
    TokenRow,
    pack_ids,
    unpack_ids,
)
from pagebus.requester.choices import Choice, asked_choices
from pagebus.requester.events import Event, NewTokens, ReceivedChoice, RequestFailed, RequestSpec
from pagebus.requester.packed_logprobs import cut, is_whole
from pagebus.requester.prompt_part import PromptPart
from pagebus.requester.suspicion import Suspicion
from pagebus.requester.timing import NEVER, Timing


class RequestState:
    """Grows by what arrives for its current attempt, and by nothing else.

    `due_s` is when `ask` or `expire` is wanted; the owner looks at `has_ended` after each call. Where the
    prompt's log-probabilities are asked for, ids that come before the last of these are held back, and the
    request is not over before they are here.
    """

    def __init__(
        self,
        spec: RequestSpec,
        *,
        model: str,
        reply: str,
        life: str,
        now_s: float,
        timing: Timing,
        rng: random.Random,
    ) -> None:
        self.spec = spec
        self.attempt = spec.first_attempt - 1
        self.has_ended = False
        self.deadline_s = now_s + spec.timeout_s
        self.num_stale_rows = 0
        self.num_cached_tokens: int | None = None  # of the prompt; None until it is told
        self._model = model
        self._reply = reply
        self._life = life
        self._timing = timing
        self._rng = rng
        self._prompt = pack_ids(spec.prompt)
        self._stop_ids = frozenset(spec.stop_token_ids)
        self._packed_stop_ids = pack_ids(spec.stop_token_ids)
        received = spec.received or (ReceivedChoice(),) * spec.num_choices
        self._choices = [
            Choice(array("i", choice.ids), choice.finish_reason, num_told=len(choice.ids))
            for choice in received
        ]
        self._num_open = sum(choice.finish_reason is None for choice in self._choices)
        self._prompt_part = PromptPart(
            len(spec.prompt), spec.sampling.num_prompt_logprobs is not None, spec.num_prompt_told
        )
        self._prompt_choice = 0  # whose row tells them in this attempt: the first open one's
        self._held: list[NewTokens] = []
        self._is_cancelled = False
        self._epoch = 0  # the leader's that works on this attempt, as far as known
        self._was_asked = self._is_acknowledged = False
        self._num_failures = 0  # asked again since the last token
        self._suspicion = Suspicion()
        self._last_sign_s = now_s
        self._running_since_s = NEVER
        self._ask_at_s = now_s
        self._jitter_s = 0.0  # this attempt's share of `timing.jitter_s`

    @property
    def due_s(self) -> float:
        """When to call `ask` or, at the deadline, `expire`."""
        return NEVER if self.has_ended else min(self._ask_at_s, self._patience_s(), self.deadline_s)

    @property
    def is_acknowledged(self) -> bool:
        """Whether somebody said anything about the current attempt."""
        return self._is_acknowledged

    @property
    def is_prompt_told(self) -> bool:
        """Whether every log-probability of the prompt that was asked for is here."""
        return self._prompt_part.is_told

    @property
    def num_prompt_told(self) -> int:
        """Positions of the prompt that are told, the first included."""
        return self._prompt_part.num_told

    def received(self) -> list[ReceivedChoice]:
        """What the owner was told of every choice; one that the owner ended counts as stopped."""
        if not self.is_prompt_told:
            return [ReceivedChoice((), "stop" if one.is_unwanted else None) for one in self._choices]
        return [ReceivedChoice(one.ids, one.finish_reason) for one in self._choices]

    def num_ids(self, choice: int) -> int:
        """How many ids the choice has."""
        return len(self._choices[choice].ids)

    def ids(self, choice: int) -> "array[int]":
        """The ids that the choice has; not to be changed."""
        return self._choices[choice].ids

    # What the owner does

    def ask(self, now_s: float, leader_epoch: int = 0) -> Generate | None:
        """The next attempt, with what is here; None when nothing is left to ask for."""
        if self.has_ended:
            return None
        self.attempt += 1
        self._was_asked, self._epoch = True, leader_epoch
        self._is_acknowledged = False
        self._running_since_s = NEVER
        self._num_failures += 1
        self._last_sign_s = now_s
        self._ask_at_s = NEVER
        self._jitter_s = self._rng.uniform(0.0, self._timing.jitter_s)
        spec, sampling = self.spec, self.spec.sampling
        if self.is_prompt_told and sampling.num_prompt_logprobs is not None:
            sampling = msgspec.structs.replace(sampling, num_prompt_logprobs=None)
        self._prompt_part.num_asked_again += self.attempt > spec.first_attempt
        choices = asked_choices(self._choices, self._num_open == 0)
        self._prompt_choice = next(choice.index for choice in choices if choice.finish_reason is None)
        return Generate(
            request_id=spec.request_id,
            attempt=self.attempt,
            model=self._model,
            prompt=self._prompt,
            choices=choices,
            sampling=sampling,
            stop_token_ids=self._packed_stop_ids,
            max_tokens=spec.max_tokens,
            min_tokens=spec.min_tokens,
            priority=spec.priority,
            tenant=spec.tenant,
            cache_salt=spec.cache_salt,
            time_left_ms=max(1, int((self.deadline_s - now_s) * 1000)),
            is_suspect=self._suspicion.is_suspect,
            num_sole_suspect_deaths=self._suspicion.num_deaths,
            reply=self._reply,
            life=self._life,
        )

    def complete(self) -> list[NewTokens]:
        """End the choices whose own ids say that they are over, where the word of it was lost."""
        events = []
        for index, choice in enumerate(self._choices):
            reason = None if choice.finish_reason else choice.own_finish_reason(self.spec, self._stop_ids)
            if reason is not None:
                self._finish(choice, reason)
                events.append(NewTokens(index, len(choice.ids), (), reason))
        if self.is_prompt_told:
            return events
        self._held += events
        return []

    def end_choice(self, choice: int) -> Cancel | None:
        """The owner has enough of this choice: the message that says so, None where it has ended."""
        if not 0 <= choice < len(self._choices):
            return None
        self._choices[choice].is_unwanted = True
        self._held = [event for event in self._held if event.choice != choice]
        if self.has_ended:
            return None
        if self._choices[choice].finish_reason is None:
            self._finish(self._choices[choice], "stop")
        elif self._num_open == 0 and all(one.is_unwanted for one in self._choices):
            self.has_ended = True  # only the prompt's log-probabilities were missing, and nobody waits
        else:
            return None
        named = () if self.has_ended else (choice,)
        return Cancel(request_id=self.spec.request_id, attempt=self.attempt, choices=named)

    def cancel(self) -> Cancel | None:
        """The owner wants nothing more; None where the request has ended."""
        self._is_cancelled = True
        if self.has_ended:
            return None
        self.has_ended = True
        return Cancel(request_id=self.spec.request_id, attempt=self.attempt)

    def is_wanted(self, event: Event) -> bool:
        """Whether the owner still wants an event that was made before it ended or cancelled something."""
        if isinstance(event, NewTokens) and self._choices[event.choice].is_unwanted:
            return False
        return not self._is_cancelled

    def fail(self, failure: RequestFailed) -> RequestFailed | None:
        """End the request for a reason found by its owner; None where it has ended."""
        if self.has_ended:
            return None
        self.has_ended = True
        return failure

    def expire(self, now_s: float) -> RequestFailed | None:
        """End the request at its deadline; None before."""
        if now_s < self.deadline_s:
            return None
        why = "while it ran" if self._is_acknowledged else "and nobody has acknowledged it"
        message = f"the deadline of {self.spec.timeout_s:g} s passed {why} (attempt {self.attempt})"
        return self.fail(RequestFailed("timeout", message))

    # What arrives

    def take_next(self, row: TokenRow, epoch: int, now_s: float, *, is_told: bool = False) -> bool:
        """Take in an ordinary row, one of nothing but ids at the next index of an open choice; False leaves
        everything to `on_row`. `is_told`: the caller tells its ids now, else `news` does later. No time at
        which anything is due comes nearer by it."""
        if row.attempt != self.attempt or self.has_ended or not 0 <= row.choice < len(self._choices):
            return False
        if row.finish_reason is not None or row.logprobs is not None or row.num_cached is not None:
            return False
        if epoch < self._epoch or not self._prompt_part.is_told:
            return False
        if not self._choices[row.choice].take_packed(row.index, row.ids, is_told):
            return False
        self._is_acknowledged = True
        self._last_sign_s = now_s
        self._epoch = epoch
        if self._suspicion.is_any:
            self._suspicion.note_ids(len(row.ids) // 4)
        self._num_failures = 0
        if self._running_since_s != NEVER:
            self._running_since_s = now_s
        return True

    def news(self, at_least: int = 1) -> list[NewTokens]:
        """What `take_next` took and nobody was told yet, of each choice that has at least so many ids of it;
        nothing once the owner has cancelled."""
        if self._is_cancelled:
            return []
        found = [choice.news(index, at_least) for index, choice in enumerate(self._choices)]
        return [event for event in found if event is not None]

    def on_row(self, row: TokenRow, epoch: int, now_s: float) -> NewTokens | None:
        """New ids of the current attempt; None for what is old, doubled, held back, or lies past a gap."""
        if self.has_ended or row.attempt != self.attempt or not 0 <= row.choice < len(self._choices):
            self.num_stale_rows += 1
            return None
        self._sign(epoch, now_s)
        if row.choice == 0 and row.num_cached is not None and self.num_cached_tokens is None:
            self.num_cached_tokens = max(0, min(row.num_cached, len(self.spec.prompt)))
        choice = self._choices[row.choice]
        if row.choice == self._prompt_choice and not self.is_prompt_told:
            # Its ids come after all that is told of the prompt: some of that was lost.
            self._ask_soon(now_s, self._timing.min_backoff_s if self._prompt_part.num_asked_again else 0.0)
        if choice.finish_reason is not None:
            return None
        try:
            ids = unpack_ids(row.ids)
        except DecodeError:
            self.num_stale_rows += 1
            return None
        if row.logprobs is not None and not is_whole(row.logprobs, len(ids)):
            self.num_stale_rows += 1
            return None
        have = len(choice.ids)
        if row.index > have:  # something in between was lost; it will not come again by itself
            self._ask_soon(now_s)
            return None
        new = ids[have - row.index :] if row.index < have else ids
        is_at_end = row.index + len(ids) >= have
        if not new and not (row.finish_reason and is_at_end):
            return None
        choice.ids.extend(new)
        choice.num_told = len(choice.ids)
        self._suspicion.note_ids(len(new))
        self._progress(now_s)
        if row.finish_reason:
            self._finish(choice, row.finish_reason)
        logprobs = None
        if row.logprobs is not None:
            logprobs = cut(row.logprobs, have - row.index, len(ids))
        event = NewTokens(row.choice, have, new, row.finish_reason, logprobs)
        if self.is_prompt_told:
            return event
        self._held.append(event)
        return None

    def on_prompt(self, row: PromptRow, epoch: int, now_s: float) -> list[Event]:
        """New log-probabilities of the prompt, and after the last of them the ids that waited for it; nothing
        for what is old, doubled, or lies past a gap."""
        if self.has_ended or row.attempt != self.attempt:
            self.num_stale_rows += 1
            return []
        self._sign(epoch, now_s)
        part = self._prompt_part
        if part.is_gap(row):
            self._ask_soon(now_s)
        told = part.take(row)
        if told is None:
            return []
        self._progress(now_s)
        events: list[Event] = [told]
        if part.is_told:
            events += self._held
            self._held.clear()
            self.has_ended = self._num_open == 0
        return events

    def on_accepted(self, accepted: Accepted, now_s: float) -> None:
        """The scheduler knows the attempt."""
        if accepted.attempt != self.attempt or self.has_ended or accepted.epoch < self._epoch:
            return
        self._sign(accepted.epoch, now_s)
        if accepted.is_cleared:
            self._suspicion.clear()
        if accepted.state == "running" and self._running_since_s == NEVER:
            self._running_since_s = now_s

    def on_rejected(self, rejected: Rejected) -> RequestFailed | None:
        """The scheduler does not take the attempt."""
        if rejected.attempt != self.attempt:
            return None
        return self.fail(
            RequestFailed(rejected.code, rejected.message, rejected.is_client_fault, rejected.retry_after_s)
        )

    def on_failed(self, failed: Failed, now_s: float) -> RequestFailed | None:
        """The attempt ended: ask again after a pause, or the request ends."""
        if failed.attempt != self.attempt or self.has_ended:
            return None
        if not failed.is_retryable:
            return self.fail(RequestFailed(failed.code, failed.message, failed.is_client_fault))
        self._suspicion.note_failure(failed)
        pause_s = self._timing.backed_off(self._timing.min_backoff_s, self._num_failures)
        self._ask_at_s = min(self._ask_at_s, now_s + pause_s * self._rng.uniform(0.5, 1.0))
        return None

    def on_leader(self, epoch: int, now_s: float) -> None:
        """A leader is heard: if it is newer than the one that was asked, that one's work is gone."""
        if 0 < self._epoch < epoch and self._was_asked:
            self._ask_soon(now_s)

    def on_reconnect(self, now_s: float) -> None:
        """The owner was cut off: anything may have been lost, which says nothing of who was asked."""
        self._num_failures = 0
        if self._was_asked:
            self._ask_soon(now_s)

    def _sign(self, epoch: int, now_s: float) -> None:
        """Somebody works on the attempt; for an older leader than the one asked, it does not count."""
        if epoch < self._epoch:
            return
        self._is_acknowledged = True
        self._last_sign_s = now_s
        self._epoch = epoch

    def _progress(self, now_s: float) -> None:
        """Something new is here: all patience starts anew."""
        self._num_failures = 0
        if self._running_since_s != NEVER:
            self._running_since_s = now_s

    def _ask_soon(self, now_s: float, pause_s: float = 0.0) -> None:
        """Soon, or after a pause that doubles while nothing more is told of the prompt."""
        num_doublings = min(self._prompt_part.num_asked_again, 16)
        pause_s = min(pause_s * (1 << num_doublings), self._timing.max_backoff_s)
        at_s = now_s + pause_s + self._rng.uniform(0.0, self._timing.jitter_s)
        self._ask_at_s = min(self._ask_at_s, at_s)

    def _patience_s(self) -> float:
        """When silence, or running without a token, has lasted too long."""
        timing = self._timing
        if not self._was_asked:
            return NEVER
        if not self._is_acknowledged:
            pause_s = timing.backed_off(timing.acknowledged_s, self._num_failures)
            return self._last_sign_s + pause_s + self._jitter_s
        no_progress_s = self._running_since_s + timing.doubled(timing.progress_s, self._num_failures)
        return min(self._last_sign_s + timing.silence_s, no_progress_s) + self._jitter_s

    def _finish(self, choice: Choice, reason: FinishReason) -> None:
        choice.finish_reason = reason
        self._num_open -= 1
        is_all_unwanted = all(choice.is_unwanted for choice in self._choices)
        if self._num_open == 0 and (self.is_prompt_told or is_all_unwanted):
            self.has_ended = True
