"""What is repeated until acknowledged, and which requesters count as gone."""

from pagebus.bus.messages import StepDone
from pagebus.executor.liveness import Answer, Probes
from pagebus.executor.reports import Outbox


def done(num_steps: int, epoch: int = 1) -> StepDone:
    return StepDone(executor="ex", epoch=epoch, plan=1, num_steps=num_steps)


def test_the_outbox_repeats_in_order_until_acknowledged() -> None:
    outbox = Outbox()
    for num_steps in (1, 2, 3, 4):
        outbox.add(done(num_steps), 10.0)
    assert outbox.due(10.1) == []
    assert [d.num_steps for d in outbox.due(10.25)] == [1, 2, 3, 4]
    assert outbox.due(10.4) == []
    outbox.acknowledge(1, 2)
    outbox.acknowledge(0, 4)
    assert [d.num_steps for d in outbox.due(10.5)] == [3, 4]


def test_a_higher_epoch_empties_the_outbox() -> None:
    outbox = Outbox()
    outbox.add(done(1), 10.0)
    outbox.acknowledge(2, 0)
    assert outbox.due(99.0) == []
    outbox.add(done(2), 99.0)
    assert len(outbox) == 0
    outbox.add(done(1, epoch=3), 99.0)
    assert outbox.due(100.0) == [done(1, epoch=3)]


def test_who_is_gone() -> None:
    probes = Probes()
    none, silence, alive, unknown = Answer.NO_RESPONDERS, Answer.SILENCE, Answer.ALIVE, Answer.UNKNOWN
    assert not any(probes.note("a", answer, 0.0) for answer in (none, alive, none, silence, none))
    assert probes.note("a", none, 0.0)
    assert not probes.note("b", silence, 0.0)
    assert not probes.note("b", silence, 9.9)
    assert probes.note("b", silence, 10.0)
    assert not probes.note("b", unknown, 11.0)
    assert not probes.note("b", silence, 20.9)
    assert probes.note("b", silence, 21.0)
    probes.keep_only({"b"}, 30.0)
    assert not probes.note("a", none, 30.0)


def test_a_requester_is_remembered_for_a_while_without_rows() -> None:
    probes = Probes()
    probes.keep_only({"a"}, 0.0)
    assert not probes.note("a", Answer.NO_RESPONDERS, 0.1)
    probes.keep_only(set(), 0.5)
    probes.keep_only({"a"}, 9.0)
    assert probes.note("a", Answer.NO_RESPONDERS, 9.1), "its late rows end at once"
    probes.keep_only(set(), 9.5)
    probes.keep_only({"a"}, 18.5)
    assert not probes.note("a", Answer.SILENCE, 18.6), "nobody asked it for a while, it was not silent"
    probes.keep_only(set(), 28.6)
    assert not probes.note("a", Answer.NO_RESPONDERS, 28.7)
