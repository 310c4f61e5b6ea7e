import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagebus.bus import messages, subjects
from pagebus.bus.faults import SeededFaults
from pagebus.bus.memory import MemoryBroker
from pagebus.bus.messages import (
    Cancel,
    Failed,
    Heartbeat,
    PromptRow,
    Rejected,
    Sampling,
    TokenRow,
    Tokens,
    pack_ids,
)
from pagebus.requester.client import Requester
from pagebus.requester.events import Event, NewTokens, RequestFailed, RequestSpec
from pagebus.sim import virtual_time
from tests.support.fake_server import MODEL, FakeServer, assert_whole
from tests.support.logprobs import made_up_all


class World:
    """A broker, a fake server and a requester."""

    def __init__(self, *, max_payload: int = 1 << 20) -> None:
        self.broker = MemoryBroker(max_payload=max_payload)
        self.server_bus = self.broker.connect("server")
        self.server = FakeServer(self.server_bus)
        self.bus = self.broker.connect("requester")
        self.requester = Requester(self.bus, model=MODEL, instance="gw", rng=random.Random(1))

    async def __aenter__(self) -> "World":
        await self.server.start()
        await self.requester.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.requester.close()


def spec(request_id: str = "r", **more) -> RequestSpec:
    return RequestSpec(**{"request_id": request_id, "prompt": [1, 2, 3], "max_tokens": 5, **more})


def in_virtual_time(test):
    def run() -> None:
        virtual_time.run(test())

    run.__name__ = test.__name__
    return run


@in_virtual_time
async def test_a_request_from_end_to_end():
    async with World() as world:
        headers = {"traceparent": "00-1-2-3"}
        events = [event async for event in world.requester.generate(spec(num_choices=2, headers=headers))]
        assert_whole(events, "r", 2, 5)
        assert world.requester.num_live == 0
        assert world.server.headers == [headers]
        await asyncio.sleep(30)
        assert len(world.server.generates) == 1
        assert world.server.cancels == []


@in_virtual_time
async def test_nothing_is_delivered_from_within_submit():
    async with World(max_payload=100) as world:
        events: list[Event] = []
        world.requester.submit(spec(prompt=[1] * 100), events.append)
        assert events == []
        await asyncio.sleep(0.1)
        assert [type(event) for event in events] == [RequestFailed]
        assert events[0].code == "prompt_too_large"
        assert events[0].is_client_fault


@in_virtual_time
async def test_leaving_the_iterator_cancels():
    async with World() as world:
        stream = world.requester.generate(spec(max_tokens=1000))
        async for _ in stream:
            break
        await stream.aclose()
        await asyncio.sleep(1)
        assert world.server.cancels == [Cancel(request_id="r", attempt=1)]
        assert world.requester.num_live == 0


@in_virtual_time
async def test_a_ticket_ends_choices_and_requests():
    async with World() as world:
        events: list[Event] = []
        ticket = world.requester.submit(spec(num_choices=2, max_tokens=100), events.append)
        await asyncio.sleep(0.105)
        ticket.end_choice(0)
        num_first = sum(event.choice == 0 for event in events)
        await asyncio.sleep(0.1)
        assert sum(event.choice == 0 for event in events) == num_first
        ticket.cancel()
        ticket.cancel()
        assert ticket.has_ended
        num_events = len(events)
        await asyncio.sleep(1)
        assert len(events) == num_events
        assert world.server.cancels == [
            Cancel(request_id="r", attempt=1, choices=(0,)),
            Cancel(request_id="r", attempt=1),
        ]


@in_virtual_time
async def test_a_listener_that_raises_loses_its_request_only():
    async with World() as world:

        def broken(event: Event) -> None:
            raise RuntimeError("on purpose")

        world.requester.submit(spec("bad"), broken)
        events = [event async for event in world.requester.generate(spec("good"))]
        assert_whole(events, "good", 1, 5)
        assert [cancel.request_id for cancel in world.server.cancels] == ["bad"]


@in_virtual_time
async def test_asks_until_a_scheduler_is_there():
    async with World() as world:
        world.server_bus.disconnect()
        events: list[Event] = []
        world.requester.submit(spec(), events.append)
        await asyncio.sleep(10)
        world.server_bus.reconnect()
        await asyncio.sleep(3)
        assert_whole(events, "r", 1, 5)


@in_virtual_time
async def test_the_deadline_is_kept_and_said():
    async with World() as world:
        world.server.is_mute = True
        start_s = asyncio.get_running_loop().time()
        events = [event async for event in world.requester.generate(spec(timeout_s=7.0))]
        assert asyncio.get_running_loop().time() - start_s == pytest.approx(7.0)
        assert [event.code for event in events] == ["timeout"]
        assert "nobody has acknowledged" in events[0].message
        await asyncio.sleep(1)
        lefts = [generate.time_left_ms for generate in world.server.generates]
        assert lefts[0] == 7000
        assert lefts == sorted(lefts, reverse=True)
        assert world.server.cancels[-1].attempt == len(lefts)


