"""Executors that load, drain and leave: rows go on elsewhere, nobody is suspected, blocks come back."""

import pytest

from pagebus.bus.messages import Failed, Hello, PoolGroup, StepDone
from pagebus.scheduler.presence import LATE_S, LOADING_SILENCE_S, Presence
from tests.unit.scheduler.model_executor import expected_ids
from tests.unit.scheduler.rig import Rig, executor

PROMPT = list(range(30))


def running(num_executors=2, num_requests=3, max_tokens=60):
    names = [f"e{i}" for i in range(num_executors)]
    rig = Rig([executor(name, pool=(PoolGroup(num_blocks=64),)) for name in names])
    rig.turn()
    rig.turn()
    for number in range(num_requests):
        rig.ask(f"q{number}", PROMPT, max_tokens)
    for _ in range(10):
        rig.turn()
    return rig


def add(rig, one):
    rig.executors[one.name] = one
    rig.to_core.append(one.hello())


def say(rig, name, state):
    """The executor says so now."""
    hello = rig.executors[name].hello()
    rig.core.on_hello(Hello(**{**_fields(hello), "state": state}), rig.now)


def _fields(hello):
    return {field: getattr(hello, field) for field in hello.__struct_fields__}


def check_all(rig, num_requests=3, max_tokens=60):
    assert rig.ends == {f"q{number}": "finished" for number in range(num_requests)}
    rig.check_results(lambda _: expected_ids(PROMPT, max_tokens))
    assert not [reply for reply in rig.replies if isinstance(reply, Failed)]


def test_rows_of_one_that_drains_go_on_at_the_other():
    rig = running()
    busy = [name for name, each in rig.executors.items() if each.rows]
    assert busy
    for name in busy[:1]:
        say(rig, name, "draining")
    for _ in range(4):
        rig.turn()
    assert rig.executors[busy[0]].rows == {}, "handed over at once"
    assert rig.core.figures.num_executors == 1
    assert rig.core.figures.num_preemptions == 0
    rig.ask("q3", PROMPT, 60)
    for _ in range(4):
        rig.turn()
    assert rig.executors[busy[0]].rows == {}, "nothing new is placed there"
    rig.run()
    check_all(rig, 4)
    assert set(rig.attempts.values()) == {1}, "nobody had to ask again"


def test_without_another_one_rows_go_on_where_they_are():
    rig = running(num_executors=1)
    say(rig, "e0", "draining")
    held = dict(rig.executors["e0"].rows)
    assert held
    for _ in range(5):
        rig.turn()
    assert rig.executors["e0"].rows.keys() == held.keys()
    rig.ask("q3", PROMPT, 60)
    for _ in range(5):
        rig.turn()
    assert rig.core.figures.num_waiting == 1
    add(rig, executor("e1", pool=(PoolGroup(num_blocks=64),)))
    for _ in range(8):
        rig.turn()
        say(rig, "e0", "draining")
    assert rig.executors["e0"].rows == {}, "as soon as there is one"
    rig.run()
    check_all(rig, 4)


def test_one_that_left_is_forgotten_at_once_and_nobody_is_a_suspect():
    rig = running(num_executors=1)
    rig.core.on_hello(Hello(**{**_fields(rig.executors["e0"].hello()), "state": "left"}), rig.now)
    left = rig.executors.pop("e0")
    rig.plan()
    failures = [reply for reply in rig.replies if isinstance(reply, Failed)]
    assert len(failures) == 3
    assert all(each.is_retryable and not each.is_suspect and not each.was_sole_suspect for each in failures)
    assert rig.core.figures.num_executors == 0
    rig.core.on_hello(left.hello(), rig.now + 0.1)  # said before it left, and arrives late
    assert rig.core.figures.num_executors == 0
    add(rig, executor("e0", pool=(PoolGroup(num_blocks=64),)))  # a new process of the same name
    rig.run()
    assert rig.ends == {f"q{number}": "finished" for number in range(3)}
    rig.check_results(lambda _: expected_ids(PROMPT, 60))


@pytest.mark.parametrize("state", ["loading", "left"])
def test_one_that_loads_or_left_takes_nothing(state):
    rig = Rig([])
    hello = Hello(executor="e9", model="m", pool=(), max_model_len=0, state=state)
    rig.core.on_hello(hello, rig.now)
    rig.ask("q0", PROMPT, 10)
    rig.core.on_tick(rig.now)
    figures = rig.core.figures
    assert (figures.num_executors, figures.num_waiting) == (0, 1)
    assert figures.num_loading == (state == "loading")
    assert rig.core.counters["hello_invalid"] == 0


def test_loading_ends_with_the_last_word_or_by_silence():
    presence = Presence()
    loading = Hello(executor="e", model="m", pool=(), max_model_len=0, state="loading")
    assert not presence.is_here(loading, 10.0)
    assert presence.num_loading(10.0 + LOADING_SILENCE_S - 0.1) == 1
    assert presence.num_loading(10.0 + LOADING_SILENCE_S) == 0
    assert not presence.is_here(loading, 20.0)
    ready = Hello(executor="e", model="m", pool=(PoolGroup(num_blocks=1),), max_model_len=1)
    assert presence.is_here(ready, 20.1)
    assert presence.num_loading(20.1) == 0
    left = Hello(executor="e", model="m", pool=(), max_model_len=0, state="left", epoch=3)
    late = Hello(executor="e", model="m", pool=(PoolGroup(num_blocks=1),), max_model_len=1, epoch=3)
    assert not presence.is_here(left, 30.0)
    assert not presence.is_here(late, 30.0 + LATE_S - 0.1)
    assert presence.is_here(late, 30.0 + LATE_S)


@pytest.mark.parametrize("kind", [Hello, StepDone])
def test_a_message_that_cannot_be_handled_begins_anew_with_its_executor_alone(kind):
    rig = running()
    name, other = sorted(rig.executors, key=lambda name: -len(rig.executors[name].rows))[:2]
    message = (
        rig.executors[name].hello()
        if kind is Hello
        else StepDone(executor=name, epoch=1, plan=1, num_steps=1)
    )
    num_rows = len(rig.core._executors[name].rows)
    assert num_rows
    rig.core.on_fault(message, rig.now)
    rig.plan()
    failures = [reply for reply in rig.replies if isinstance(reply, Failed)]
    assert len(failures) == num_rows
    assert all(each.is_retryable and not each.is_suspect for each in failures)
    assert not rig.core._executors[other].is_lost
    rig.run()
    assert rig.ends == {f"q{number}": "finished" for number in range(3)}
    rig.check_results(lambda _: expected_ids(PROMPT, 60))
