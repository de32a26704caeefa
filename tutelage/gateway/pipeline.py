"""A request on one page: authenticate → admit → cache → join → route → call → record → reply.

It refuses to know HTTP (`app.py`) and how any of the steps is done.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal
from urllib.parse import quote

from tutelage.errors import BackendFailed, BackendRefused, Forbidden, ModelNotFound, Suspended, TutelageError, Unauthenticated, Unavailable
from tutelage.fleet.backends import Answer, Backend
from tutelage.gateway import keys, openai
from tutelage.gateway.admission import Admission, Estimate, Meter, Party
from tutelage.gateway.cache import CacheKey, ExactCache, cache_key
from tutelage.gateway.limits import Limits, agreed
from tutelage.gateway.snapshot import TenantView, Watcher
from tutelage.gateway.streams import Heard, Relay
from tutelage.records import Attempt, CacheState, Interaction, Tier
from tutelage.routing.confidence import score
from tutelage.routing.encoder import Encoder
from tutelage.routing.policy import StudentSnapshot, accept, choose_student
from tutelage.settings import ModelEntry, RoutingSettings
from tutelage.stores.interactions import Recorder
from tutelage.stores.replies import Held, StoredReply
from tutelage.telemetry import Metrics

log = logging.getLogger(__name__)

TIERS: tuple[Tier, ...] = ("student", "ta", "teacher")


@dataclass(frozen=True)
class Caller:
    """Who asks: a tenant by one of its keys, with the limits of both. `models`: those the key may name (None: any)."""

    tenant: Party
    key: Party
    models: frozenset[str] | None = None
    on_disconnect: Literal["cancel", "drain"] = "cancel"

    @property
    def tenant_id(self) -> str:
        return self.tenant.id

    @property
    def key_id(self) -> str:
        return self.key.id

    def check_model(self, name: str) -> None:
        """Raises Forbidden when the key may not name this model."""
        if self.models is not None and name not in self.models:
            allowed = ", ".join(sorted(self.models)) or "none"
            raise Forbidden(f"this key may not use model {name!r}; it may use: {allowed}", param="model")


@dataclass(frozen=True)
class Options:
    """What the request's headers ask for."""

    cache: str = ""
    domain: str | None = None


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
class Models:
    """The backends of models.yaml, in their order, and the local tier's clients by adapter name."""

    configured: tuple[tuple[ModelEntry, Backend], ...]
    adapter: Callable[[str], Backend]

    def teachers(self, domain: str | None) -> list[Backend]:
        """Those that name the domain first, then those that answer anything."""
        teachers = [(entry, backend) for entry, backend in self.configured if entry.tier == "teacher"]
        own = [backend for entry, backend in teachers if domain is not None and domain in entry.domains]
        return own + [backend for entry, backend in teachers if not entry.domains]

    def named(self, name: str) -> tuple[Tier, Backend] | None:
        return next(((entry.tier, backend) for entry, backend in self.configured if entry.name == name), None)