@in_virtual_time
async def test_an_outage_of_our_own_is_bridged():
    async with World() as world:
        events: list[Event] = []
        world.requester.submit(spec(max_tokens=50), events.append)
        await asyncio.sleep(0.2)
        world.bus.disconnect()
        await asyncio.sleep(5)
        world.bus.reconnect()
        await asyncio.sleep(2)
        assert_whole(events, "r", 1, 50)


@in_virtual_time
async def test_a_new_leader_is_asked_at_once():
    async with World() as world:
        await world.server.beat()
        events: list[Event] = []
        world.requester.submit(spec(max_tokens=50), events.append)
        await asyncio.sleep(0.2)
        assert world.requester.heartbeat is not None
        assert world.requester.heartbeat_age_s == pytest.approx(0.2)
        world.server_bus.disconnect()
        second = FakeServer(world.broker.connect("second"), epoch=2)
        await second.start()
        await second.beat()
        await asyncio.sleep(1)
        assert_whole(events, "r", 1, 50)
        assert second.generates[0].attempt == 2
        assert len(second.generates[0].choices[0].ids) > 4
        late = Heartbeat(scheduler="s", model=MODEL, epoch=1)
        await second.send(subjects.heartbeat(MODEL), late)
        await asyncio.sleep(0.01)
        assert world.requester.heartbeat.epoch == 2


@in_virtual_time
async def test_failures_and_rejections_reach_the_listener():
    async with World() as world:
        world.server.is_mute = True
        heard: list[Event] = []
        for name in ("a", "b"):
            world.requester.submit(spec(name), heard.append)
        await asyncio.sleep(0.01)
        reply = world.server.generates[0].reply
        full = Rejected(
            request_id="a",
            attempt=1,
            code="queue_full",
            message="m",
            is_client_fault=False,
            retry_after_s=3.0,
        )
        await world.server.send(reply, full)
        await world.server.send(reply, Failed(request_id="b", attempt=1, code="poison", message="n"))
        await world.server.send(reply, Failed(request_id="c", attempt=1, code="poison", message="n"))
        await asyncio.sleep(0.01)
        assert heard == [RequestFailed("queue_full", "m", False, 3.0), RequestFailed("poison", "n")]
        assert world.requester.num_live == 0


@in_virtual_time
async def test_probes_are_answered_and_strangers_rows_cancelled_once_a_second():
    async with World() as world:
        answer = await world.server_bus.request(subjects.life("gw"), b"", timeout_s=1)
        assert answer.data == b""
        rows = Tokens(epoch=1, rows=(TokenRow(request_id="stranger", attempt=3, index=0, ids=pack_ids([1])),))
        for _ in range(30):
            await world.server.send(subjects.out("gw"), rows)
            await asyncio.sleep(0.1)
        assert set(world.server.cancels) == {Cancel(request_id="stranger", attempt=3)}
        assert 2 <= len(world.server.cancels) <= 4
        assert world.requester.counters["unknown_rows"] == 30


@in_virtual_time
async def test_garbage_on_its_subjects_is_counted():
    async with World() as world:
        for subject in (subjects.out("gw"), subjects.heartbeat(MODEL)):
            for data in (
                b"",
                b"\xff" * 100,
                b"\x81" * 5000,
                messages.encode(Cancel(request_id="r", attempt=1)),
            ):
                await world.server_bus.publish(subject, data)
        await asyncio.sleep(0.01)
        assert world.requester.counters["undecodable"] == 6
        assert world.requester.counters["unexpected"] == 2
        events = [event async for event in world.requester.generate(spec())]
        assert_whole(events, "r", 1, 5)


@in_virtual_time
async def test_bad_requests_are_refused():
    async with World() as world:
        for wrong in (spec("a.b"), spec("*"), spec(""), spec(num_choices=0), spec(max_tokens=0)):
            with pytest.raises(ValueError, match="request"):
                world.requester.submit(wrong, lambda event: None)
        world.requester.submit(spec(), lambda event: None)
        with pytest.raises(ValueError, match="runs already"):
            world.requester.submit(spec(), lambda event: None)
        assert world.requester.num_live == 1


@in_virtual_time
async def test_closing_ends_what_runs():
    world = World()
    events: list[Event] = []
    async with world:
        world.requester.submit(spec(max_tokens=1000), events.append)
        await asyncio.sleep(0.1)
    assert isinstance(events[-1], RequestFailed)
    assert events[-1].code == "shutting_down"
    await asyncio.sleep(0.1)
    assert world.server.cancels == [Cancel(request_id="r", attempt=1)]
    with pytest.raises(RuntimeError):
        world.requester.submit(spec(), events.append)


