"""The nouns every part shares, as small frozen records. It refuses to know where they are stored or who reads them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, NamedTuple

Tier = Literal["student", "ta", "teacher"]
Bodies = Literal["off", "redacted", "full"]  # what is kept of prompts and answers; without them nothing can be learned
CacheState = Literal["hit-exact", "hit-semantic", "miss", "bypass"]
Strategy = Literal["always-teacher", "direct", "cascade", "parallel", "budget", "quality"]


def new_id(kind: str, at: datetime) -> str:
    """A request's name: its kind and 32 hexadecimal digits, of which the first 12 are milliseconds since 1970, as in RFC 9562's UUIDv7, and
    the others random. Names that grow fill the ledger's indexes page by page; with random ones every row goes to pages of its own."""
    return f"{kind}-{int(at.timestamp() * 1000):012x}{os.urandom(10).hex()}"


@dataclass(frozen=True)
class Tenant:
    """Who pays: every interaction, key, domain and student belongs to exactly one."""

    id: str
    name: str
    tier: str
    status: str = "active"
    limits: Mapping[str, Any] = field(default_factory=dict)  # what was agreed beside the tier's plan (gateway/limits.py)
    on_disconnect: Literal["cancel", "drain"] = "cancel"  # what becomes of a stream whose client leaves
    bodies: Bodies = "full"
    retention_days: int | None = None  # None: bodies are kept
    cache_seconds: int | None = None  # how long its answers are kept to be given again; None: as gateway.yaml says
    semantic_error_budget: float | None = None  # share of answers given to paraphrases that may be wrong; 0: none are; None: gateway.yaml's
    strategy: Strategy = "quality"  # how its requests are answered (routing/strategies.py), unless one asks otherwise
    max_cost_microusd: int | None = None  # what one answer may cost at most
    min_confidence: float | None = None  # the least quality that its answers are promised; None: as its policy or routing.yaml says
    training: Literal["on", "off"] = "on"  # whether students may learn from its traffic
    erasures: int = 0  # how often bodies were erased: no answer from before may be given again


@dataclass(frozen=True)
class Key:
    """An API key as stored: the secret itself is never kept, only its keyed hash. Without a tenant it is an operator's; a `role` beside
    a tenant lets it administer that tenant."""

    id: str
    tenant_id: str | None
    role: str | None
    hash: bytes
    expires_at: datetime | None
    revoked_at: datetime | None
    models: Sequence[str] | None = None  # the models it may name; None: any
    limits: Mapping[str, Any] = field(default_factory=dict)  # its own, within the tenant's
    routes: Sequence[str] | None = None  # the routes it may use (gateway/roles.py); None: any


@dataclass(frozen=True)
class Attempt:
    """One try of a student or base model at a request, served or not; costs are micro-dollars."""

    model: str
    tier: Tier
    digest: str | None
    answer: str
    score: float | None
    confidence: float | None
    accepted: bool
    reason: str
    cost_microusd: int


class Interaction(NamedTuple):
    """One answered request, as recorded before the reply is acknowledged."""

    request_id: str
    tenant_id: str
    key_id: str
    created_at: datetime
    messages: list[dict[str, Any]] | None  # None: the tenant wants no bodies kept
    prompt_hash: bytes
    answer: str
    model: str
    tier: Tier | Literal["encoder"]
    route: str
    reason: str
    cache: CacheState
    domain: str | None
    given_domain: str | None
    confidence: float | None
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    tokens_estimated: bool
    cost_microusd: int
    latency_ms: int
    embedding: bytes | None = None
    attempts: tuple[Attempt, ...] = ()
    endpoint: Literal["chat", "embeddings", "shadow"] = "chat"
    strategy: Strategy | None = None  # None: nobody had to choose, or what is known from before was given again
    propensity: float | None = None  # of this answer being the one given; None: not to be learned from
    explored: bool = False
    policy_version: int | None = None  # 0: as configured
    similarity: float | None = None  # of the prompt to the nearest domain


@dataclass(frozen=True)
class Outcome:
    """What an answer turned out to be worth. `value` 0..1; `served`: it was the one given; `observed`: the probability with which
    anybody looked, whether or not it was given (1 for feedback, of which nobody knows it). `score` is what was read of a
    student's answer (log-odds), `confidence` what was made of it."""

    tenant_id: str
    request_id: str
    model: str
    digest: str | None
    domain: str | None
    score: float | None
    confidence: float | None
    value: float
    served: bool
    source: Literal["feedback", "teacher", "judge", "verifier"]
    observed: float


@dataclass(frozen=True)
class Feedback:
    """A user's verdict on one interaction: `score` in 0..1, `label` the right answer if they gave it."""

    request_id: str
    tenant_id: str
    score: float
    label: str | None
    comment: str | None
