"""Metrics and logs of a gateway worker. It refuses to know what the numbers mean to anybody."""

from __future__ import annotations

import logging
import os

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

LATENCY_BUCKETS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The gateway's Prometheus metrics; with `PROMETHEUS_MULTIPROC_DIR` set, `render` sums all workers."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter("tutelage_requests_total", "Answered requests", ["tier", "route", "cache"], registry=self._registry)
        self.errors = Counter("tutelage_errors_total", "Refused or failed requests", ["code"], registry=self._registry)
        self.fallbacks = Counter(
            "tutelage_student_unreachable_total", "Requests that went to the teacher because a student could not be reached",
            ["student"], registry=self._registry,
        )  # fmt: skip
        self.cost = Counter("tutelage_cost_usd_total", "Cost of answers in US dollars", ["tier"], registry=self._registry)
        self.latency = Histogram(
            "tutelage_request_seconds",
            "Seconds from request to recorded answer",
            ["tier"],
            buckets=LATENCY_BUCKETS,
            registry=self._registry,
        )

    def answered(self, tier: str, route: str, cache: str, seconds: float, cost_usd: float) -> None:
        self.requests.labels(tier, route, cache).inc()
        self.latency.labels(tier).observe(seconds)
        self.cost.labels(tier).inc(cost_usd)

    def render(self) -> bytes:
        """The text exposition format."""
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return generate_latest(self._registry)
        from prometheus_client.multiprocess import MultiProcessCollector

        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)


def log_to_stderr(level: int = logging.INFO) -> None:
    """Called once at the top of a process."""
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for chatty in ("httpx", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
