"""What the HTTP routes of one gateway share: names, limits, the tokenizer, the running generations."""

import functools
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

from pagebus.bus.protocol import Bus
from pagebus.gateway.auth import Keys
from pagebus.gateway.counters import Counters
from pagebus.gateway.errors import ApiError
from pagebus.gateway.generations import Generations
from pagebus.gateway.progress import ProgressWatch
from pagebus.gateway.sampling_params import SamplingDefaults
from pagebus.gateway.sse import StreamClock
from pagebus.gateway.stored_streams import StoredStreams
from pagebus.gateway.submitter import Submitter
from pagebus.gateway.tokenizer import Tokenizer
from pagebus.gateway.tracing import NoTelemetry, Telemetry


@functools.cache  # looking it up reads the installed packages' files
def pagebus_version() -> str:
    """The installed version, or "0" where pagebus runs from a bare source tree."""
    try:
        return version("pagebus")
    except PackageNotFoundError:
        return "0"


@dataclass(frozen=True, kw_only=True)
class GatewayContext:
    """Made once by `service.py`. `served_names`: what clients may send as `model`, the first is shown."""

    served_names: Sequence[str]
    bus: Bus
    submitter: Submitter
    tokenizer: Tokenizer
    generations: Generations
    progress: ProgressWatch
    counters: Counters
    keys: Keys
    clock: StreamClock
    max_body_bytes: int
    request_timeout_s: float
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    telemetry: Telemetry = field(default_factory=NoTelemetry)
    streams: StoredStreams | None = None  # None: nothing is stored
    created: int = field(default_factory=lambda: int(time.time()))

    @functools.cached_property
    def fingerprint(self) -> str:
        """`system_fingerprint`: changes with the program's version and the model's name."""
        text = f"{pagebus_version()} {self.served_names[0]}"
        return "fp_" + hashlib.sha256(text.encode()).hexdigest()[:10]

    def tenant(self, headers: Sequence[tuple[bytes, bytes]]) -> str:
        """Whose request this is; "" where no keys are asked for."""
        return self.keys.tenant(headers) or ""

    def checked_model(self, name: str | None) -> str:
        """The name to answer with; raises a 404 for a model that is not served."""
        if name is None:
            return self.served_names[0]
        if name not in self.served_names:
            raise ApiError(
                404,
                f"the model {name[:200]!r} is not served here; this is {self.served_names[0]!r}",
                code="model_not_found",
                param="model",
            )
        return name
