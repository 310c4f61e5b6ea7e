"""Every subject of pagebus, as functions; nothing else in the project spells one.

```
pagebus.<model>.generate        requesters  -> schedulers    Generate, Cancel
pagebus.<model>.hello           executors   -> schedulers    Hello
pagebus.<model>.done            executors   -> schedulers    StepDone
pagebus.<model>.heartbeat       scheduler   -> everybody     Heartbeat
pagebus.plan.<executor>         scheduler   -> one executor  Plan
pagebus.out.<requester>         scheduler, executors -> one requester  Accepted, Rejected, Tokens, Failed
pagebus.life.<requester>        executors   -> one requester  empty probes with a reply
pagebus.api.<model>.generate    NATS clients -> gateways      JSON requests (public)
pagebus.api.<model>.cancel      NATS clients -> gateways      JSON cancels (public)
pagebus.api.<model>.join        gateway     -> gateways      who runs this request, that its reader lost?
pagebus.stream.<request id>     gateway     -> NATS clients   JSON events (public)
```
"""

import hashlib
import re

_PART = re.compile(r"[A-Za-z0-9_-]{1,64}")
_MODEL_ENDINGS = frozenset({"generate", "hello", "done", "heartbeat"})
_NOT_SLUG = re.compile(r"[^A-Za-z0-9_-]+")

BUCKET = "pagebus"
"""The key-value bucket that holds leadership."""

STREAMS_BUCKET = "pagebus-streams"
"""The key-value bucket that holds the records of stored streams and of idempotency keys."""

OUT_LOG = "pagebus-out"
"""The log of everything that was sent to requesters."""

ALL_OUT = "pagebus.out.*"
"""What `OUT_LOG` keeps: every requester's reply subject."""

GATEWAY_QUEUE = "gateways"
"""The queue group in which gateways serve public requests."""


class InvalidSubjectPartError(ValueError):
    """A subject's part is not of the form `[A-Za-z0-9_-]{1,64}`."""


def part(text: str) -> str:
    """`text` itself if it can be one part of a subject; raises `InvalidSubjectPartError` otherwise."""
    if not _PART.fullmatch(text):
        raise InvalidSubjectPartError(f"{text[:80]!r} cannot be a part of a subject: [A-Za-z0-9_-]{{1,64}}")
    return text


def _instance(text: str) -> str:
    """A process's part. The model subjects' last parts are refused: permissions hold wildcards such as
    `pagebus.*.hello`, which must match no process's own subject."""
    if text in _MODEL_ENDINGS:
        raise InvalidSubjectPartError(f"{text!r} cannot name a process: it names a kind of message")
    return part(text)


def is_part(text: str) -> bool:
    """Whether `text` can be one part of a subject."""
    return _PART.fullmatch(text) is not None


def model_part(model: str) -> str:
    """A model's part: a slug of its name and 8 hex digits of its sha256, so that names never collide."""
    slug = _NOT_SLUG.sub("-", model).strip("-")[:48] or "model"
    return f"{slug}-{hashlib.sha256(model.encode()).hexdigest()[:8]}"


def generate(model: str) -> str:
    """Where requesters publish `Generate` and `Cancel` for a model."""
    return f"pagebus.{model_part(model)}.generate"


def hello(model: str) -> str:
    """Where executors of a model publish `Hello`."""
    return f"pagebus.{model_part(model)}.hello"


def step_done(model: str) -> str:
    """Where executors of a model publish `StepDone`."""
    return f"pagebus.{model_part(model)}.done"


def heartbeat(model: str) -> str:
    """Where the model's leading scheduler publishes `Heartbeat`."""
    return f"pagebus.{model_part(model)}.heartbeat"


def plan(executor: str) -> str:
    """Where one executor receives its plans."""
    return f"pagebus.plan.{_instance(executor)}"


def out(requester: str) -> str:
    """The one reply subject of a requester process."""
    return f"pagebus.out.{_instance(requester)}"


def life(requester: str) -> str:
    """Where a requester process answers "are you there?" probes."""
    return f"pagebus.life.{_instance(requester)}"


def api_generate(model: str) -> str:
    """Where NATS clients publish JSON requests (public)."""
    return f"pagebus.api.{model_part(model)}.generate"


def api_cancel(model: str) -> str:
    """Where NATS clients publish JSON cancels (public)."""
    return f"pagebus.api.{model_part(model)}.cancel"


def api_join(model: str) -> str:
    """Where a gateway asks the others which of them runs a request that a client joins again."""
    return f"pagebus.api.{model_part(model)}.join"


def stream(request_id: str) -> str:
    """Where a gateway publishes a request's text and tokens as JSON events (public)."""
    return f"pagebus.stream.{part(request_id)}"


def leader_key(model: str) -> str:
    """The key of a model group's leadership record in `BUCKET`; written by take-over only."""
    return f"leader.{model_part(model)}"


def leader_beat_key(model: str) -> str:
    """The key under which the leader shows in `BUCKET` that it lives."""
    return f"beat.{model_part(model)}"
