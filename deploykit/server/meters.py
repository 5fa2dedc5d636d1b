"""Prometheus metrics, per model and version, summed over all workers.

Queue time, batch size and compute time stand apart, so that a slow answer tells where it waited.
Where the environment names PROMETHEUS_MULTIPROC_DIR, prometheus_client keeps every value in a
file of that folder, and any worker can tell the sums of all.
"""

from __future__ import annotations

import os
from collections import defaultdict
from functools import cache
from http import HTTPStatus
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    multiprocess,
)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
SAMPLES = tuple(float(2**power) for power in range(11))
PREDICTIONS = ("infer", "predict")
OF_MODEL = ("model", "version")


class ModelMeters:
    """The meters of one version of a model.

    Attributes:
        queue: seconds that a request waited for the session.
        compute: seconds of a run of the session.
        batch: samples of a run.
        samples: samples that were answered.
        waiting: samples that wait now.
        last: when a run ended last, seconds since 1970.
    """

    def __init__(self, meters: Meters, name: str, version: str, provider: str) -> None:
        labels = (name, version)
        self.queue = meters.queue.labels(*labels)
        self.compute = meters.compute.labels(*labels)
        self.batch = meters.batch.labels(*labels)
        self.samples = meters.samples.labels(*labels)
        self.waiting = meters.waiting.labels(*labels)
        self.last = meters.last.labels(*labels)
        meters.info.labels(*labels, provider).set(1)


class Meters:
    """All meters of a worker."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "deploykit_requests",
            "Requests answered, by status",
            (*OF_MODEL, "route", "status"),
            registry=registry,
        )
        self.seconds = Histogram(
            "deploykit_request_seconds",
            "From the head of a request to its answer of 200",
            (*OF_MODEL, "route"),
            buckets=SECONDS,
            registry=registry,
        )
        self.queue = self._seconds("queue", "Waiting for the session")
        self.compute = self._seconds("compute", "One run of the session")
        self.batch = Histogram(
            "deploykit_batch_samples",
            "Samples of one run of the session",
            OF_MODEL,
            buckets=SAMPLES,
            registry=registry,
        )
        self.samples = Counter("deploykit_samples", "Samples answered", OF_MODEL, registry=registry)
        self.waiting = Gauge(
            "deploykit_waiting_samples",
            "Samples that wait for the session",
            OF_MODEL,
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.last = Gauge(
            "deploykit_last_answer_timestamp_seconds",
            "When a run of the session ended last",
            OF_MODEL,
            registry=registry,
            multiprocess_mode="max",
        )
        self.info = Gauge(
            "deploykit_model_workers",
            "Workers that serve the model, with the execution provider in use",
            (*OF_MODEL, "provider"),
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.lost_lines = Counter(
            "deploykit_access_log_lost_lines",
            "Lines of the access log dropped because its reader was too slow",
            registry=registry,
        )
        # Looking labels up costs more than counting: children are kept.
        self._count = cache(self.requests.labels)
        self._took = cache(self.seconds.labels)

    def _seconds(self, part: str, what: str) -> Histogram:
        return Histogram(
            f"deploykit_{part}_seconds", what, OF_MODEL, buckets=SECONDS, registry=self.registry
        )

    def answered(self, model: str, version: str, route: str, status: int, seconds: float) -> None:
        """Count one answer."""
        self._count(model, version, route, status).inc()
        if status == HTTPStatus.OK:
            self._took(model, version, route).observe(seconds)

    def gone(self, name: str, version: str, provider: str) -> None:
        """Note that this worker serves a version no more."""
        self.info.labels(name, version, provider).set(0)

    def text(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self._all())

    def _all(self) -> CollectorRegistry:
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return self.registry
        merged = CollectorRegistry()
        multiprocess.MultiProcessCollector(merged)  # type: ignore[no-untyped-call]
        return merged

    def totals(self, model: str, version: str) -> dict[str, float]:
        """Return the sums of one version of a model over all workers.

        Returns:
            By the name of the metric (``deploykit_queue_seconds_sum`` ...), of predictions alone;
            their requests as ``ok`` and ``failed``.
        """
        found: dict[str, float] = defaultdict(float)
        for family in self._all().collect():
            for sample in family.samples:
                labels = sample.labels
                is_prediction = labels.get("route", "infer") in PREDICTIONS
                if (labels.get("model"), labels.get("version")) == (model, version):
                    found[_key(sample)] += sample.value if is_prediction else 0.0
        return found


def _key(sample: Any) -> str:
    if sample.name == "deploykit_requests_total":
        return "ok" if sample.labels["status"] == "200" else "failed"
    return str(sample.name)
