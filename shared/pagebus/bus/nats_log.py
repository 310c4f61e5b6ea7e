"""Logs of what was published, behind `MessageLog`: a stream beside delivery, read in batches, no consumer.

Nobody is acknowledged (`no_ack`), so a message may be missing; reading makes sure that it misses no more.
"""

import logging
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import msgspec

from pagebus.bus import guard
from pagebus.bus.nats_jetstream import NO_MESSAGE, STREAM_NOT_FOUND, TIMEOUT_S, JetStream, JetStreamError
from pagebus.bus.protocol import BusError, Msg, NoRespondersError, RequestTimeoutError, Stored

_log = logging.getLogger(__name__)

_BATCH = 512
_BATCH_BYTES = 1 << 20
_NUM_TRIES = 3
_DUPLICATE_WINDOW_S = 120.0


class NatsLog:
    """One log, made again where the server lost it. Every operation answers or raises `BusError`."""

    def __init__(
        self,
        jetstream: JetStream,
        counters: Counter[str],
        name: str,
        subjects: Sequence[str],
        max_age_s: float,
        max_bytes: int,
    ) -> None:
        self._jetstream = jetstream
        self._counters = counters
        self._name = name
        self._config: dict[str, object] = {
            "name": name,
            "subjects": list(subjects),
            "retention": "limits",
            "storage": "file",
            "discard": "old",
            "max_age": round(max_age_s * 1e9),
            "max_bytes": max_bytes,
            "duplicate_window": round(min(max_age_s, _DUPLICATE_WINDOW_S) * 1e9),
            "no_ack": True,  # a publish with a reply is answered by its receiver or by nobody
            "allow_direct": True,
            "deny_delete": True,
        }

    async def make(self) -> None:
        """Make it if absent."""
        await self._jetstream.open(self._config)

    async def last_sequence(self) -> int:
        """The newest message's sequence; 0 in an empty log."""
        try:
            return await self._jetstream.last_sequence(self._name)
        except JetStreamError as error:
            if error.code != STREAM_NOT_FOUND:
                raise
        await self.make()
        return await self._jetstream.last_sequence(self._name)

    async def read(self, subject: str, first_sequence: int) -> AsyncGenerator[Stored, None]:
        """What is kept of `subject` from `first_sequence` on, in order.

        Batches come from any copy. Where no more comes the leader is asked for one more, so that a copy
        that lags behind ends nothing.
        """
        guard.check_publish(subject)
        sequence = max(first_sequence, 1)
        while True:
            has_read = False
            async for stored in self._batches(subject, sequence):
                sequence, has_read = stored.sequence + 1, True
                yield stored
            if has_read:
                continue
            missed = await self._from_leader(subject, sequence)
            if missed is None:
                return
            sequence = missed.sequence + 1
            yield missed

    async def _batches(self, subject: str, sequence: int) -> AsyncGenerator[Stored, None]:
        """One batch; the rest of one that came in part is asked for again."""
        for attempt in range(1, _NUM_TRIES + 1):
            num_read = 0
            try:
                async with aclosing(self._batch(subject, sequence)) as batch:
                    async for stored in batch:
                        sequence, num_read = stored.sequence + 1, num_read + 1
                        yield stored
                return
            except NoRespondersError:
                await self.make()
                return
            except (RequestTimeoutError, _CutBatchError):
                self._counters["log_batches_cut"] += 1
                if num_read:
                    return
                if attempt == _NUM_TRIES:
                    raise

    async def _batch(self, subject: str, sequence: int) -> AsyncGenerator[Stored, None]:
        question = {"seq": sequence, "next_by_subj": subject, "batch": _BATCH, "max_bytes": _BATCH_BYTES}
        answers = self._jetstream.inbox.request_many(
            f"$JS.API.DIRECT.GET.{self._name}", msgspec.json.encode(question), timeout_s=TIMEOUT_S
        )
        num_pending: int | None = None
        async with aclosing(answers):
            async for message in answers:
                match message.headers.get("Status", ""):
                    case "":
                        left = _number(message, "Nats-Num-Pending")
                        if num_pending is not None and left != num_pending - 1:
                            raise _CutBatchError("a message of a batch is missing")
                        num_pending = left
                        yield Stored(_number(message, "Nats-Sequence"), message.data)
                    case "204" | "404":  # the end of the batch; nothing to give
                        return
                    case status:
                        reason = message.headers.get("Description", "")
                        raise BusError(f"JetStream cannot read {self._name}: {status} {reason}")

    async def _from_leader(self, subject: str, sequence: int) -> Stored | None:
        question = {"seq": sequence, "next_by_subj": subject}
        try:
            answer = await self._jetstream.call(f"STREAM.MSG.GET.{self._name}", question)
        except JetStreamError as error:
            if error.code in (NO_MESSAGE, STREAM_NOT_FOUND):
                return None
            raise
        if answer.message is None:
            raise BusError(f"JetStream's answer about {self._name} holds no message")
        return Stored(answer.message.seq, answer.message.data)


class _CutBatchError(BusError):
    """A batch came in part."""


def _number(message: Msg, header: str) -> int:
    try:
        return int(message.headers[header])
    except (KeyError, ValueError):
        raise BusError(f"JetStream's message has no number in {header}") from None
