"""What a request becomes on its way: who asked what, where it belongs, who answered and what goes back. Records only, no rules."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from tutelage.fleet.backends import Answer
from tutelage.gateway import openai
from tutelage.gateway.admission import Meter
from tutelage.gateway.callers import Caller
from tutelage.gateway.turns import Priority
from tutelage.records import Attempt, Strategy, Tier
from tutelage.routing.recall import Recalled
from tutelage.stores.replies import Held


class Options(NamedTuple):
    """What the request's headers ask for; `trace` are those that name the caller's span."""

    cache: str = ""
    domain: str | None = None
    priority: Priority = "normal"
    trace: Mapping[str, str] = MappingProxyType({})
    strategy: Strategy | None = None
    max_microusd: int | None = None
    min_confidence: float | None = None


class Asked(NamedTuple):
    """One request on its way: who asks what, since when (`started`, monotonic seconds), and the idempotency key it holds."""

    request: openai.Chat
    caller: Caller
    options: Options
    held: Held | None
    meter: Meter
    started: float

    @property
    def id(self) -> str:
        return self.meter.request_id

    @property
    def given_domain(self) -> str | None:
        return self.options.domain or self.request.domain


class Known(NamedTuple):
    """Accepted answers to similar earlier requests, and how often the answer to the most similar one surely is right."""

    answers: tuple[Recalled, ...]
    assured: float


class Placed(NamedTuple):
    """Where in the tenant's traffic a prompt belongs; `similarity` is to the nearest domain, `known` what is on record of its like."""

    domain: str | None
    embedding: bytes | None
    reason: str
    similarity: float | None = None
    known: Known | None = None


class Chosen(NamedTuple):
    """By which strategy, and by which version of the tenant's policy, it was chosen who answers. `propensity`: how probable it was that
    this answer was the one given; None: something else had a part in it, and nothing is to be learned from it. `threshold`: the
    confidence that was asked for; None: the client named the model."""

    strategy: Strategy | None
    propensity: float | None
    explored: bool
    policy_version: int | None
    threshold: float | None


NOBODY_CHOSE = Chosen(None, None, False, None, None)


class Outcome(NamedTuple):
    """An answer that may be given: who gave it, how it was chosen, and what was tried on the way."""

    answer: Answer
    model: str
    tier: Tier
    route: str
    reason: str
    confidence: float | None = None
    attempts: tuple[Attempt, ...] = ()
    domain: str | None = None  # only a cached outcome knows it; others are placed first
    lineage: str = ""  # the model and version that gave it
    chosen: Chosen = NOBODY_CHOSE

    @property
    def by_student(self) -> bool:
        """Whether a student gave it, of whatever tier: one that has become a teacher is still not what it is measured against."""
        return bool(self.attempts) and self.attempts[-1].accepted and self.attempts[-1].model == self.model

    @property
    def standard(self) -> float:
        """The highest threshold under which this answer would have been given: 1 for the teacher's, and for one whose model was named."""
        if self.chosen.threshold is None or (self.tier == "teacher" and not self.by_student):
            return 1.0
        return max(self.confidence or 0.0, 0.0 if self.chosen.explored else self.chosen.threshold)

    @property
    def cost_usd(self) -> float:
        """The answer and every rejected try before it."""
        return self.answer.cost_usd + sum(a.cost_microusd for a in self.attempts if not a.accepted) / 1e6


class Reply(NamedTuple):
    """What goes back to the client: the whole completion as JSON, or for a stream the chunks that it has not had yet, and the
    headers that say where it came from."""

    content: bytes
    chunks: tuple[dict[str, Any], ...]
    headers: dict[str, str]
