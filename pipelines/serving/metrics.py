"""Counters of a server, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter("unclip_requests", "Answered requests.", ("route", "status"), registry=self._registry)
        self.seconds = Histogram(
            "unclip_request_seconds",
            "Time from a request to its answer.",
            ("route",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.waiting = Gauge(
            "unclip_requests_in_progress", "Requests that wait or are sampled.", registry=self._registry
        )
        self.images = Counter("unclip_images", "Images sampled.", ("model", "kind"), registry=self._registry)
        self.batch_size = Histogram(
            "unclip_batch_images", "Images of the batch that a request was in.", buckets=_SIZES, registry=self._registry
        )
        self.batch_seconds = Histogram(
            "unclip_batch_seconds",
            "Sampling time of the batch that a request was in.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.problems = Counter(
            "unclip_refresh_failures", "Looks at the published models that did not succeed.", registry=self._registry
        )

    def text(self) -> bytes:
        return generate_latest(self._registry)
