"""A full queue is remembered for a moment, by tenant, and answered without asking again."""

import pytest

from pagebus.gateway.errors import ApiError
from pagebus.gateway.shedding import QUEUE_FULL, SHED_S, Shedding
from pagebus.requester.events import RequestFailed
from tests.support.gateway import app_client, fail

FULL = RequestFailed(QUEUE_FULL, "9 rows wait, at most 9 may", retry_after_s=7)


class Clock:
    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


def test_a_refusal_speaks_for_others_of_its_tenant_for_a_moment():
    clock = Clock()
    shedding = Shedding(clock)
    shedding.check("a")
    shedding.note("a", FULL)
    with pytest.raises(ApiError) as refused:
        shedding.check("a")
    assert (refused.value.status, refused.value.code) == (429, QUEUE_FULL)
    assert dict(refused.value.headers) == {b"retry-after": b"7"}
    shedding.check("b")
    clock.now_s += SHED_S
    shedding.check("a")


def test_other_failures_say_nothing():
    shedding = Shedding(Clock())
    shedding.note("a", RequestFailed("internal_error", "no"))
    shedding.check("a")


def test_many_tenants_take_little_room():
    shedding = Shedding(Clock())
    for number in range(10_000):
        shedding.note(str(number), FULL)
    shedding.check("0")
    with pytest.raises(ApiError):
        shedding.check("9999")


async def test_a_flood_reaches_the_scheduler_once(tmp_path):
    async with app_client(tmp_path, fail(QUEUE_FULL, retry_after_s=3)) as (client, requester):
        answers = [await client.post("/v1/completions", json={"prompt": "x"}) for _ in range(5)]
        assert [answer.status_code for answer in answers] == [429] * 5
        assert {answer.headers["retry-after"] for answer in answers} == {"3"}
        assert len(requester.submitted) < 5