PROMPT = [5, 6, 7, 8, 9, 10, 11, 12]


@in_virtual_time
async def test_log_probabilities_come_once_and_the_prompts_first():
    async with World() as world:
        sampling = Sampling(num_logprobs=2, num_prompt_logprobs=1)
        events: list[Event] = []
        ticket = world.requester.submit(spec(prompt=PROMPT, num_choices=2, sampling=sampling), events.append)
        assert ticket.num_cached_tokens is None
        await asyncio.sleep(1)
        assert_whole(events, "r", 2, 5, num_logprobs=2, num_prompt_logprobs=1, prompt=PROMPT)
        assert ticket.num_cached_tokens == 1
        assert len(world.server.generates) == 1


@in_virtual_time
async def test_what_is_told_of_the_prompt_is_not_asked_for_again():
    async with World() as world:
        sampling = Sampling(num_logprobs=0, num_prompt_logprobs=0)
        events: list[Event] = []
        world.requester.submit(spec(prompt=PROMPT, sampling=sampling, max_tokens=50), events.append)
        await asyncio.sleep(0.2)
        world.bus.disconnect()
        await asyncio.sleep(1)
        world.bus.reconnect()
        await asyncio.sleep(2)
        assert_whole(events, "r", 1, 50, num_logprobs=0, num_prompt_logprobs=0, prompt=PROMPT)
        asked = [generate.sampling.num_prompt_logprobs for generate in world.server.generates]
        assert asked[0] == 0
        assert set(asked[1:]) == {None}
        assert len(asked) > 1


@in_virtual_time
async def test_an_owner_that_stops_hears_nothing_more_of_what_was_held_back():
    async with World() as world:
        events: list[Event] = []
        sampling = Sampling(num_prompt_logprobs=0)
        ids = pack_ids([1, 2])

        def hear(event: Event) -> None:
            events.append(event)
            if isinstance(event, NewTokens):
                ticket.end_choice(event.choice)

        world.server.is_mute = True
        ticket = world.requester.submit(spec(prompt=[1, 2], num_choices=2, sampling=sampling), hear)
        await asyncio.sleep(0.01)
        rows = [TokenRow(request_id="r", choice=c, index=i, ids=ids) for c in (0, 1) for i in (0, 2)]
        await world.server.send(subjects.out("gw"), Tokens(epoch=1, rows=tuple(rows)))
        await asyncio.sleep(0.01)
        assert events == []
        told = PromptRow(request_id="r", start=1, logprobs=made_up_all([2], 1, 0))
        await world.server.send(subjects.out("gw"), Tokens(epoch=1, rows=(), prompts=(told,)))
        await asyncio.sleep(0.01)
        assert [type(event).__name__ for event in events] == ["PromptLogprobs", "NewTokens", "NewTokens"]
        assert [event.choice for event in events[1:]] == [0, 1]
        assert ticket.has_ended


def asked(number: int) -> dict:
    """Some ask for log-probabilities."""
    sampling = Sampling(num_logprobs=(None, 2)[number % 2], num_prompt_logprobs=(None, 0, 3)[number // 2 % 3])
    return {"prompt": PROMPT, "sampling": sampling}


async def chaos(seed: int, loss: float, num_requests: int) -> None:
    rng = random.Random(seed)
    async with World() as world:
        world.broker.faults = SeededFaults(seed, loss=loss, duplication=0.1, delay=0.2, max_delay_s=0.5)
        heard: dict[str, list[Event]] = {}
        for number in range(num_requests):
            name = f"r{number}"
            heard[name] = []
            world.requester.submit(
                spec(name, num_choices=1 + number % 3, max_tokens=8, timeout_s=300.0, **asked(number)),
                heard[name].append,
            )
        for _ in range(10):
            await asyncio.sleep(rng.random() * 3)
            bus = rng.choice([world.bus, world.server_bus])
            bus.disconnect()
            await asyncio.sleep(rng.random())
            bus.reconnect()
            world.server.epoch += rng.random() < 0.5
            await world.server.beat()
        await asyncio.sleep(400)
        assert world.requester.num_live == 0
        for number, (name, events) in enumerate(heard.items()):
            if isinstance(events[-1], RequestFailed):
                assert events[-1].code == "timeout"
                continue
            sampling = asked(number)["sampling"]
            assert_whole(
                events,
                name,
                1 + number % 3,
                8,
                num_logprobs=sampling.num_logprobs,
                num_prompt_logprobs=sampling.num_prompt_logprobs,
                prompt=PROMPT,
            )
        if loss <= 0.3:
            assert not any(isinstance(events[-1], RequestFailed) for events in heard.values())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), loss=st.sampled_from([0.0, 0.05, 0.3, 0.7]))
def test_every_request_is_answered_once_whatever_the_bus_does(seed, loss):
    virtual_time.run(chaos(seed, loss, 6))
