"""Executors that are gone, silent or stuck: what they had is asked for again, nothing is placed on them."""

import pytest

from pagebus.bus.messages import Failed, Hello, PoolGroup
from pagebus.scheduler.actions import Probe
from tests.unit.scheduler.model_executor import expected_ids
from tests.unit.scheduler.rig import Rig, executor


def running(num_executors=1, max_tokens=200):
    """A request in mid-stream on e0."""
    names = [f"e{i}" for i in range(num_executors)]
    rig = Rig([executor(name, pool=(PoolGroup(num_blocks=64),)) for name in names])
    rig.turn()
    rig.turn()
    rig.ask("a", list(range(30)), max_tokens)
    for _ in range(20):
        rig.turn()
    (holder,) = [name for name, each in rig.executors.items() if each.rows]
    return rig, holder


def failures(rig):
    return [reply for reply in rig.replies if isinstance(reply, Failed)]


def wait(rig, seconds, *, says_hello):
    """Time passes and nothing is done; executors perhaps still say hello."""
    for _ in range(round(seconds / 0.05)):
        rig.now += 0.05
        if says_hello:
            for each in rig.executors.values():
                rig.core.on_hello(each.hello(), rig.now)
        rig.core.on_tick(rig.now)


def probes(rig):
    found = [action for action in rig.core._book.out if isinstance(action, Probe)]
    rig.core._book.out = [action for action in rig.core._book.out if not isinstance(action, Probe)]
    return found


def test_one_that_owes_and_is_not_heard_is_probed_and_gone_at_the_second_answer():
    rig, holder = running()
    wait(rig, 0.2, says_hello=False)
    assert probes(rig) == []
    wait(rig, 0.1, says_hello=False)
    assert probes(rig) == [Probe(holder)]
    rig.core.on_no_responders(holder, rig.now)
    assert rig.core.figures.num_executors == 1
    wait(rig, 0.25, says_hello=False)
    assert probes(rig) == [Probe(holder)]
    rig.core.on_no_responders(holder, rig.now)
    assert rig.core.figures.num_executors == 0
    rig.plan()
    (failed,) = failures(rig)
    assert failed.is_retryable
    assert "is gone from the bus" in failed.message


def test_a_sign_of_life_between_two_answers_counts():
    rig, holder = running()
    rig.core.on_no_responders(holder, rig.now)
    rig.core.on_hello(rig.executors[holder].hello(), rig.now)
    rig.core.on_no_responders(holder, rig.now)
    assert rig.core.figures.num_executors == 1


@pytest.mark.parametrize(("has_work", "silence_s"), [(True, 2.0), (False, 3.0)])
def test_silence(has_work, silence_s):
    rig, _ = running(max_tokens=200 if has_work else 21)
    if not has_work:
        rig.run()
        rig.turn()
    heard_s = next(iter(rig.core._executors.values())).heard_s
    wait(rig, heard_s + silence_s - rig.now - 0.05, says_hello=False)
    assert rig.core.figures.num_executors == 1
    wait(rig, 0.15, says_hello=False)
    assert rig.core.figures.num_executors == 0


def test_a_stuck_executor_says_hello_and_is_given_up_and_gets_nothing_until_it_moves():
    rig, holder = running(num_executors=2)
    core = rig.core._executors[holder]
    core.pace.step_s = 0.01  # it has shown its pace
    other = next(name for name in rig.executors if name != holder)
    wait(rig, 2.9, says_hello=True)
    assert failures(rig) == []
    wait(rig, 0.3, says_hello=True)
    rig.plan()
    (failed,) = failures(rig)
    assert "has work and did none for 3." in failed.message
    rig.executors.pop(holder).lease.clear()
    rig.run()
    assert rig.ends == {"a": "finished"}
    rig.check_results(lambda _: expected_ids(list(range(30)), 200))
    assert rig.core._executors[other].rows == {}


def is_given_up(rig):
    rig.plan()
    return bool(failures(rig))


def progressing(rig, seconds, *, each_s, state="serving", slowest_ms=0):
    """Hellos each second whose counter rises every `each_s`, and no step ends."""
    (name,) = rig.executors
    began_s = rig.now
    while rig.now - began_s < seconds:
        rig.now += 0.1
        if round((rig.now - began_s) * 10) % 10 == 0:
            hello = rig.executors[name].hello()
            fields = {field: getattr(hello, field) for field in hello.__struct_fields__}
            fields["progress"] = 1 + int((rig.now - began_s) / each_s)
            rig.core.on_hello(Hello(**{**fields, "state": state, "slowest_ms": slowest_ms}), rig.now)
        rig.core.on_tick(rig.now)


def test_one_that_gets_on_is_slow_and_not_stuck_however_long_its_step_takes():
    rig, holder = running()
    rig.core._executors[holder].pace.step_s = 0.01
    progressing(rig, 120.0, each_s=1.9)
    assert not is_given_up(rig)
    progressing(rig, 5.5, each_s=1e9)
    assert is_given_up(rig)


def test_parts_that_are_known_to_take_long_may_take_long():
    rig, _ = running()
    progressing(rig, 60.0, each_s=9.0, slowest_ms=2000)
    assert not is_given_up(rig)
    assert rig.core.figures.stalled_ms == 0
    progressing(rig, 13.0, each_s=1e9, slowest_ms=2000)
    assert is_given_up(rig)


def test_one_that_compiles_is_never_stuck():
    rig, _ = running()
    progressing(rig, 300.0, each_s=1e9, state="compiling")
    assert not is_given_up(rig)
    assert rig.core.figures.num_loading == 1
    assert rig.core.figures.stalled_ms == 0


def test_before_anything_is_known_of_it_a_part_may_take_five_seconds():
    rig, holder = running()
    assert rig.core._executors[holder].pace.step_s == 0.0
    wait(rig, 4.8, says_hello=True)
    assert not is_given_up(rig)
    wait(rig, 0.5, says_hello=True)
    assert is_given_up(rig)


@pytest.mark.parametrize("says_hello", [True, False])
def test_work_that_nobody_does_is_told_with_its_time(says_hello):
    rig, holder = running()
    rig.core._executors[holder].pace.step_s = 0.01
    assert rig.core.figures.stalled_ms == 0
    for _ in range(70):
        wait(rig, 0.1, says_hello=says_hello)
        rig.plan()  # requesters ask again, and wait
    assert 6500 <= rig.core.figures.stalled_ms <= 7500
    loading = Hello(executor="new", model="m", pool=(), max_model_len=0, state="loading")
    rig.core.on_hello(loading, rig.now)
    wait(rig, 1.0, says_hello=says_hello)
    assert rig.core.figures.stalled_ms == 0, "one is on its way"
    for _ in range(40):
        wait(rig, 0.1, says_hello=says_hello)
        rig.plan()
    assert 0 < rig.core.figures.stalled_ms < 4500, "it is not: time counts from when it was heard last"
    rig.core.on_reconnect(rig.now)
    rig.core.on_tick(rig.now)
    assert rig.core.figures.stalled_ms < 100, "we were away ourselves"


def test_an_idle_executor_is_never_stuck():
    rig, _ = running(max_tokens=21)
    rig.run()
    for _ in range(30):
        rig.turn(1.0)
    assert rig.core.figures.num_executors == 1
