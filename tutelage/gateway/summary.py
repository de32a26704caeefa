"""What people ask of /metrics without a Prometheus beside them: cost per query, latency percentiles and cache hit rate since the gateway
started, and what evolution has brought. It refuses to count anything itself: the first are computed from what all workers counted, the
second read from the database, so that every worker tells the same.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily
from prometheus_client.metrics_core import Metric

from tutelage.stores import cycles
from tutelage.stores.cycles import Totals
from tutelage.stores.database import Pool
from tutelage.tasks import end

log = logging.getLogger(__name__)

QUANTILES = (0.5, 0.95, 0.99)


def derived(families: Sequence[Metric]) -> Iterator[Metric]:
    """Ratios and percentiles of all requests answered so far; for a window of time, take rates of the counters in Prometheus."""
    requests = hits = cost = 0.0
    buckets: dict[float, float] = defaultdict(float)
    for sample in (sample for family in families for sample in family.samples):
        if sample.name == "tutelage_requests_total":
            requests += sample.value
            hits += sample.value if sample.labels["cache"].startswith("hit") else 0
        elif sample.name == "tutelage_cost_usd_total":
            cost += sample.value
        elif sample.name == "tutelage_request_seconds_bucket":
            buckets[float(sample.labels["le"])] += sample.value
    if not requests:
        return
    yield GaugeMetricFamily("tutelage_cost_per_query_usd", "Mean cost of an answered request since the gateway started", cost / requests)
    yield GaugeMetricFamily("tutelage_cache_hit_ratio", "Share of requests answered from the cache since then", hits / requests)
    latency = GaugeMetricFamily(
        "tutelage_request_seconds_quantile", "Seconds from request to recorded answer since then", labels=["quantile"]
    )
    for quantile in QUANTILES:
        latency.add_metric([f"{quantile:g}"], percentile(buckets, quantile))
    yield latency


def percentile(buckets: Mapping[float, float], quantile: float) -> float:
    """A quantile of cumulative `buckets` (upper bound -> count), linear within a bucket, as PromQL's histogram_quantile; NaN for none."""
    bounds = sorted(buckets)
    if not bounds or not buckets[bounds[-1]]:
        return math.nan
    rank, below, lower = quantile * buckets[bounds[-1]], 0.0, 0.0
    for bound in bounds:
        if buckets[bound] >= rank:
            return lower if math.isinf(bound) else lower + (bound - lower) * (rank - below) / max(buckets[bound] - below, 1e-12)
        below, lower = buckets[bound], bound
    return lower


class Evolved:
    """What cycles have brought so far, read every `seconds`."""

    def __init__(self, pool: Pool, *, seconds: float) -> None:
        self._pool = pool
        self._seconds = seconds
        self._totals: Totals | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        await end(self._task)

    def families(self, _: Sequence[Metric]) -> Iterable[Metric]:
        return told(self._totals) if self._totals is not None else ()

    async def look(self) -> None:
        self._totals = await cycles.totals(self._pool)

    async def _run(self) -> None:
        while True:
            try:
                await self.look()
            except Exception as failed:  # metrics must never end a worker
                log.warning("what evolution has brought was not read: %r", failed)
            await asyncio.sleep(self._seconds)


def told(totals: Totals) -> Iterator[Metric]:
    """The totals as metrics; labels are the statuses and actions that the schema allows."""
    for name, documentation, label, values in (
        ("tutelage_evolution_cycles", "Evolution cycles begun", "status", totals.cycles),
        ("tutelage_promotions", "Lines of the promotion ledger", "action", totals.promotions),
    ):
        counter = CounterMetricFamily(name, documentation, labels=[label])
        for value, count in sorted(values.items()):
            counter.add_metric([value], count)
        yield counter
    yield CounterMetricFamily("tutelage_evolution_improvements", "Versions that came to answer their domain", totals.improvements)
    yield CounterMetricFamily("tutelage_distillations", "Students that were trained and examined", totals.distillations)
    yield CounterMetricFamily("tutelage_distillation_core_seconds", "Core-seconds of training", totals.core_seconds)
    yield SummaryMetricFamily(
        "tutelage_distillation_gain", "Share of held-out items right after training less before it",
        count_value=totals.gains, sum_value=totals.gain,
    )  # fmt: skip
    students = GaugeMetricFamily("tutelage_student_versions", "Versions of students by what became of them", labels=["status"])
    for status, count in sorted(totals.versions.items()):
        students.add_metric([status], count)
    yield students
