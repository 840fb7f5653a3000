"""What Prometheus may scrape. Buckets are fine enough that p50 and p99 can be read off by histogram_quantile."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

METRIC_PREFIX = "quantkit_gateway_"
BUCKETS = tuple(
    round(base * 10.0**power, 6) for power in range(-4, 3) for base in (1, 1.5, 2, 3, 5, 7)
)


class Metrics:
    """The figures of one gateway, in a registry of its own."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter(
            "requests", "Requests by key and by how they ended", ("key", "outcome")
        )
        self.tokens = self._counter("tokens", "Tokens that answers tell in their usage", ("kind",))
        self.events = self._counter("stream_events", "Events of streams, about one per token", ())
        self.failures = self._counter(
            "upstream_failures", "Failures of upstreams", ("upstream", "reason")
        )
        self.failovers = self._counter(
            "failovers", "Requests that another upstream answered", ("upstream",)
        )
        self.heartbeats = self._counter("heartbeats", "Comments sent on quiet streams", ())
        self.ttft = self._histogram(
            "time_to_first_token", "From a request's arrival to the first event of its stream"
        )
        self.gap = self._histogram(
            "inter_token", "Between two pieces of a stream, as the engine sends them"
        )
        self.queued = self._histogram("queue", "From a request's arrival to its turn")
        told = "From a request's arrival to the end of its answer, by how it ended"
        self.total = self._histogram(
            "request", told, ("outcome",)
        )  # refusals are quick: mixed in they hide overload
        self.running = Gauge(
            f"{METRIC_PREFIX}running", "Requests at the engine", registry=self.registry
        )
        self.waiting = Gauge(
            f"{METRIC_PREFIX}waiting", "Requests in the queue", registry=self.registry
        )

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, told: str, labels: tuple[str, ...]) -> Counter:
        return Counter(f"{METRIC_PREFIX}{name}", told, labels, registry=self.registry)

    def _histogram(self, name: str, told: str, labels: tuple[str, ...] = ()) -> Histogram:
        return Histogram(
            f"{METRIC_PREFIX}{name}_seconds", told, labels, buckets=BUCKETS, registry=self.registry
        )
