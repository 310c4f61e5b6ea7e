"""A scheduler and an executor in one, for tests of requesters: makes ids that only position decides."""

import asyncio
import contextlib

from pagebus.bus import messages, subjects
from pagebus.bus.messages import Accepted, Cancel, Generate, Heartbeat, Message, TokenRow, Tokens, pack_ids
from pagebus.bus.protocol import Bus, Msg, NotConnectedError
from pagebus.requester.events import Event, NewTokens

MODEL = "model"


def token(request_id: str, choice: int, index: int) -> int:
    return hash((request_id, choice, index)) % 50_000


class FakeServer:
    """Scheduler and executor in one: answers every attempt with its next ids, one a step of 10 ms."""

    def __init__(self, bus: Bus, epoch: int = 1) -> None:
        self.bus = bus
        self.epoch = epoch
        self.generates: list[Generate] = []
        self.cancels: list[Cancel] = []
        self.headers: list[dict[str, str]] = []
        self.is_mute = False
        self._attempts: dict[str, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        await self.bus.subscribe(subjects.generate(MODEL), self._take)

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
        task = asyncio.ensure_future(self._make(message))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _make(self, asked: Generate) -> None:
        await self.send(
            asked.reply, Accepted(request_id=asked.request_id, attempt=asked.attempt, epoch=self.epoch)
        )
        open_rows = {c.index: len(c.ids) // 4 for c in asked.choices if c.finish_reason is None}
        while open_rows and self._attempts[asked.request_id] == asked.attempt:
            await asyncio.sleep(0.01)
            rows = []
            for choice, index in list(open_rows.items()):
                is_last = index + 1 >= asked.max_tokens
                rows.append(
                    TokenRow(
                        request_id=asked.request_id,
                        attempt=asked.attempt,
                        choice=choice,
                        index=index,
                        ids=pack_ids([token(asked.request_id, choice, index)]),
                        finish_reason="length" if is_last else None,
                    )
                )
                open_rows[choice] += 1
                if is_last:
                    del open_rows[choice]
            await self.send(asked.reply, Tokens(epoch=self.epoch, rows=tuple(rows)))

    async def send(self, subject: str, message: Message) -> None:
        with contextlib.suppress(NotConnectedError):
            await self.bus.publish(subject, messages.encode(message))

    async def beat(self) -> None:
        heartbeat = Heartbeat(scheduler="s", model=MODEL, epoch=self.epoch)
        await self.send(subjects.heartbeat(MODEL), heartbeat)


def assert_whole(events: list[Event], request_id: str, num_choices: int, max_tokens: int) -> None:
    got: list[list[int]] = [[] for _ in range(num_choices)]
    ends: list[int] = [0] * num_choices
    for event in events:
        assert isinstance(event, NewTokens), event
        assert ends[event.choice] == 0
        assert event.index == len(got[event.choice])
        got[event.choice].extend(event.ids)
        ends[event.choice] += event.finish_reason is not None
    assert got == [[token(request_id, c, i) for i in range(max_tokens)] for c in range(num_choices)]
    assert ends == [1] * num_choices
