"""Percentiles of a histogram and ratios of counters, as /metrics tells them."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram

from tutelage.gateway.summary import derived, percentile


def test_a_percentile_is_linear_within_its_bucket() -> None:
    buckets = {0.1: 50.0, 0.2: 100.0, math.inf: 100.0}

    assert percentile(buckets, 0.5) == 0.1
    assert math.isclose(percentile(buckets, 0.75), 0.15)
    assert percentile({0.1: 0.0, math.inf: 10.0}, 0.5) == 0.1, "beyond the last bound nothing is known"


def test_before_the_first_request_there_is_nothing_to_tell() -> None:
    assert list(derived([])) == []
    assert math.isnan(percentile({}, 0.5))


@given(st.lists(st.floats(0.001, 9), min_size=1, max_size=50), st.floats(0.01, 0.99))
def test_a_percentile_lies_in_the_bucket_of_the_true_one(seconds: list[float], quantile: float) -> None:
    registry = CollectorRegistry()
    histogram = Histogram("seconds", "", buckets=(0.01, 0.1, 1, 10), registry=registry)
    for value in seconds:
        histogram.observe(value)
    buckets = {float(s.labels["le"]): s.value for f in registry.collect() for s in f.samples if s.name == "seconds_bucket"}
    rank = quantile * len(seconds)
    true = sorted(seconds)[max(math.ceil(rank) - 1, 0)]
    found = percentile(buckets, quantile)
    above = min(bound for bound in buckets if bound >= true)

    assert found <= above
