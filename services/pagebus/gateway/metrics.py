"""`GET /metrics`: the gateway's counters and the leader's load under vLLM's names, for Prometheus.

Numbers are turned into Prometheus' families when they are asked for, so counting them costs next to nothing.
"""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from pagebus.gateway.context import GatewayContext
from pagebus.gateway.counters import Distribution
from pagebus.gateway.limits import Receive, Scope, Send
from pagebus.gateway.responder import Endpoint


class GatewayCollector(Collector):
    """Shows one gateway's counters; every series has the label `model_name`."""

    def __init__(self, context: GatewayContext) -> None:
        self._context = context
        self._labels = [context.served_names[0]]

    def collect(self) -> Iterator[Metric]:
        """All families, as they are now."""
        yield from self._load()
        counters = self._context.counters
        yield self._counter("prompt_tokens", "Prompt tokens taken.", counters.num_prompt_tokens)
        yield self._counter("generation_tokens", "Tokens generated.", counters.num_generated_tokens)
        finished = CounterMetricFamily(
            "vllm:request_success", "Choices that ended, by reason.", labels=["model_name", "finished_reason"]
        )
        for reason, count in counters.finished.items():
            finished.add_metric([*self._labels, reason], count)
        yield finished
        for name, text, values in (
            ("time_to_first_token_seconds", "From request to first token.", counters.first_token_s),
            ("inter_token_latency_seconds", "Between tokens of a choice.", counters.between_tokens_s),
            (
                "request_time_per_output_token_seconds",
                "Mean time a token after the first.",
                counters.per_output_token_s,
            ),
            ("e2e_request_latency_seconds", "From request to end.", counters.whole_request_s),
            ("request_prompt_tokens", "Prompt tokens of a request.", counters.prompt_lengths),
            ("request_generation_tokens", "Generated tokens of a request.", counters.generation_lengths),
        ):
            yield self._histogram(name, text, values)

    def _load(self) -> Iterator[Metric]:
        beat = self._context.submitter.heartbeat
        num_blocks = beat.num_blocks if beat is not None else 0
        used = (num_blocks - beat.num_free_blocks) / num_blocks if beat is not None and num_blocks else 0.0
        yield self._gauge("num_requests_running", "Rows running.", beat.num_running if beat else 0)
        yield self._gauge("num_requests_waiting", "Rows waiting.", beat.num_waiting if beat else 0)
        yield self._gauge("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", used)
        queries, hits = (beat.num_prefix_queries, beat.num_prefix_hits) if beat is not None else (0, 0)
        yield self._counter("prefix_cache_queries", "Tokens looked up in the prefix cache.", queries)
        yield self._counter("prefix_cache_hits", "Tokens found in the prefix cache.", hits)
        yield self._counter("num_preemptions", "Rows preempted.", beat.num_preemptions if beat else 0)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"vllm:{name}", text, labels=["model_name"])
        family.add_metric(self._labels, value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"vllm:{name}", text, labels=["model_name"])
        family.add_metric(self._labels, value)
        return family

    def _histogram(self, name: str, text: str, values: Distribution) -> Metric:
        family = HistogramMetricFamily(f"vllm:{name}", text, labels=["model_name"])
        buckets: list[tuple[str, float]] = []
        total = 0
        for bound, count in zip([*values.bounds, float("inf")], values.counts, strict=True):
            total += count
            buckets.append(("+Inf" if bound == float("inf") else repr(bound), total))
        family.add_metric(self._labels, buckets=buckets, sum_value=values.total)
        return family


class MetricsEndpoint(Endpoint):
    """The text format."""

    def __init__(self, context: GatewayContext) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(GatewayCollector(context))
        ProcessCollector(registry=self._registry)

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with all metrics."""
        body = generate_latest(self._registry)
        head = [
            (b"content-type", CONTENT_TYPE_LATEST.encode()),
            (b"content-length", str(len(body)).encode()),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": body, "more_body": False})
