"""The one place where an answer becomes a reply: it is recorded, billed and measured here, whatever endpoint, stream, cancel or cache hit
it came from, and only then may be given. It refuses to know how the answer was found.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import orjson

from tutelage.gateway import openai
from tutelage.gateway.exchange import Asked, Outcome, Placed, Reply
from tutelage.records import Bodies, CacheState, Interaction
from tutelage.redaction import redact, redact_all
from tutelage.stores.interactions import Recorder
from tutelage.stores.replies import StoredReply
from tutelage.telemetry import Metrics, Spans

PLAIN = " !#$&'()*+,/:;=?@[]"  # what stays as it is in a header
Clock = Callable[[], datetime]


def utc_now() -> datetime:
    return datetime.now(UTC)


class Recording:
    """Records outcomes and makes their replies."""

    def __init__(self, recorder: Recorder, *, metrics: Metrics, spans: Spans, clock: Clock = utc_now) -> None:
        self._recorder = recorder
        self._metrics = metrics
        self._spans = spans
        self._clock = clock

    async def finish(
        self, asked: Asked, outcome: Outcome, placed: Placed, state: CacheState, *, spoken: Sequence[dict[str, Any]] | None = None
    ) -> Reply:
        """Record the interaction, and the reply if it has an idempotency key; then it may be given. `spoken`: what was streamed.

        Raises:
            Unavailable: it could not be recorded durably.
            IdempotencyConflict: the right to answer has passed to another request.
        """
        now = self._clock()
        reply = self._reply(asked, outcome, placed, state, now, spoken)
        kept = (asked.held, _stored(reply, spoken or (), stream=asked.request.stream)) if asked.held else None
        interaction = _by_policy(_interaction(asked, outcome, placed, state, now), asked.caller.bodies)
        await self._recorder.record(interaction, kept)
        asked.meter.settle(tokens=outcome.answer.prompt_tokens + outcome.answer.completion_tokens, cost_microusd=interaction.cost_microusd)
        self._metrics.answered(outcome.tier, outcome.route, state, time.monotonic() - asked.started, outcome.cost_usd)
        self._spans.record(interaction, asked_model=asked.request.model, headers=asked.options.trace)
        return reply

    @staticmethod
    def _reply(
        asked: Asked, outcome: Outcome, placed: Placed, state: CacheState, now: datetime, spoken: Sequence[dict[str, Any]] | None
    ) -> Reply:
        body = openai.completion(
            asked.id,
            created=int(now.timestamp()),
            model=outcome.model,
            answer=_visible(outcome.answer.body, asked.request),
            tokens=(outcome.answer.prompt_tokens, outcome.answer.completion_tokens),
        )
        headers = reply_headers(outcome, placed, state, asked.id)
        if asked.request.stream:
            return Reply(b"", tuple(openai.chunks_of(body, spoken=spoken is not None, usage=asked.request.usage)), headers)
        return Reply(orjson.dumps(body), (), headers)


def reply_headers(outcome: Outcome, placed: Placed, state: CacheState, request_id: str, *, cost: bool = True) -> dict[str, str]:
    """Where the answer came from; a stream's `cost` is not known before it has ended, the usage chunk and the ledger have it."""
    headers = {
        "x-request-id": request_id,
        "x-tutelage-model": outcome.model,
        "x-tutelage-tier": outcome.tier,
        "x-tutelage-route": outcome.route,
        "x-tutelage-cache": state,
    }
    if cost:
        headers["x-tutelage-cost-usd"] = f"{outcome.cost_usd:.9f}"
    if outcome.chosen.strategy:
        headers["x-tutelage-strategy"] = outcome.chosen.strategy
    headers["x-tutelage-reason"] = quote(outcome.reason, safe=PLAIN)
    if placed.domain:
        headers["x-tutelage-domain"] = quote(placed.domain, safe=PLAIN)  # a client may name it in any script
    if outcome.confidence is not None:
        headers["x-tutelage-confidence"] = f"{outcome.confidence:.4f}"
    return headers


def _interaction(asked: Asked, outcome: Outcome, placed: Placed, state: CacheState, now: datetime) -> Interaction:
    answer = outcome.answer
    return Interaction(
        request_id=asked.id,
        tenant_id=asked.caller.tenant_id,
        key_id=asked.caller.key_id,
        created_at=now,
        messages=asked.request.messages,
        prompt_hash=hashlib.sha256(asked.request.prompt.encode()).digest(),
        answer=answer.text,
        model=outcome.model,
        tier=outcome.tier,
        route=outcome.route,
        reason=outcome.reason,
        cache=state,
        domain=placed.domain,
        given_domain=asked.given_domain,
        confidence=outcome.confidence,
        finish_reason=answer.finish_reason,
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.completion_tokens,
        tokens_estimated=answer.estimated,
        cost_microusd=round(outcome.cost_usd * 1e6),
        latency_ms=round((time.monotonic() - asked.started) * 1000),
        embedding=placed.embedding,
        attempts=outcome.attempts,
        strategy=outcome.chosen.strategy,
        propensity=outcome.chosen.propensity,
        explored=outcome.chosen.explored,
        policy_version=outcome.chosen.policy_version,
        similarity=placed.similarity,
    )


def _by_policy(interaction: Interaction, policy: Bodies) -> Interaction:
    """What the tenant wants kept of it: all, what is not personal, or nothing that could tell of the prompt."""
    if policy == "full":
        return interaction
    if policy == "redacted":
        attempts = tuple(replace(attempt, answer=redact(attempt.answer)) for attempt in interaction.attempts)
        return interaction._replace(messages=redact_all(interaction.messages), answer=redact(interaction.answer), attempts=attempts)
    attempts = tuple(replace(attempt, answer="") for attempt in interaction.attempts)
    return interaction._replace(messages=None, answer="", attempts=attempts, embedding=None, prompt_hash=b"")


def _visible(body: dict[str, Any], request: openai.Chat) -> dict[str, Any]:
    """The cascade asks for log-probabilities and alternatives; the client sees of them what it asked for."""
    if not any(choice.get("logprobs") for choice in body["choices"]):
        return body
    return body | {"choices": [choice | {"logprobs": _asked(choice.get("logprobs"), request)} for choice in body["choices"]]}


def _asked(logprobs: dict[str, Any] | None, request: openai.Chat) -> dict[str, Any] | None:
    """Nothing, or every token with as many of the likeliest at its place as the request asked for."""
    if not request.logprobs:
        return None
    if not logprobs or not logprobs.get("content"):
        return logprobs
    content = [told | {"top_logprobs": (told.get("top_logprobs") or [])[: request.alternatives]} for told in logprobs["content"]]
    return logprobs | {"content": content}


def _stored(reply: Reply, spoken: Sequence[dict[str, Any]], *, stream: bool) -> StoredReply:
    """The reply as it goes out, byte for byte."""
    if not stream:
        return StoredReply(reply.headers, openai.JSON, reply.content)
    return StoredReply(reply.headers, openai.EVENTS, b"".join(openai.event(c) for c in [*spoken, *reply.chunks]) + openai.DONE)