class Pipeline:
    """Holds what a request needs; one a worker."""

    def __init__(
        self,
        *,
        watcher: Watcher,
        cache: ExactCache,
        recorder: Recorder,
        admission: Admission,
        encoder: Encoder,
        models: Models,
        routing: RoutingSettings,
        reserve_tokens: int,
        secret: str,
        metrics: Metrics,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._watcher = watcher
        self._cache = cache
        self._recorder = recorder
        self._admission = admission
        self._reserve_tokens = reserve_tokens
        self._encoder = encoder
        self._models = models
        self._routing = routing
        self._secret = secret
        self._metrics = metrics
        self._clock = clock
        self._running: dict[CacheKey, asyncio.Task[tuple[Placed, Outcome]]] = {}
        self._cut: set[asyncio.Task[None]] = set()  # streams whose client left, while they are being settled

    async def close(self) -> None:
        """Wait until streams that were cut off are recorded."""
        await asyncio.gather(*self._cut, return_exceptions=True)

    def authenticate(self, authorization: str | None) -> Caller:
        """Raises Unauthenticated, or Unavailable while no keys have been read."""
        presented = keys.parse(authorization)
        snapshot = self._watcher.current
        key = keys.check(presented, snapshot.keys.get(presented.id), pepper=self._secret, now=self._clock())
        if key.tenant_id is None:
            raise Unauthenticated("this is an operator key; requests need a tenant's key: tutelage keys create TENANT")
        tenant = snapshot.tenants[key.tenant_id]
        if tenant.status != "active":
            raise Suspended("this tenant is suspended; its data is kept: ask your administrator to resume it")
        return Caller(
            Party("tenant", tenant.id, tenant.id, agreed(tenant.tier, tenant.limits)),
            Party("key", tenant.id, key.id, Limits.model_validate(dict(key.limits))),
            frozenset(key.models) if key.models is not None else None,
            tenant.on_disconnect,
        )

    def admit(self, request: openai.ChatRequest, caller: Caller) -> AbstractAsyncContextManager[Meter]:
        """The request's right to run, to be held until its reply has ended. Raises Forbidden; entering it, LimitReached."""
        caller.check_model(request.model)
        return self._admission.granted(f"chatcmpl-{uuid.uuid4().hex}", (caller.tenant, caller.key), self._estimate(request))

    def _estimate(self, request: openai.ChatRequest) -> Estimate:
        """The most that a request is likely to take: every third character a token, the longest answer it may get, the dearest
        teacher that may answer."""
        characters = sum(len(openai.text_of(message)) + 12 for message in request.messages)
        prompt, longest = characters // 3 + 1, request.max_completion_tokens or request.max_tokens or self._reserve_tokens
        answers = longest * (request.n or 1)
        dearest = max((backend.price({}, prompt, answers) for _, backend in self._models.configured), default=0.0)
        return Estimate(prompt + answers, math.ceil(dearest * 1e6))

    async def answer(self, asked: Asked) -> Reply:
        """One request from start to end; its interaction is durable when this returns."""
        view = self._watcher.current.view(asked.caller.tenant_id)
        place = self._cache_key(asked, view)
        return await self._answered(asked, view, place, await self._look_up(asked, place))

    async def _answered(self, asked: Asked, view: TenantView, place: CacheKey, cached: Outcome | CacheState) -> Reply:
        if isinstance(cached, Outcome):
            return await self._finish(asked, cached, Placed(cached.domain, None, "served from cache"), "hit-exact")
        if cached == "bypass":
            placed, outcome = await self._place_and_route(asked, view)
            return await self._finish(asked, outcome, placed, cached)
        joined = place in self._running
        placed, outcome = await self._together(place, asked, view)
        if joined:
            return await self._finish(asked, _shared(outcome), placed, "hit-exact")
        reply = await self._finish(asked, outcome, placed, cached)
        await self._remember(place, outcome, placed)
        return reply

    async def stream(self, asked: Asked) -> tuple[dict[str, str], AsyncGenerator[dict[str, Any], None]]:
        """As `answer`, in chunks. A model that answers alone is passed through as it speaks; a cascade must see the whole answer
        before it can judge it. The last chunk is held back until the interaction is durable."""
        view = self._watcher.current.view(asked.caller.tenant_id)
        place = self._cache_key(asked, view)
        cached = await self._look_up(asked, place)
        whole = isinstance(cached, Outcome) or (cached == "miss" and place in self._running)
        if not whole:
            placed = await self._place(asked, view)
            alone = self._alone(asked.request, view, placed)
        if whole or alone is None:
            reply = await self._answered(asked, view, place, cached)
            return reply.headers, _each(reply.chunks)
        return await self._pass_through(asked, placed, alone, place=place if cached == "miss" else None)

    def _cache_key(self, asked: Asked, view: TenantView) -> CacheKey:
        return cache_key(asked.caller.tenant_id, asked.request.shape(), secret=self._secret, generation=view.generation)

    async def _together(self, place: CacheKey, asked: Asked, view: TenantView) -> tuple[Placed, Outcome]:
        """Identical requests of a tenant that are under way at once share one call; it goes on while anybody may still want it."""
        running = self._running.get(place)
        if running is None:
            running = self._running[place] = asyncio.create_task(self._place_and_route(asked, view))
            running.add_done_callback(lambda done: self._over(place, done))
        return await asyncio.shield(running)

    def _over(self, place: CacheKey, done: asyncio.Task[tuple[Placed, Outcome]]) -> None:
        self._running.pop(place, None)
        if not done.cancelled():
            done.exception()  # those who waited have it; if nobody did, asyncio must not complain

    async def _place_and_route(self, asked: Asked, view: TenantView) -> tuple[Placed, Outcome]:
        placed = await self._place(asked, view)
        return placed, await self._route(asked.request, view, placed)

    # --- cache -----------------------------------------------------------------------------------------------------

    async def _look_up(self, asked: Asked, place: CacheKey) -> Outcome | CacheState:
        sampled = (asked.request.temperature or 0) > 0 or (asked.request.n or 1) > 1
        if asked.options.cache in ("bypass", "private") or sampled:
            return "bypass"
        found = await self._cache.get(place)
        if found is None:
            return "miss"
        answer = Answer(found["body"], found["tokens"][0], found["tokens"][1], True, 0.0)
        return Outcome(
            answer,
            found["model"],
            found["tier"],
            "cache",
            "the same request was answered before",
            found["confidence"],
            domain=found["domain"],
        )

    async def _remember(self, place: CacheKey, outcome: Outcome, placed: Placed) -> None:
        answer = outcome.answer
        if answer.finish_reason != "stop" or outcome.route.endswith("degraded"):
            return
        value = {"body": answer.body, "tokens": [answer.prompt_tokens, answer.completion_tokens], "model": outcome.model}
        await self._cache.put(place, value | {"tier": outcome.tier, "confidence": outcome.confidence, "domain": placed.domain})

    # --- route -----------------------------------------------------------------------------------------------------

    async def _place(self, asked: Asked, view: TenantView) -> Placed:
        given = asked.given_domain
        if view.index is None:
            return Placed(given, None, "no domains yet")
        # the encoder computes without the interpreter's lock; a thread keeps the event loop answering
        embedding = (await asyncio.to_thread(self._encoder.encode, [asked.request.prompt()]))[0]
        if given:
            return Placed(given, embedding.tobytes(), "the client named the domain")
        assignment = view.index.assign(embedding)
        return Placed(assignment.domain, embedding.tobytes(), assignment.reason)

    def _alone(self, request: openai.ChatRequest, view: TenantView, placed: Placed) -> tuple[Tier, Backend, str] | None:
        """The one model that answers without being judged: the one asked for, or the teacher where no student can try."""
        if request.model == "auto":
            choice = choose_student(placed.domain, view.students, quality_floor=self._routing.threshold)
            teachers = self._models.teachers(placed.domain)
            return ("teacher", teachers[0], choice.reason) if choice.student is None and teachers else None
        if request.model in TIERS:
            return self._of_tier(request.model, view, placed)
        named = self._models.named(request.model)
        if named is not None:
            return named[0], named[1], "the client named the model"
        for student in view.students:
            if request.model in (student.name, view.adapters[student.name]):
                return student.tier, self._models.adapter(view.adapters[student.name]), "the client named the student"
        known = ["auto", *TIERS, *(entry.name for entry, _ in self._models.configured), *(s.name for s in view.students)]
        raise ModelNotFound(f"model {request.model!r} does not exist here; available: {', '.join(known)}", param="model")

    def _of_tier(self, tier: Tier, view: TenantView, placed: Placed) -> tuple[Tier, Backend, str]:
        for student in view.students:
            if student.tier == tier and student.domain == placed.domain:
                return tier, self._models.adapter(view.adapters[student.name]), "the client named the tier"
        teachers = self._models.teachers(placed.domain) if tier == "teacher" else []
        if not teachers:
            raise ModelNotFound(f"no {tier} answers domain {placed.domain or 'unknown'!r} yet; use model 'auto'", param="model")
        return tier, teachers[0], "the client named the tier"

    async def _route(self, request: openai.ChatRequest, view: TenantView, placed: Placed) -> Outcome:
        alone = self._alone(request, view, placed)
        if alone is not None and request.model != "auto":
            tier, backend, reason = alone
            answer = await backend.complete(self._payload(request))
            return Outcome(answer, backend.name, tier, "direct", reason)
        choice = choose_student(placed.domain, view.students, quality_floor=self._routing.threshold)
        tried = await self._try_student(request, view, choice.student) if choice.student else None
        if tried is not None and tried.attempts[0].accepted:
            return tried
        attempts = tried.attempts if tried else ()
        try:
            answer, name = await self._ask_teachers(request, placed)
        except Unavailable:
            # a promoted student is proven good enough as a whole: while every teacher is down its answer is better than none
            if tried is not None and tried.tier != "student":
                accepted = replace(tried.attempts[0], accepted=True)
                return replace(tried, route="cascade-degraded", reason="every teacher is down", attempts=(accepted,))
            raise
        if attempts:
            return Outcome(answer, name, "teacher", "cascade", attempts[0].reason, None, attempts)
        return Outcome(answer, name, "teacher", "always-teacher" if choice.student is None else "cascade", choice.reason)

    async def _try_student(self, request: openai.ChatRequest, view: TenantView, student: StudentSnapshot) -> Outcome | None:
        """The student's answer with its calibrated confidence; None when it cannot be reached, so the teacher answers."""
        backend = self._models.adapter(view.adapters[student.name])
        payload = self._payload(request) | {"logprobs": True}
        asked = request.max_completion_tokens or request.max_tokens or self._routing.max_student_tokens
        payload.pop("max_completion_tokens", None)
        payload["max_tokens"] = min(asked, self._routing.max_student_tokens)
        try:
            answer = await backend.complete(payload)
        except (BackendFailed, BackendRefused) as failed:
            log.warning("student %s did not answer: %s", student.name, failed)
            self._metrics.fallbacks.labels(student.name).inc()
            return None
        found = score(answer.logprobs)
        verdict = accept(student, found, threshold=self._routing.threshold)
        whole = answer.finish_reason == "stop" and answer.body.get("system_fingerprint") == student.digest
        reason = verdict.reason if whole else f"not the whole answer of the version in charge ({answer.finish_reason})"
        accepted = verdict.accepted and whole
        cost = round(answer.cost_usd * 1e6)
        attempt = Attempt(student.name, student.tier, student.digest, answer.text, found, verdict.confidence, accepted, reason, cost)
        return Outcome(answer, student.name, student.tier, "cascade", reason, verdict.confidence, (attempt,))

    async def _ask_teachers(self, request: openai.ChatRequest, placed: Placed) -> tuple[Answer, str]:
        failures = []
        for teacher in self._models.teachers(placed.domain):
            try:
                return await teacher.complete(self._payload(request)), teacher.name
            except BackendFailed as failed:
                failures.append(str(failed))
        told = "; ".join(failures) or "no teacher is configured in models.yaml"
        raise Unavailable(f"no teacher could answer ({told}); try again shortly")

    @staticmethod
    def _payload(request: openai.ChatRequest) -> dict[str, Any]:
        return request.shape() | {"messages": request.conversation()}

    # --- record and reply --------------------------------------------------------------------------------------------

    async def _finish(
        self, asked: Asked, outcome: Outcome, placed: Placed, state: CacheState, *, spoken: Sequence[dict[str, Any]] | None = None
    ) -> Reply:
        """Record the interaction, and the reply if it has an idempotency key; then it may be given. `spoken`: what was streamed."""
        now = self._clock()
        body = openai.completion(
            asked.id,
            created=int(now.timestamp()),
            model=outcome.model,
            answer=self._visible(outcome.answer.body, asked.request),
            tokens=(outcome.answer.prompt_tokens, outcome.answer.completion_tokens),
        )
        headers = self._headers(outcome, placed, state, asked.id)
        if asked.request.stream:
            reply = Reply(b"", tuple(openai.chunks_of(body, spoken=spoken is not None, usage=asked.usage)), headers)
        else:
            reply = Reply(json.dumps(body, ensure_ascii=False).encode(), (), headers)
        kept = (asked.held, _stored(reply, spoken or (), stream=asked.request.stream)) if asked.held else None
        await self._recorder.record(self._interaction(asked, outcome, placed, state, now), kept)
        asked.meter.settle(
            tokens=outcome.answer.prompt_tokens + outcome.answer.completion_tokens, cost_microusd=round(outcome.cost_usd * 1e6)
        )
        self._metrics.answered(outcome.tier, outcome.route, state, time.monotonic() - asked.started, outcome.cost_usd)
        return reply

    def _interaction(self, asked: Asked, outcome: Outcome, placed: Placed, state: CacheState, now: datetime) -> Interaction:
        answer = outcome.answer
        return Interaction(
            request_id=asked.id,
            tenant_id=asked.caller.tenant_id,
            key_id=asked.caller.key_id,
            created_at=now,
            messages=asked.request.conversation(),
            prompt_hash=hashlib.sha256(asked.request.prompt().encode()).digest(),
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
        )

    @staticmethod
    def _visible(body: dict[str, Any], request: openai.ChatRequest) -> dict[str, Any]:
        """The cascade asks for log-probabilities; the client sees them only if it asked too."""
        if request.logprobs:
            return body
        return body | {"choices": [choice | {"logprobs": None} for choice in body["choices"]]}

    @staticmethod
    def _headers(outcome: Outcome, placed: Placed, state: CacheState, request_id: str) -> dict[str, str]:
        headers = {
            "x-request-id": request_id,
            "x-tutelage-model": outcome.model,
            "x-tutelage-tier": outcome.tier,
            "x-tutelage-route": outcome.route,
            "x-tutelage-cache": state,
            "x-tutelage-cost-usd": f"{outcome.cost_usd:.9f}",
        }
        if placed.domain:
            headers["x-tutelage-domain"] = quote(placed.domain, safe=" !#$&'()*+,/:;=?@[]")  # a client may name it in any script
        if outcome.confidence is not None:
            headers["x-tutelage-confidence"] = f"{outcome.confidence:.4f}"
        return headers

    # --- streams -----------------------------------------------------------------------------------------------------

    async def _pass_through(
        self, asked: Asked, placed: Placed, alone: tuple[Tier, Backend, str], *, place: CacheKey | None
    ) -> tuple[dict[str, str], AsyncGenerator[dict[str, Any], None]]:
        tier, backend, reason = alone
        routed = asked.request.model == "auto"
        others = [b for b in self._models.teachers(placed.domain) if b is not backend] if routed else []
        backend, chunks, first = await self._first_chunk(asked.request, [backend, *others])
        route = "always-teacher" if routed else "direct"
        state: CacheState = "miss" if place is not None else "bypass"
        payload, relay = self._payload(asked.request), Relay(chunks)
        heard = Heard(asked.id, int(self._clock().timestamp()), backend.name)

        def outcome(ended: str | None = None) -> Outcome:
            return Outcome(heard.answer(backend, payload, self._encoder.count_tokens, ended=ended), backend.name, tier, route, reason)

        async def speak() -> AsyncGenerator[dict[str, Any], None]:
            spoken: list[dict[str, Any]] = []
            ended = "cancelled"  # how the stream ends for the client, unless something else becomes of it
            try:
                spoken.append(heard.listen(first))
                yield spoken[-1]
                async for chunk in relay:
                    # finish reasons are withheld: they are the acknowledgement, and nothing is acknowledged before it is recorded
                    visible = heard.listen(chunk)
                    if visible["choices"]:
                        spoken.append(visible)
                        yield visible
                ended = "whole"
                whole = outcome()
                reply = await self._finish(asked, whole, placed, state, spoken=spoken)
                if place is not None:
                    await self._remember(place, whole, placed)
                for chunk in reply.chunks:
                    yield chunk
            except BackendFailed:
                ended = "error"
                raise
            finally:
                if ended in ("cancelled", "error"):
                    self._settle(asked, partial(rest, ended), placed, state)

        async def rest(ended: str) -> Outcome:
            """What the model said to a client that left: up to now, or to its end where the tenant wants the answer on record."""
            if ended == "cancelled" and asked.caller.on_disconnect == "cancel":
                await relay.stop()
            try:
                async for chunk in relay:
                    heard.listen(chunk)
            except BackendFailed:
                return outcome("error")
            return outcome(None if ended == "cancelled" and asked.caller.on_disconnect == "drain" else ended)

        headers = self._headers(
            Outcome(Answer({"choices": [{"message": {}}]}, 0, 0, True, 0.0), backend.name, tier, route, reason), placed, state, asked.id
        )
        headers.pop("x-tutelage-cost-usd")  # not known before the stream has ended; the usage chunk and the ledger have it
        return headers, speak()

    def _settle(self, asked: Asked, rest: Callable[[], Awaitable[Outcome]], placed: Placed, state: CacheState) -> None:
        """Bill what was produced of a stream that was cut off. It outlives the request; until it is known, the request counts as
        what it had reserved."""
        asked.meter.settle(tokens=asked.meter.reserved.tokens, cost_microusd=asked.meter.reserved.cost_microusd)

        async def record() -> None:
            try:
                await self._finish(replace(asked, held=None), await rest(), placed, state)
            except TutelageError as failed:
                log.error("a cut stream could not be recorded: request %s: %s", asked.id, failed.message)

        task = asyncio.create_task(record())
        self._cut.add(task)
        task.add_done_callback(self._cut.discard)

    async def _first_chunk(
        self, request: openai.ChatRequest, backends: list[Backend]
    ) -> tuple[Backend, AsyncGenerator[dict[str, Any], None], dict[str, Any]]:
        """The first backend that begins to speak: until then another may take over and nothing visible breaks."""
        failures = []
        for backend in backends:
            chunks = backend.stream(self._payload(request))
            try:
                return backend, chunks, await anext(chunks)
            except StopAsyncIteration:
                failures.append(f"model {backend.name} sent nothing")
            except BackendFailed as failed:
                failures.append(str(failed))
        raise Unavailable(f"no model could answer ({'; '.join(failures)}); try again shortly")


def _shared(outcome: Outcome) -> Outcome:
    """An outcome as a later one of identical requests gets it: the first has paid for it."""
    return replace(
        outcome, answer=replace(outcome.answer, cost_usd=0.0), route="coalesced", reason="the same request was being answered", attempts=()
    )


def _stored(reply: Reply, spoken: Sequence[dict[str, Any]], *, stream: bool) -> StoredReply:
    """The reply as it goes out, byte for byte."""
    if not stream:
        return StoredReply(reply.headers, openai.JSON, reply.content)
    return StoredReply(reply.headers, openai.EVENTS, b"".join(openai.event(c) for c in [*spoken, *reply.chunks]) + openai.DONE)


async def _each(chunks: Sequence[dict[str, Any]]) -> AsyncGenerator[dict[str, Any], None]:
    for chunk in chunks:
        yield chunk
