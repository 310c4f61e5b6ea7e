"""Requests that are turned away, cancelled, asked again, too late; and executors that are lost."""

import math

import pytest

from pagebus.bus.messages import (
    Accepted,
    Cancel,
    ChoiceState,
    Failed,
    PoolGroup,
    Rejected,
    Sampling,
    StepDone,
    Tokens,
    pack_handles,
    pack_ids,
)
from tests.unit.scheduler.model_executor import expected_ids
from tests.unit.scheduler.rig import Rig, executor, generate


def ready(num_blocks=8, num_executors=1, **config):
    pool = (PoolGroup(num_blocks=num_blocks),)
    rig = Rig([executor(f"e{i}", pool=pool) for i in range(num_executors)], **config)
    rig.turn()
    rig.turn()
    return rig


def answers(rig, message):
    rig.replies.clear()
    rig.core.on_generate(message, rig.now, {})
    rig.plan()
    return rig.replies


REFUSED = {
    "empty prompt": ({"prompt": ()}, "invalid_request", "prompt is empty"),
    "prompt fills the context": ({"prompt": range(128)}, "context_length_exceeded", "has 128 tokens"),
    "no tokens": ({"max_tokens": 0}, "invalid_request", "max_tokens is 0"),
    "negative tokens": ({"max_tokens": -5}, "invalid_request", "max_tokens is -5"),
    "negative id": ({"prompt": (5, -3)}, "invalid_request", "negative id -3"),
    "no choices": ({"choices": ()}, "invalid_request", "0 choices"),
    "too many choices": (
        {"choices": tuple(ChoiceState(index=i) for i in range(129))}, "invalid_request", "129 choices",
    ),
    "choice twice": ({"choices": (ChoiceState(index=1),) * 2}, "invalid_request", "must differ"),
    "negative choice": ({"choices": (ChoiceState(index=-1),)}, "invalid_request", "0 or more"),
    "broken stop ids": ({"stop_token_ids": b"abc"}, "invalid_request", "stop_token_ids: 3 bytes"),
    "many stop ids": ({"stop_token_ids": bytes(4 * 5000)}, "invalid_request", "more than 4096 stop ids"),
    "broken choice ids": ({"choices": (ChoiceState(index=0, ids=b"x"),)}, "invalid_request", "choice 0"),
    "NaN": ({"sampling": Sampling(temperature=math.nan)}, "invalid_request", "finite"),
    "other model": ({"model": "other"}, "model_not_found", "'other' is not 'm'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason(name):
    fields, code, text = REFUSED[name]
    rig = ready()
    (reply,) = answers(rig, generate(**fields))
    assert isinstance(reply, Rejected)
    assert (reply.code, reply.is_client_fault, reply.request_id) == (code, True, "a")
    assert text in reply.message
    rig.ask("next", [1, 2], 3)
    rig.run()
    assert rig.ends == {"next": "finished"}


@pytest.mark.parametrize(
    "fields",
    [
        {"reply": "pagebus.out.*"},
        {"reply": "pagebus.plan.e1"},
        {"reply": ""},
        {"life": "a b"},
        {"request_id": "a.b"},
        {"request_id": ""},
        {"attempt": 0},
        {"attempt": 1 << 40},
    ],
)
def test_without_an_address_nothing_is_answered(fields):
    rig = ready()
    assert answers(rig, generate(**fields)) == []
    assert rig.core.counters["generate_without_address"] == 1


def test_broken_prompt_bytes_are_refused():
    import msgspec

    (reply,) = answers(ready(), msgspec.structs.replace(generate(), prompt=b"12345"))
    assert (reply.code, reply.is_client_fault) == ("invalid_request", True)


def test_max_tokens_is_clipped_to_the_context():
    rig = ready()
    rig.ask("a", list(range(100)), 10**18)
    rig.run()
    assert rig.results["a"][0] == expected_ids(list(range(100)), 28)
    assert rig.core.figures.max_model_len == 128
    assert rig.core.figures.full_model_len > 128


def test_the_settings_bound_the_context_too():
    rig = ready(max_model_len=50)
    (reply,) = answers(rig, generate(prompt=range(50)))
    assert reply.code == "context_length_exceeded"
    assert "50 tokens" in reply.message


def test_the_queue_is_bounded_but_not_for_later_attempts():
    rig = ready(max_num_queued_reqs=2, max_num_seqs=1)
    for name in ("a", "b", "c"):
        rig.ask(name, [1, 2], 20)
        rig.plan()
    (reply,) = answers(rig, generate("d"))
    assert (reply.code, reply.is_client_fault) == ("queue_full", False)
    assert reply.retry_after_s >= 1
    assert "2 rows wait, at most 2" in reply.message
    (reply,) = answers(rig, generate("e", attempt=2))
    assert reply == Accepted(request_id="e", attempt=2, epoch=1)


def test_a_tenants_flood_keeps_no_other_tenant_out():
    rig = ready(max_num_queued_reqs=4, max_num_seqs=1)
    for number in range(5):
        rig.ask(f"flood{number}", [1, 2], 20, tenant="loud")
        rig.plan()
    (reply,) = answers(rig, generate("more", tenant="loud"))
    assert reply.code == "queue_full"
    accepted = [answers(rig, generate(f"modest{number}", tenant="quiet"))[0] for number in range(3)]
    assert [type(reply) for reply in accepted] == [Accepted, Accepted, Rejected]
    for number in range(20):  # many names are no way around the bound
        answers(rig, generate(f"other{number}", tenant=f"t{number}"))
    assert rig.core.figures.num_waiting <= 8


def test_what_waits_before_any_executor_is_known():
    rig = Rig()
    rig.ask("short", [1, 2, 3], 500)
    rig.ask("long", range(4000), 5)
    rig.turn()
    assert rig.core.figures.num_waiting == 2
    rig.executors["e1"] = executor("e1", pool=(PoolGroup(num_blocks=8),))
    rig.run()
    assert rig.ends == {"long": "context_length_exceeded", "short": "finished"}
    assert len(rig.results["short"][0]) == 125


def test_a_cancel_that_overtakes_its_generate():
    rig = ready()
    rig.core.on_cancel(Cancel(request_id="a", attempt=2), rig.now)
    assert answers(rig, generate(attempt=2)) == []
    assert answers(rig, generate(attempt=1)) == []
    assert answers(rig, generate(attempt=3)) == [Accepted(request_id="a", attempt=3, epoch=1)]


def test_a_cancel_of_a_choice_that_overtakes_its_generate():
    rig = ready()
    rig.core.on_cancel(Cancel(request_id="a", attempt=1, choices=(1,)), rig.now)
    rig.ask("a", [1, 2], 40, num_choices=3)
    for _ in range(4):
        rig.turn()
    assert {row.start.choice for row in rig.executors["e0"].rows.values()} == {0, 2}


def test_a_refusal_lasts_five_minutes():
    rig = ready()
    rig.core.on_cancel(Cancel(request_id="a", attempt=1), rig.now)
    for _ in range(298):
        rig.now += 1.0
        rig.core.on_tick(rig.now)
    assert answers(rig, generate()) == []
    for _ in range(3):
        rig.now += 1.0
        rig.core.on_tick(rig.now)
    assert len(answers(rig, generate())) == 1


def test_a_cancel_touches_no_higher_attempt():
    rig = ready()
    rig.core.on_generate(generate(attempt=3), rig.now, {})
    rig.core.on_cancel(Cancel(request_id="a", attempt=2), rig.now)
    assert rig.core.figures.num_waiting == 1
    rig.core.on_cancel(Cancel(request_id="a", attempt=3), rig.now)
    assert rig.core.figures.num_waiting == 0


def test_a_new_attempt_goes_on_after_the_ids_received():
    rig = ready()
    rig.ask("a", [1, 2, 3], 30)
    for _ in range(6):
        rig.turn()
    have = len(rig.results["a"][0])
    assert 0 < have < 30
    rig.ask_again("a")
    rig.plan()
    assert [ended.outcome for ended in rig.ended] == ["replaced"]
    rig.run()
    assert rig.results["a"][0] == expected_ids([1, 2, 3], 30)
    assert rig.ended[1].num_generated_tokens <= 30 - have
    rig.check_all_free()


def test_a_choice_whose_last_message_was_lost_gets_its_end_again():
    rig = ready()
    made = expected_ids([1, 2, 3], 4)
    choices = (
        ChoiceState(index=0, ids=pack_ids(made)),
        ChoiceState(index=1, ids=pack_ids(made[:2])),
        ChoiceState(index=2, finish_reason="stop"),
    )
    message = generate(attempt=2, choices=choices, stop_token_ids=pack_ids(made[1:2]))
    replies = answers(rig, message)
    ends = [
        (row.choice, row.index, row.finish_reason) for m in replies for row in m.rows if isinstance(m, Tokens)
    ]
    assert ends == [(0, 4, "length"), (1, 2, "stop")]
    assert [ended.outcome for ended in rig.ended] == ["finished"]


def test_a_request_out_of_time_fails_and_frees_its_blocks():
    rig = ready()
    rig.ask("a", [1, 2, 3], 100, time_left_ms=500)
    rig.ask("b", [1, 2, 3], 60)
    for _ in range(60):
        rig.turn(seconds=0.02)
    assert rig.ends["a"] == "timeout"
    rig.run()
    assert rig.ends["b"] == "finished"
    rig.check_all_free()


def test_accepted_again_every_fifteen_seconds():
    rig = Rig()
    rig.ask("a", [1], 3)
    rig.plan()
    for _ in range(46):
        rig.pass_time(1.0)
    rig.plan()
    assert rig.replies == [Accepted(request_id="a", attempt=1, epoch=1)] * 4


def test_a_doubled_generate_runs_once():
    rig = ready()
    rig.ask("a", [1, 2], 3)
    rig._send("a")
    rig.run()
    assert answers(rig, generate("a")) == []
    assert [ended.outcome for ended in rig.ended] == ["finished"]


# -- executors ----------------------------------------------------------------------------------------------


def test_a_silent_executor_is_given_up_and_requests_go_on_elsewhere():
    rig = ready(num_executors=2)
    for i in range(4):
        rig.ask(f"r{i}", [i, 2, 3], 60)
    for _ in range(5):
        rig.turn()
    gone = rig.executors.pop("e0")
    assert gone.rows
    for _ in range(5):
        rig.pass_time(1.0)
        rig.turn()
    lost = [reply for reply in rig.replies if isinstance(reply, Failed)]
    assert {(reply.code, reply.is_retryable) for reply in lost} == {("executor_lost", True)}
    assert len(lost) == 2
    rig.run()
    assert set(rig.ends.values()) == {"finished"}
    rig.check_results(lambda request_id: expected_ids([int(request_id[1]), 2, 3], 60))
    # It comes back as it was: it is emptied and used again.
    rig.executors["e0"] = gone
    for _ in range(5):
        rig.pass_time(1.0)
        rig.turn()
    assert not gone.rows
    assert rig.core.figures.num_executors == 2
    rig.check_all_free()


@pytest.mark.parametrize("is_hearing", [False, True])
def test_an_executor_that_restarts_under_its_name(is_hearing):
    rig = ready()
    rig.ask("a", [1, 2, 3], 100)
    for _ in range(20):
        rig.pass_time(0.2)
        rig.turn()
    rig.to_core.clear()
    rig.executors["e0"] = executor("e0", epoch=1 if is_hearing else 0, has_gap=is_hearing)
    for _ in range(3):
        rig.pass_time(1.0)
        rig.turn()
    rig.run()
    assert rig.results["a"][0] == expected_ids([1, 2, 3], 100)
    assert any(isinstance(reply, Failed) and reply.is_retryable for reply in rig.replies)
    rig.check_all_free()


def test_a_lost_plan_is_sent_again_after_a_gap_without_losing_rows():
    rig = ready(num_blocks=20)
    rig.ask("a", [1, 2, 3], 30)
    (lost,) = rig.plan()
    rig.to_executors.clear()
    rig.ask("b", [4, 5], 30)
    rig.now += 0.1
    rig.plan()
    rig.deliver_plan()
    hello = rig.to_core.pop()
    assert hello.has_gap
    rig.core.on_hello(hello, rig.now)
    assert lost in rig.plan()
    rig.run()
    assert not [reply for reply in rig.replies if isinstance(reply, Failed)]
    rig.check_all_free()


def test_a_row_that_failed_alone_ends_its_request_only():
    rig = ready(num_blocks=20)
    rig.ask("a", [1, 2, 3], 30, num_choices=2)
    rig.ask("b", [4, 5], 30)
    rig.turn()
    rig.turn()
    e0 = rig.executors["e0"]
    handle = next(handle for handle, row in e0.rows.items() if row.start.request_id == "a")
    e0.rows[handle].finish = "failed"
    e0.num_steps += 1
    done = StepDone(
        executor="e0",
        epoch=1,
        plan=e0.plan,
        num_steps=e0.num_steps,
        handles=pack_handles([handle]),
        num_computed=pack_handles([3]),
        num_made=b"\0",
        failed={handle: "NaN"},
    )
    rig.core.on_step_done(done, rig.now)
    rig.ends["a"] = "failed"
    rig.run()
    assert rig.ends == {"a": "failed", "b": "finished"}
    rig.check_all_free()


@pytest.mark.parametrize(
    "broken",
    [{"handles": b"123"}, {"num_made": b"\1"}, {"ids": b"\1"}, {"ids": bytes(4)}, {"num_computed": b""}],
)
def test_a_broken_report_gives_the_executor_up(broken):
    rig = ready()
    rig.ask("a", [1, 2, 3], 30)
    rig.turn()
    e0 = rig.executors["e0"]
    (handle,) = e0.rows
    fields = {
        "handles": pack_handles([handle]),
        "num_computed": pack_handles([3]),
        "num_made": b"\0",
    } | broken
    done = StepDone(executor="e0", epoch=1, plan=e0.plan, num_steps=e0.num_steps + 1, **fields)
    rig.core.on_step_done(done, rig.now)
    rig.plan()
    assert any(isinstance(reply, Failed) and reply.is_retryable for reply in rig.replies)


def test_an_old_leaders_rows_are_dropped_in_a_new_term():
    rig = ready()
    rig.ask("a", [1, 2, 3], 60)
    for _ in range(5):
        rig.turn()
    rig.core.become_leader(7, rig.now)
    rig.to_core.clear()
    rig.to_executors.clear()
    rig.to_core.append(rig.executors["e0"].hello())
    rig.ask_again("a")
    rig.run()
    assert rig.executors["e0"].epoch == 7
    assert rig.results["a"][0] == expected_ids([1, 2, 3], 60)
    rig.check_all_free()


def test_without_a_term_nothing_is_taken():
    rig = ready()
    rig.core.step_down()
    assert answers(rig, generate()) == []
    rig.core.on_hello(rig.executors["e0"].hello(), rig.now)
    assert rig.plan() == []
    assert rig.core.figures.num_executors == 0
