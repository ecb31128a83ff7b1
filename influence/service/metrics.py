"""What Prometheus reads of a service. Every service has a registry of its own."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 1.5, 2, 3, 5, 10, 30, 60, 300, 1800)
SIZES = (1, 2, 4, 8, 16, 32)


class Metrics:
    """The counters, gauges and histograms of one service."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("influence_requests", "requests by route and status", ["method", "route", "status"], registry=self.registry)
        self.request_seconds = Histogram(
            "influence_request_seconds", "time to the whole response, by route", ["route"], buckets=SECONDS, registry=self.registry
        )
        self.stage_seconds = Histogram(
            "influence_query_stage_seconds",
            "time of a batch of queries by stage: wait, load, gradients, search, rerank, whole",
            ["stage"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.batch_size = Histogram("influence_batch_size", "queries answered together", buckets=SIZES, registry=self.registry)
        self.cache = Counter(
            "influence_cache", "questions that were answered before, and those that were not", ["outcome"], registry=self.registry
        )
        self.queries = Counter("influence_queries", "queries that ended, by how", ["outcome"], registry=self.registry)
        self.requests_under_way = Gauge("influence_requests_under_way", "requests that have no response yet", registry=self.registry)
        self.waiting = Gauge("influence_waiting_queries", "quick queries that wait", registry=self.registry)
        self.queued = Gauge("influence_queued_queries", "accepted queries that are not finished", registry=self.registry)
        self.kept_bytes = Gauge(
            "influence_kept_gradient_bytes", "memory of the gradients of candidates that are kept", registry=self.registry
        )
        self.runs_loaded = Gauge("influence_runs_loaded", "runs whose model and factors are in memory", registry=self.registry)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)
