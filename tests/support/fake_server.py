"""A scheduler and an executor in one, for tests of requesters: makes ids that only position decides."""

import asyncio
import contextlib

from pagebus.bus import messages, subjects
from pagebus.bus.messages import (
    Accepted,
    Cancel,
    Generate,
    Heartbeat,
    Message,
    PromptRow,
    Rejected,
    TokenRow,
    Tokens,
    pack_ids,
    unpack_ids,
)
from pagebus.bus.protocol import Bus, Msg, NotConnectedError
from pagebus.requester.events import Event, NewTokens, PromptLogprobs
from pagebus.requester.packed_logprobs import TokenLogprob, unpack
from tests.support.logprobs import made_up, made_up_all

MODEL = "model"
VOCAB_SIZE = 50_000
PROMPT_CHUNK = 3


def token(request_id: str, choice: int, index: int, vocab_size: int = VOCAB_SIZE) -> int:
    return hash((request_id, choice, index)) % vocab_size


class FakeServer:
    """Scheduler and executor in one: answers every attempt with its next ids, one a step of 10 ms.

    Log-probabilities of the prompt go ahead, `PROMPT_CHUNK` positions a step; those of made ids (`logprob`)
    depend on choice and index alone. Every row says that one of its positions was cached.
    """

    def __init__(
        self,
        bus: Bus,
        epoch: int = 1,
        *,
        model: str = MODEL,
        vocab_size: int = VOCAB_SIZE,
        max_model_len: int = 0,
    ) -> None:
        self.bus = bus
        self.epoch = epoch
        self.model = model
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.generates: list[Generate] = []
        self.cancels: list[Cancel] = []
        self.headers: list[dict[str, str]] = []
        self.is_mute = False
        self.refusal = ""  # a code: requests are turned away with it
        self._attempts: dict[str, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        await self.bus.subscribe(subjects.generate(self.model), self._take)

    def _take(self, msg: Msg) -> None:
        message = messages.decode(msg.data)
        if isinstance(message, Cancel):
            self.cancels.append(message)
            if not message.choices and message.attempt >= self._attempts.get(message.request_id, 0):
                self._attempts[message.request_id] = message.attempt + 1
            return
        assert isinstance(message, Generate)
        self.generates.append(message)
        self.headers.append(dict(msg.headers))
        if self.is_mute or message.attempt <= self._attempts.get(message.request_id, 0):
            return
        self._attempts[message.request_id] = message.attempt
        task = asyncio.ensure_future(self._refuse(message) if self.refusal else self._make(message))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _refuse(self, asked: Generate) -> None:
        refusal = Rejected(
            request_id=asked.request_id,
            attempt=asked.attempt,
            code=self.refusal,
            message="no",
            is_client_fault=False,
        )
        await self.send(asked.reply, refusal)

    def drop_all(self, reply: str = "") -> None:
        """Nobody listens any more (on `reply`): what runs is ended, and may be asked for again."""
        for asked in self.generates:
            if reply in ("", asked.reply) and self._attempts.get(asked.request_id) == asked.attempt:
                self._attempts[asked.request_id] = 0

    async def _make(self, asked: Generate) -> None:
        await self.send(
            asked.reply, Accepted(request_id=asked.request_id, attempt=asked.attempt, epoch=self.epoch)
        )
        await self._tell_prompt(asked)
        open_rows = {c.index: len(c.ids) // 4 for c in asked.choices if c.finish_reason is None}
        while open_rows and self._attempts[asked.request_id] == asked.attempt:
            await asyncio.sleep(0.01)
            rows = []
            for choice, index in list(open_rows.items()):
                is_last = index + 1 >= asked.max_tokens
                made = token(asked.request_id, choice, index, self.vocab_size)
                num_top = asked.sampling.num_logprobs
                told = None if num_top is None else made_up_all([made], index, num_top, self.vocab_size)
                rows.append(
                    TokenRow(
                        request_id=asked.request_id,
                        attempt=asked.attempt,
                        choice=choice,
                        index=index,
                        ids=pack_ids([made]),
                        finish_reason="length" if is_last else None,
                        logprobs=told,
                        num_cached=1,
                    )
                )
                open_rows[choice] += 1
                if is_last:
                    del open_rows[choice]
            await self.send(asked.reply, Tokens(epoch=self.epoch, rows=tuple(rows)))

    async def _tell_prompt(self, asked: Generate) -> None:
        num_top = asked.sampling.num_prompt_logprobs
        if num_top is None:
            return
        prompt = list(unpack_ids(asked.prompt))
        for start in range(1, len(prompt), PROMPT_CHUNK):
            await asyncio.sleep(0.01)
            told = made_up_all(prompt[start : start + PROMPT_CHUNK], start, num_top, self.vocab_size)
            row = PromptRow(request_id=asked.request_id, attempt=asked.attempt, start=start, logprobs=told)
            if self._attempts[asked.request_id] == asked.attempt:
                await self.send(asked.reply, Tokens(epoch=self.epoch, rows=(), prompts=(row,)))

    async def send(self, subject: str, message: Message) -> None:
        with contextlib.suppress(NotConnectedError):
            await self.bus.publish(subject, messages.encode(message))

    async def beat(self) -> None:
        heartbeat = Heartbeat(
            scheduler="s",
            model=self.model,
            epoch=self.epoch,
            num_executors=1,
            max_model_len=self.max_model_len,
        )
        await self.send(subjects.heartbeat(self.model), heartbeat)


def assert_whole(
    events: list[Event],
    request_id: str,
    num_choices: int,
    max_tokens: int,
    *,
    num_logprobs: int | None = None,
    num_prompt_logprobs: int | None = None,
    prompt: list[int] | None = None,
) -> None:
    """Every id once and in order, every choice ended once, and the log-probabilities that were asked for."""
    got: list[list[int]] = [[] for _ in range(num_choices)]
    told: list[list[TokenLogprob]] = [[] for _ in range(num_choices)]
    of_prompt: list[TokenLogprob] = []
    ends: list[int] = [0] * num_choices
    for event in events:
        if isinstance(event, PromptLogprobs):
            assert event.start == len(of_prompt) + 1
            assert not any(got)
            of_prompt += unpack(event.logprobs)
            continue
        assert isinstance(event, NewTokens), event
        assert ends[event.choice] == 0
        assert event.index == len(got[event.choice])
        got[event.choice].extend(event.ids)
        ends[event.choice] += event.finish_reason is not None
        assert num_logprobs is not None or event.logprobs is None
        if event.logprobs is not None:
            told[event.choice] += unpack(event.logprobs)
    want = [[token(request_id, c, i) for i in range(max_tokens)] for c in range(num_choices)]
    assert got == want
    assert ends == [1] * num_choices
    if num_logprobs is not None:
        assert told == [
            [made_up(made, index, num_logprobs, VOCAB_SIZE) for index, made in enumerate(ids)] for ids in want
        ]
    wanted = prompt or [] if num_prompt_logprobs is not None else []
    assert of_prompt == [
        made_up(one, at, num_prompt_logprobs or 0, VOCAB_SIZE) for at, one in enumerate(wanted) if at > 0
    ]
