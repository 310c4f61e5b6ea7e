"""The settings of every service, one frozen dataclass each (msgspec checks them).

Flags, environment twins and TOML keys follow the field names: `max_model_len` is `--max-model-len`,
`PAGEBUS_MAX_MODEL_LEN` and the key `max_model_len`.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]
LoadFormat = Literal["auto", "safetensors", "dummy"]
KvCacheDtype = Literal["auto", "fp8", "fp8_e4m3", "int8"]
Quantization = Literal["none", "fp8"]
BUNDLED_MODEL_NAME = "pagebus-mini"
"""Name of the bundled model, served where no model is named."""

GenerationConfig = Literal["auto", "vllm"]
LogLevel = Literal["debug", "info", "warning", "error"]

Text = Annotated[str, Meta(max_length=4096)]
Count = Annotated[int, Meta(ge=1, le=1 << 31)]


@dataclass(frozen=True, kw_only=True)
class CommonSettings:
    """What every service needs to know."""

    model: Annotated[Text, Meta(description="Hugging Face directory or hub id; none: the bundled model")] = ""
    served_model_name: Annotated[
        tuple[Text, ...], Meta(description="name(s) that clients use (default: MODEL as given)")
    ] = ()
    revision: Annotated[Text, Meta(description="hub revision (branch, tag or commit)")] = ""
    max_model_len: Annotated[
        Annotated[int, Meta(ge=0, le=1 << 31)],
        Meta(description="context in tokens; 0: what model and pool allow"),
    ] = 0
    otlp_traces_endpoint: Annotated[
        Text, Meta(description="OTLP/HTTP endpoint for traces; OTEL_EXPORTER_OTLP_ENDPOINT works too")
    ] = ""
    log_level: Annotated[LogLevel, Meta(description="least level that is logged")] = "info"
    name: Annotated[Text, Meta(description="instance name on the bus (default: a random one)")] = ""
    drain_timeout_s: Annotated[
        float,
        Meta(ge=0, le=1e6, description="seconds that running requests may go on after SIGTERM"),
    ] = 25.0

    @property
    def model_name(self) -> str:
        """The name that clients see and that the bus's subjects are made from."""
        if self.served_model_name:
            return self.served_model_name[0]
        return self.model or BUNDLED_MODEL_NAME


@dataclass(frozen=True, kw_only=True)
class GatewaySettings(CommonSettings):
    """HTTP and text."""

    host: Annotated[Text, Meta(description="address to listen on; 0.0.0.0 for all")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="port to listen on")] = 8000
    api_key: Annotated[tuple[Text, ...], Meta(description="key(s), one of which clients must send")] = ()
    chat_template: Annotated[Text, Meta(description="Jinja chat template file, instead of the model's")] = ""
    generation_config: Annotated[
        GenerationConfig,
        Meta(description="auto: the model's generation_config.json gives defaults; vllm: it does not"),
    ] = "auto"
    max_body_bytes: Annotated[Count, Meta(description="largest request body, bytes")] = 8 << 20
    request_timeout_s: Annotated[float, Meta(gt=0, le=1e6, description="a request's deadline, seconds")] = (
        600.0
    )
    keep_alive_interval_s: Annotated[
        float, Meta(gt=0, le=1e6, description="seconds of pause after which a stream gets a comment")
    ] = 10.0
    slow_reader_timeout_s: Annotated[
        float, Meta(gt=0, le=1e6, description="seconds after which a client that reads nothing is cut off")
    ] = 30.0
    stream_interval: Annotated[
        Annotated[int, Meta(ge=0, le=1024)],
        Meta(description="tokens an event of a stream; 0: one, and under load what has gathered"),
    ] = 0
    resume: Annotated[
        bool, Meta(description="store streams, so that clients can go on with one after a cut")
    ] = True
    reuse_port: Annotated[
        bool, Meta(description="share the port with other gateways of this user (SO_REUSEPORT)")
    ] = False


@dataclass(frozen=True, kw_only=True)
class SchedulerSettings(CommonSettings):
    """Continuous batches and KV blocks."""

    max_num_seqs: Annotated[Count, Meta(description="most rows running at once on an executor")] = 256
    max_num_batched_tokens: Annotated[Count, Meta(description="token budget of a step")] = 2048
    horizon: Annotated[
        Annotated[int, Meta(ge=0, le=64)],
        Meta(description="steps a plan lays out ahead; 0: chosen from the step time, 1: lock-step"),
    ] = 0
    enable_prefix_caching: Annotated[bool, Meta(description="reuse the KV blocks of equal prefixes")] = True
    tenant_weight: Annotated[
        tuple[Text, ...],
        Meta(
            description="share under load of an API key, as KEY=WEIGHT with the first 16 hex digits of its "
            "sha256; else 1"
        ),
    ] = ()
    max_num_queued_reqs: Annotated[Count, Meta(description="most requests waiting before 429")] = 4096


@dataclass(frozen=True, kw_only=True)
class ExecutorSettings(CommonSettings):
    """Tensors."""

    dtype: Annotated[Dtype, Meta(description="data type of weights and activations")] = "auto"
    device: Annotated[Device, Meta(description="where to run; auto: CUDA when there is one")] = "auto"
    load_format: Annotated[LoadFormat, Meta(description="dummy: random weights, for speed tests")] = "auto"
    block_size: Annotated[Literal[16], Meta(description="tokens a KV block")] = 16
    kv_cache_dtype: Annotated[
        KvCacheDtype,
        Meta(description="data type of keys and values; fp8 is e4m3; int8 on a CPU only; auto: the model's"),
    ] = "auto"
    quantization: Annotated[
        Quantization, Meta(description="fp8: weights and their inputs in e4m3, scaled while loading (CUDA)")
    ] = "none"
    batch_invariant: Annotated[
        bool,
        Meta(description="the same bits for a request in every batch; slower on CUDA, always so on a CPU"),
    ] = False
    gpu_memory_utilization: Annotated[
        float, Meta(gt=0, le=1, description="share of the GPU's memory for weights, activations and KV")
    ] = 0.9
    kv_cache_memory: Annotated[
        Text, Meta(description="KV memory on the CPU, e.g. 4GiB; auto: by free memory")
    ] = "auto"
    max_num_seqs: Annotated[Count, Meta(description="most rows running at once on an executor")] = 256
    max_num_batched_tokens: Annotated[Count, Meta(description="token budget of a step")] = 2048
    enforce_eager: Annotated[
        bool, Meta(description="no CUDA graphs: a quicker start, and slower decoding (CUDA)")
    ] = False
    num_threads: Annotated[
        Annotated[int, Meta(ge=0, le=1024)], Meta(description="CPU threads for tensors; 0: all cores")
    ] = 0
    seed: Annotated[int, Meta(description="seed of dummy weights")] = 0
    watchdog_s: Annotated[
        float,
        Meta(ge=0, le=1e6, description="seconds without progress in a step after which it ends; 0: never"),
    ] = 20.0
    fake: Annotated[bool, Meta(description="a deterministic fake model, for tests and load")] = False


@dataclass(frozen=True, kw_only=True)
class ServeSettings(GatewaySettings, SchedulerSettings, ExecutorSettings):
    """Everything on one machine."""

    executors: Annotated[Count, Meta(description="executor processes")] = 1
    gateways: Annotated[Count, Meta(description="gateway processes behind one port")] = 1
    schedulers: Annotated[Count, Meta(description="scheduler processes; one leads, others stand by")] = 1
