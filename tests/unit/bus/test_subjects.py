import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagebus.bus import guard, subjects

BY_MODEL = [
    subjects.generate,
    subjects.hello,
    subjects.step_done,
    subjects.heartbeat,
    subjects.api_generate,
    subjects.api_cancel,
    subjects.leader_key,
    subjects.leader_beat_key,
]
BY_PROCESS = [subjects.plan, subjects.out, subjects.life]


@given(st.text(), st.sampled_from(BY_MODEL))
def test_any_model_name_gives_a_plain_subject(model, function):
    guard.check_publish(function(model.encode("utf-8", "replace").decode()))


@given(st.text(), st.sampled_from([*BY_PROCESS, subjects.stream]))
def test_any_other_part_is_plain_or_refused(text, function):
    try:
        subject = function(text)
    except subjects.InvalidSubjectPartError:
        return
    guard.check_publish(subject)
    assert subject.count(".") == 2


@pytest.mark.parametrize("function", BY_PROCESS)
@pytest.mark.parametrize("name", ["generate", "hello", "done", "heartbeat"])
def test_no_process_is_called_like_a_kind_of_message(function, name):
    with pytest.raises(subjects.InvalidSubjectPartError):
        function(name)


def test_names_that_look_alike_get_subjects_of_their_own():
    names = ["a/b", "a-b", "a b", "a.b", "A-b", "a--b", "", "model", "x" * 100, "x" * 101]
    assert len({subjects.generate(name) for name in names}) == len(names)
