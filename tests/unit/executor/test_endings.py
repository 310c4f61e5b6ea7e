"""What nothing follows is sent again after a reconnect, for as long as it may be lost."""

from pagebus.bus.messages import Failed, Message, StepDone, TokenRow, Tokens
from pagebus.executor.endings import KEPT_S, MAX_KEPT, Endings


def tokens(index: int, *, is_last: bool) -> Tokens:
    reason = "stop" if is_last else None
    return Tokens(epoch=1, rows=(TokenRow(request_id="r", index=index, finish_reason=reason),))


def test_only_endings_are_kept_and_in_order() -> None:
    endings = Endings()
    failed = Failed(request_id="r", attempt=1, code="x", message="y")
    messages: list[Message] = [tokens(1, is_last=False), tokens(2, is_last=True), failed]
    for message in (*messages, StepDone(executor="e", epoch=1, plan=1, num_steps=1)):
        endings.note("out", message, 1.0)
    assert endings.kept == [("out", message) for message in messages[1:]]


def test_they_are_forgotten_while_the_bus_is_there() -> None:
    endings = Endings()
    endings.note("out", tokens(1, is_last=True), 1.0)
    endings.note("out", tokens(2, is_last=True), 2.0)
    endings.forget(1.0 + KEPT_S)
    assert len(endings.kept) == 2
    endings.forget(2.0 + KEPT_S)
    assert [message for _, message in endings.kept] == [tokens(2, is_last=True)]


def test_their_number_is_bounded() -> None:
    endings = Endings()
    for number in range(MAX_KEPT + 10):
        endings.note("out", tokens(number, is_last=True), 0.0)
    assert len(endings.kept) == MAX_KEPT
    assert endings.kept[0][1] == tokens(10, is_last=True)
