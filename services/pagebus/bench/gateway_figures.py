"""What `pagebus bench gateway` found, as structs and as a table."""

import statistics

import msgspec

from pagebus.bench.processes import Machine


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """One run of one variant. CPU seconds are those of the gateway processes together."""

    tokens: int
    seconds: float
    gateway_cpu_s: float
    tokens_per_cpu_s: float
    tokens_per_s: float
    events: int
    events_per_s: float
    tokens_per_event: float
    bytes_per_token: float
    latency_p50_ms: float
    latency_p99_ms: float
    client_cpu_s: float
    source_cpu_s: float
    nats_cpu_s: float
    gateway_rss_mib: float


class Variant(msgspec.Struct, frozen=True, kw_only=True):
    """One start of the gateways: saturated; at half of what the first variant made then, the same rate for
    all; and, in variants that make more, at half of their own most. Streams of each gateway."""

    stream_interval: int
    saturated: Stage
    half_load: Stage
    half_of_own: Stage | None
    streams_by_gateway: list[int]


class GatewayFigures(msgspec.Struct, frozen=True, kw_only=True):
    """All that was measured."""

    machine: Machine
    num_streams: int
    num_executors: int
    num_gateways: int
    is_stored: bool
    is_cpu_count_exhausted: bool
    variants: list[Variant]


def table(found: GatewayFigures) -> str:
    """For people."""
    lines = [
        f"{found.num_streams} streams of {found.num_executors} executors (imitated by one process), "
        f"{found.num_gateways} gateway process(es), {'stored' if found.is_stored else 'not stored'}",
        "interval  load       tokens/CPU-s   tokens/s   events/s  tok/event   p50 ms   p99 ms"
        "   CPU s: gateway client source  nats    RSS MiB",
    ]
    for variant in found.variants:
        name = "adaptive" if variant.stream_interval == 0 else str(variant.stream_interval)
        stages = (
            ("saturated", variant.saturated),
            ("half", variant.half_load),
            ("own half", variant.half_of_own),
        )
        for load, stage in stages:
            if stage is None:
                continue
            lines.append(
                f"{name:9} {load:10} {stage.tokens_per_cpu_s:12,} {stage.tokens_per_s:10,} "
                f"{stage.events_per_s:10,} {stage.tokens_per_event:10.2f} {stage.latency_p50_ms:8.2f} "
                f"{stage.latency_p99_ms:8.2f} {stage.gateway_cpu_s:17.2f} {stage.client_cpu_s:6.2f} "
                f"{stage.source_cpu_s:6.2f} {stage.nats_cpu_s:5.2f} {stage.gateway_rss_mib:10.1f}"
            )
        if len(variant.streams_by_gateway) > 1:
            lines.append(f"          connections of each gateway: {variant.streams_by_gateway}")
    for interval in sorted({variant.stream_interval for variant in found.variants}, reverse=True):
        rates = [v.saturated.tokens_per_cpu_s for v in found.variants if v.stream_interval == interval]
        name = "adaptive coalescing" if interval == 0 else f"stream interval {interval}"
        lines.append(f"{name}: median {statistics.median(rates):,.0f} tokens a CPU-second, saturated")
    return "\n".join(lines)
