"""`/health`, `/ready` and `/version`: whether requests get on, and whether new ones would be answered."""

import msgspec

from pagebus.gateway.context import GatewayContext, pagebus_version
from pagebus.gateway.limits import Receive, Scope, Send
from pagebus.gateway.progress import LEADER_SILENCE_S
from pagebus.gateway.responder import Endpoint, send_json


class Health(msgspec.Struct, frozen=True):
    """Body of `/health`: "ok", or "stalled" and why."""

    status: str = "ok"
    reason: str | None = None


class Version(msgspec.Struct, frozen=True):
    """Body of `/version`."""

    version: str


class Readiness(msgspec.Struct, frozen=True, kw_only=True):
    """Body of `/ready`. `reason` is null when ready; counts are the leader's newest, 0 without one."""

    is_ready: bool
    reason: str | None
    model: str
    num_executors: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    block_size: int = 0
    num_kv_tokens: int = 0
    max_model_len: int = 0
    full_model_len: int = 0
    num_running: int = 0
    num_waiting: int = 0


def readiness(context: GatewayContext) -> Readiness:
    """Whether a request would be answered now, and if not, why."""
    model = context.served_names[0]
    beat = context.submitter.heartbeat
    reason: str | None = None
    if context.generations.is_draining:
        reason = "this gateway is shutting down"
    elif not context.bus.is_connected:
        reason = "the message bus is not connected"
    elif beat is None:
        reason = "no scheduler has been heard yet"
    elif context.submitter.heartbeat_age_s >= LEADER_SILENCE_S:
        reason = f"no scheduler has been heard for {context.submitter.heartbeat_age_s:.1f} s"
    elif beat.num_executors < 1:
        reason = "the scheduler knows no executor"
    if beat is None:
        return Readiness(is_ready=False, reason=reason, model=model)
    return Readiness(
        is_ready=reason is None,
        reason=reason,
        model=model,
        num_executors=beat.num_executors,
        num_blocks=beat.num_blocks,
        num_free_blocks=beat.num_free_blocks,
        block_size=beat.block_size,
        num_kv_tokens=beat.num_blocks * beat.block_size,
        max_model_len=context.generations.max_model_len,
        full_model_len=beat.full_model_len,
        num_running=beat.num_running,
        num_waiting=beat.num_waiting,
    )


class HealthEndpoint(Endpoint):
    """200 while requests get on or there are none; 503 with a reason where there is work and no progress."""

    def __init__(self, context: GatewayContext) -> None:
        self._context = context

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer at once."""
        reason = self._context.progress.reason
        if reason is None:
            await send_json(send, 200, Health())
        else:
            await send_json(send, 503, Health("stalled", reason))


class ReadyEndpoint(Endpoint):
    """200 when ready, else 503 with the reason."""

    def __init__(self, context: GatewayContext) -> None:
        self._context = context

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with the state as it is now."""
        state = readiness(self._context)
        await send_json(send, 200 if state.is_ready else 503, state)


class VersionEndpoint(Endpoint):
    """The installed version."""

    def __init__(self) -> None:
        self._version = Version(pagebus_version())

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with the version."""
        await send_json(send, 200, self._version)
