"""`/health`: 503 only where there is work and nobody has got on with it for a while."""

from dataclasses import dataclass

import httpx
import msgspec

from pagebus.bus.messages import Heartbeat
from pagebus.gateway.progress import INTERVAL_S, STALL_S, ProgressWatch
from tests.support.gateway import gateway


@dataclass
class Leader:
    """A requester as far as the watch looks at it."""

    heartbeat: Heartbeat | None = None
    heartbeat_age_s: float = float("inf")
    num_live: int = 0


class Watched:
    """A watch with a clock of its own, looking every half second."""

    def __init__(self) -> None:
        self.now_s = 50.0
        self.leader = Leader()
        self.watch = ProgressWatch(self.leader, self.leader, lambda: self.now_s)  # type: ignore[arg-type]

    def beat(self, **fields) -> None:
        defaults = {"scheduler": "s", "model": "m", "epoch": 1, "num_executors": 1}
        self.leader.heartbeat, self.leader.heartbeat_age_s = Heartbeat(**{**defaults, **fields}), 0.0

    def wait(self, seconds: float, *, stalled_from_s: float | None = None, beats: bool = True) -> str | None:
        """So much later, with heartbeats that tell a stall or none at all; the reason at the end."""
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            self.now_s += INTERVAL_S
            self.leader.heartbeat_age_s += INTERVAL_S
            if beats:
                stalled_s = 0.0 if stalled_from_s is None else self.now_s - stalled_from_s
                self.beat(stalled_ms=int(stalled_s * 1000), num_executors=stalled_from_s is None)
            self.watch.note()
        return self.watch.reason


def test_nothing_is_wrong_without_work_or_with_progress() -> None:
    one = Watched()
    assert one.wait(60.0, beats=False) is None, "nobody was ever heard, and nobody waits"
    assert one.wait(60.0) is None


def test_a_stall_that_the_leader_tells_of_shows_in_time() -> None:
    one = Watched()
    one.wait(5.0)
    assert one.wait(STALL_S - 1, stalled_from_s=one.now_s) is None
    reason = one.wait(2.0, stalled_from_s=one.now_s - STALL_S + 1)
    assert reason is not None
    assert "no executor" in reason
    assert one.wait(0.5) is None, "somebody gets on again"


def test_before_any_executor_has_come_nobody_is_late() -> None:
    one = Watched()
    assert one.wait(100.0, stalled_from_s=one.now_s) is None


def test_without_a_leader_only_waiting_requests_matter() -> None:
    one = Watched()
    one.wait(5.0)
    assert one.wait(60.0, beats=False) is None, "idle"
    one.leader.num_live = 3
    assert one.wait(STALL_S - 1, beats=False) is None
    reason = one.wait(2.0, beats=False)
    assert reason is not None
    assert "no scheduler" in reason
    one.leader.num_live = 0
    assert one.wait(0.5, beats=False) is None


def test_a_stopped_machine_is_not_a_stall() -> None:
    one = Watched()
    one.leader.num_live = 3
    one.wait(5.0)
    one.now_s += 600.0
    one.leader.heartbeat_age_s += 600.0
    assert one.wait(0.5, beats=False) is None
    assert one.wait(3.0) is None
    one.now_s += 600.0
    one.leader.heartbeat_age_s += 600.0
    assert one.wait(2.0, beats=False) is None
    assert one.wait(STALL_S, beats=False) is not None, "nobody else has come back"


async def test_health_over_http(tmp_path) -> None:
    async with gateway(tmp_path) as server, httpx.AsyncClient(base_url=server.url) as client:
        assert (await client.get("/health")).json() == {"status": "ok", "reason": None}
        server.requester.heartbeat = msgspec.structs.replace(server.requester.heartbeat, stalled_ms=9000)
        await client.get("/health")
        answer = await client.get("/health")
        assert answer.status_code == 503
        assert answer.json()["status"] == "stalled"
        assert "9 s" in answer.json()["reason"]
