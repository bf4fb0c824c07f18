"""Prometheus metrics, in base units. One registry an application, so that several can live in one process."""

from typing import TypeVar, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST, generate_latest

from clipdit_serve.engine import BatchReport
from clipdit_serve.reloading import Result
from clipdit_serve.variants import Variants

Metric = TypeVar("Metric", bound=MetricWrapperBase)

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Bounds of the histograms of time."""

IMAGES = (1, 2, 4, 8, 16, 32, 64, 128)
"""Bounds of the histogram of batches."""

REFUSALS = frozenset(("queue_full", "too_many_jobs", "loading", "draining", "model_unavailable", "deadline_exceeded"))
"""Codes of `clipdit_rejected_total`."""

BAD_INPUTS = frozenset(
    ("image_damaged", "image_empty", "image_too_large", "animated_not_supported", "image_timeout", "unsupported_image_format")
)
"""Codes of `clipdit_bad_input_total`."""


class Metrics:
    """The metrics of one application. Those of a model have the label `variant` where there are several."""

    def __init__(self, engines: Variants):
        self._engines, self.registry = engines, CollectorRegistry()
        registry = self.registry
        self._by_variant = ["variant"] if engines.several else []
        by = self._by_variant
        self._requests = Counter("clipdit_requests", "Requests answered", ["route", "code"], registry=registry)
        self._seconds = Histogram("clipdit_request_seconds", "From head to answer", ["route"], buckets=SECONDS, registry=registry)
        self._wait = Histogram("clipdit_queue_wait_seconds", "In the queue", by, buckets=SECONDS, registry=registry)
        self._batch = Histogram(
            "clipdit_batch_size", "Images in a batch, padding left out", by, buckets=IMAGES, registry=registry
        )
        self._model = Histogram("clipdit_model_seconds", "Of a batch in the model", by, buckets=SECONDS, registry=registry)
        self._rejected = Counter("clipdit_rejected", "Requests that could not be served", ["reason"], registry=registry)
        self._bad_input = Counter("clipdit_bad_input", "Uploads that are no image to us", ["reason"], registry=registry)
        self._cancelled = Counter("clipdit_cancelled", "Callers who left before the answer", registry=registry)
        self._jobs = Counter("clipdit_jobs", "Jobs that ended", ["status"], registry=registry)
        self._reloads = Counter("clipdit_reloads", "Reloads of the model that are over", ["result"], registry=registry)
        for result in get_args(Result):
            self._reloads.labels(result)  # there from the start: an alarm asks whether it grew
        self._info = Info("clipdit_model", "What is served", by, registry=registry)
        depth = Gauge("clipdit_queue_depth", "Requests that wait for a batch", by, registry=registry)
        for name, engine in engines.items():
            self._of(depth, name).set_function(lambda engine=engine: engine.health().waiting)

    def request(self, route: str, status: int, code: str | None, seconds: float) -> None:
        """One request is over. route: its template, never what the caller sent; code: of its error."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)
        if code in REFUSALS:
            self._rejected.labels(str(code)).inc()
        elif code in BAD_INPUTS:
            self._bad_input.labels(str(code)).inc()
        elif code == "client_closed_request":
            self._cancelled.inc()

    def batch(self, variant: str, report: BatchReport) -> None:
        """One batch is over. Any thread may call it."""
        self._of(self._batch, variant).observe(report.images)
        self._of(self._model, variant).observe(report.seconds)
        for wait_s in report.waits_s:
            self._of(self._wait, variant).observe(wait_s)

    def job(self, status: str) -> None:
        """One job ended: done, failed or cancelled."""
        self._jobs.labels(status).inc()

    def reload(self, result: Result) -> None:
        """One reload is over: done or refused."""
        self._reloads.labels(result).inc()

    def _of(self, metric: Metric, variant: str) -> Metric:
        return metric.labels(variant) if self._by_variant else metric

    def exposition(self) -> tuple[bytes, str]:
        """(text, its content type)."""
        for name, engine in self._engines.items():
            if (info := engine.model) is not None:
                told = {"revision": info.fingerprint[:12], "backend": info.backend, "precision": info.precision}
                self._of(self._info, name).info(told)
        return generate_latest(self.registry), CONTENT_TYPE_LATEST
