"""Prometheus metrics. The buckets are fine enough for p50 and p99 by histogram_quantile."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

METRIC_PREFIX = "quantkit_gateway_"
BUCKETS = tuple(
    round(base * 10.0**power, 6) for power in range(-4, 3) for base in (1, 1.5, 2, 3, 5, 7)
)
"""Upper bounds of histogram buckets in seconds."""


class Metrics:
    """The metrics of one gateway, in a registry of its own."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._make_counter(
            "requests", "Requests by key and outcome", ("key", "outcome")
        )
        self.tokens = self._make_counter(
            "tokens", "Tokens that responses report in their usage", ("kind",)
        )
        self.events = self._make_counter(
            "stream_events", "Events of streams, about one per token", ()
        )
        self.failures = self._make_counter(
            "upstream_failures", "Failures of upstreams", ("upstream", "reason")
        )
        self.failovers = self._make_counter(
            "failovers", "Requests that a fallback answered", ("upstream",)
        )
        self.heartbeats = self._make_counter("heartbeats", "Comments sent on idle streams", ())
        self.ttft = self._make_histogram(
            "time_to_first_token", "From a request's arrival to the first event of its stream"
        )
        self.inter_token = self._make_histogram(
            "inter_token", "Between two pieces of a stream, as the engine sends them"
        )
        self.queued = self._make_histogram("queue", "From a request's arrival to its admission")
        # By outcome: rejections are fast, and would hide overload in the other durations.
        self.duration = self._make_histogram(
            "request", "From a request's arrival to the end of its response", ("outcome",)
        )
        self.running = Gauge(
            f"{METRIC_PREFIX}running", "Turns at the engine", registry=self.registry
        )
        self.waiting = Gauge(
            f"{METRIC_PREFIX}waiting", "Requests in the queue", registry=self.registry
        )
        self.canary: CanaryMetrics | None = None  # made by the first reading

    def record_canary(self, difference: float | None, bound: float, now: float) -> None:
        """Record a reading of the canary, in nats; None if the engine gave none.

        now: seconds since 1970. The gauge of the difference is NaN until the first reading: 0 would
        say that all is well.
        """
        if self.canary is None:
            self.canary = CanaryMetrics(self.registry)
        self.canary.bound.set(bound)
        if difference is None:
            self.canary.failures.inc()
        else:
            self.canary.difference.set(difference)
            self.canary.time.set(now)

    def format_text(self) -> bytes:
        """Return the metrics in Prometheus' exposition format."""
        return generate_latest(self.registry)

    def _make_counter(self, name: str, description: str, labels: tuple[str, ...]) -> Counter:
        return Counter(f"{METRIC_PREFIX}{name}", description, labels, registry=self.registry)

    def _make_histogram(
        self, name: str, description: str, labels: tuple[str, ...] = ()
    ) -> Histogram:
        return Histogram(
            f"{METRIC_PREFIX}{name}_seconds",
            description,
            labels,
            buckets=BUCKETS,
            registry=self.registry,
        )


class CanaryMetrics:
    """The metrics of a canary, which a gateway without one does not have."""

    def __init__(self, registry: CollectorRegistry) -> None:
        prefix = f"{METRIC_PREFIX}canary_"
        self.difference = Gauge(
            f"{prefix}difference_nats",
            "Mean absolute difference of log-probabilities from the report's",
            registry=registry,
        )
        self.difference.set(float("nan"))
        self.bound = Gauge(
            f"{prefix}bound_nats", "Difference above which the served model is wrong",
            registry=registry,
        )  # fmt: skip
        self.time = Gauge(
            f"{prefix}last_reading_timestamp_seconds", "Time of the last reading", registry=registry
        )
        self.failures = Counter(
            f"{prefix}failures", "Readings that the engine did not give", registry=registry
        )
