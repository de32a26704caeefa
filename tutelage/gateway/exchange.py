"""What a request becomes on its way: who asked what, where it belongs, who answered and what goes back. Records only, no rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tutelage.fleet.backends import Answer
from tutelage.gateway import openai
from tutelage.gateway.admission import Meter
from tutelage.gateway.callers import Caller
from tutelage.gateway.turns import Priority
from tutelage.records import Attempt, Tier
from tutelage.stores.replies import Held


@dataclass(frozen=True)
class Options:
    """What the request's headers ask for; `trace` are those that name the caller's span."""

    cache: str = ""
    domain: str | None = None
    priority: Priority = "normal"
    trace: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    """One request on its way: who asks what, since when (`started`, monotonic seconds), and the idempotency key it holds."""

    request: openai.ChatRequest
    caller: Caller
    options: Options
    held: Held | None
    meter: Meter
    started: float

    @property
    def id(self) -> str:
        return self.meter.request_id

    @property
    def usage(self) -> bool:
        """Whether a stream is to end with its usage."""
        return self.request.stream_options is not None and self.request.stream_options.include_usage

    @property
    def given_domain(self) -> str | None:
        return self.options.domain or (self.request.metadata or {}).get("domain")


@dataclass(frozen=True)
class Placed:
    """Where in the tenant's traffic a prompt belongs."""

    domain: str | None
    embedding: bytes | None
    reason: str


@dataclass(frozen=True)
class Outcome:
    """An answer that may be given: who gave it, how it was chosen, and what was tried on the way."""

    answer: Answer
    model: str
    tier: Tier
    route: str
    reason: str
    confidence: float | None = None
    attempts: tuple[Attempt, ...] = ()
    domain: str | None = None  # only a cached outcome knows it; others are placed first

    @property
    def cost_usd(self) -> float:
        """The answer and every rejected try before it."""
        return self.answer.cost_usd + sum(a.cost_microusd for a in self.attempts if not a.accepted) / 1e6


@dataclass(frozen=True)
class Reply:
    """What goes back to the client: the whole completion as JSON, or for a stream the chunks that it has not had yet, and the
    headers that say where it came from."""

    content: bytes
    chunks: tuple[dict[str, Any], ...]
    headers: dict[str, str]
