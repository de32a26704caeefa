"""Metrics, spans and logs of a gateway worker. It refuses to know what the numbers mean to anybody.

Labels come from short lists (tiers, routes, codes, configured models); tenants are never one, so a thousand of them cost nothing.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer
    from prometheus_client.metrics_core import Metric

    from tutelage.records import Interaction

LATENCY_BUCKETS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
SECRETS = re.compile(r"(tut_[a-z]{2,8}_[0-9a-f]{12}_)[0-9a-f_]+|\b(sk-)[A-Za-z0-9_-]{8,}|((?i:bearer|basic)\s+)[\w.~+/=-]{8,}")
EXPORTERS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


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
        self.asked_again = Counter(
            "tutelage_student_asked_again_total", "Students' answers that fell short and were drawn again, to see whether they agree",
            registry=self._registry,
        )  # fmt: skip
        self.cost = Counter("tutelage_cost_usd_total", "Cost of answers in US dollars", ["tier"], registry=self._registry)
        self.latency = Histogram(
            "tutelage_request_seconds",
            "Seconds from request to recorded answer",
            ["tier"],
            buckets=LATENCY_BUCKETS,
            registry=self._registry,
        )
        self.semantic = Counter(
            "tutelage_semantic_total", "What became of questions like one answered before", ["what"], registry=self._registry
        )
        self.running = self._gauge("tutelage_models_calls_running", "Calls of models under way")
        self.waiting = self._gauge("tutelage_requests_waiting", "Requests that wait for their turn")
        self.faulty = self._gauge("tutelage_configuration_faulty", "Workers whose configuration files cannot be used as they are")
        self.breakers = self._gauge("tutelage_model_breaker_open", "Workers that do not call this model just now", "model")

        self.summaries: list[Callable[[Sequence[Metric]], Iterable[Metric]]] = []
        self._children: dict[tuple[str, str, str], tuple[Counter, Histogram, Counter]] = {}  # looking labels up costs more than counting

    def _gauge(self, name: str, told: str, *labels: str) -> Gauge:
        return Gauge(name, told, labels, registry=self._registry, multiprocess_mode="livesum")

    def answered(self, tier: str, route: str, cache: str, seconds: float, cost_usd: float) -> None:
        known = self._children.get((tier, route, cache))
        if known is None:
            known = self.requests.labels(tier, route, cache), self.latency.labels(tier), self.cost.labels(tier)
            self._children[tier, route, cache] = known
        requests, latency, cost = known
        requests.inc()
        latency.observe(seconds)
        cost.inc(cost_usd)

    def render(self) -> bytes:
        """The text exposition format."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return generate_latest(registry)

    def collect(self) -> Iterator[Metric]:
        """Everything that was counted, then what `summaries` make of it."""
        families = self._counted()
        yield from families
        for summary in self.summaries:
            yield from summary(families)

    def _counted(self) -> list[Metric]:
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return list(self._registry.collect())
        from prometheus_client.multiprocess import MultiProcessCollector

        return list(MultiProcessCollector(CollectorRegistry()).collect())  # type: ignore[no-untyped-call]


class Spans:
    """One OpenTelemetry span a request, by the GenAI conventions, written once the request is recorded. Without a tracer, nothing."""

    def __init__(self, tracer: Tracer | None) -> None:
        self._tracer = tracer

    def record(self, interaction: Interaction, *, asked_model: str, headers: Mapping[str, str]) -> None:
        """`headers` may carry the caller's `traceparent`. No text of the request or its answer is told."""
        if self._tracer is None:
            return
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        told: dict[str, Any] = {
            "gen_ai.operation.name": interaction.endpoint,
            "gen_ai.request.model": asked_model,
            "gen_ai.response.model": interaction.model,
            "gen_ai.response.id": interaction.request_id,
            "gen_ai.response.finish_reasons": [interaction.finish_reason or "unknown"],
            "gen_ai.usage.input_tokens": interaction.prompt_tokens,
            "gen_ai.usage.output_tokens": interaction.completion_tokens,
            "tutelage.tenant": interaction.tenant_id,
            "tutelage.tier": interaction.tier,
            "tutelage.route": interaction.route,
            "tutelage.cache": interaction.cache,
            "tutelage.cost_microusd": interaction.cost_microusd,
        }
        if interaction.domain is not None:
            told["tutelage.domain"] = interaction.domain
        if interaction.confidence is not None:
            told["tutelage.confidence"] = interaction.confidence
        ended = interaction.created_at
        span = self._tracer.start_span(
            f"{interaction.endpoint} {interaction.model}",
            context=TraceContextTextMapPropagator().extract(dict(headers)),
            kind=SpanKind.SERVER,
            attributes=told,
            start_time=_nanoseconds(ended - timedelta(milliseconds=interaction.latency_ms)),
        )
        for attempt in interaction.attempts:
            span.add_event("attempt", {"model": attempt.model, "accepted": attempt.accepted, "reason": attempt.reason}, _nanoseconds(ended))
        span.end(_nanoseconds(ended))

    def close(self) -> None:
        """Send what is still held back."""
        if self._tracer is not None:
            from opentelemetry import trace

            provider = trace.get_tracer_provider()
            if hasattr(provider, "shutdown"):
                provider.shutdown()


def spans_from_environment() -> Spans:
    """Spans to the OTLP endpoint that the usual OTEL_* variables name; without one, none, and nothing is imported."""
    if not any(os.environ.get(name) for name in EXPORTERS):
        return Spans(None)
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "tutelage-gateway")}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    return Spans(provider.get_tracer("tutelage"))


def _nanoseconds(at: datetime) -> int:
    return round(at.timestamp() * 1e9)


class DiscreetHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Takes keys and credentials out of every log line, tracebacks included, whoever wrote it."""

    def format(self, record: logging.LogRecord) -> str:
        return hide_secrets(super().format(record))


def hide_secrets(text: str) -> str:
    """The text without the secret part of keys and credentials."""
    return SECRETS.sub(lambda found: f"{found[1] or found[2] or found[3]}…", text)


def log_to_stderr(level: int = logging.INFO, *, plain: bool = False) -> None:
    """Called once at the top of a process: one JSON object a line for servers, `plain` lines for people."""
    handler = DiscreetHandler()
    if plain:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    else:
        from pythonjsonlogger.json import JsonFormatter

        fields = {"levelname": "level", "name": "logger"}
        handler.setFormatter(JsonFormatter("%(levelname)s %(name)s %(message)s", rename_fields=fields, timestamp=True))
    logging.basicConfig(level=level, handlers=[handler])
    for chatty in ("httpx", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
